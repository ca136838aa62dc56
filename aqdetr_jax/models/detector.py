"""The families of detectors behind one door, and the operations that one of them runs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.deformable_detr import DeformableDetr
from aqdetr_jax.models.detr import Detr
from aqdetr_jax.quant.policy import Policy
from aqdetr_jax.quant.record import OpRecord, recording

Detector = Detr | DeformableDetr
"""Both take (images, mask, train, auxiliary) and return a ``DetrOutput``."""


def build_detector(config: DetrConfig, policy: Policy | None = None) -> Detector:
    """The module of ``config.family``."""
    return (DeformableDetr if config.family == "deformable" else Detr)(config, policy or Policy())


def example_input(bucket: tuple[int, int], batch: int = 1) -> tuple[jax.Array, jax.Array]:
    """A black image and its mask, for shapes."""
    return jnp.zeros((batch, *bucket, 3), jnp.uint8), jnp.ones((batch, *bucket), bool)


def record_ops(module: Detector, variables: Any, bucket: tuple[int, int]) -> list[OpRecord]:
    """The operations of one inference on one image of a bucket, without running it."""
    images, mask = example_input(bucket)
    with recording() as rows:
        jax.eval_shape(lambda v: module.apply(v, images, mask), variables)
    return rows
