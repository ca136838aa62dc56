"""The families of detectors behind one door."""

from __future__ import annotations

from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.deformable_detr import DeformableDetr
from aqdetr_jax.models.detr import Detr
from aqdetr_jax.quant.policy import Policy

Detector = Detr | DeformableDetr
"""Both take (images, mask, train, auxiliary) and return a ``DetrOutput``."""


def build_detector(config: DetrConfig, policy: Policy | None = None) -> Detector:
    """The module of ``config.family``."""
    return (DeformableDetr if config.family == "deformable" else Detr)(config, policy or Policy())
