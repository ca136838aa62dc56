"""The families of detectors behind one door, and the operations that one of them runs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.deformable_detr import DeformableDetr
from aqdetr_jax.models.detr import Detr
from aqdetr_jax.ops.position import downsample_mask
from aqdetr_jax.quant.policy import Policy
from aqdetr_jax.quant.record import OpRecord, recording
from aqdetr_jax.quant.spec import GRID_PARAMETERS

Detector = Detr | DeformableDetr
"""Both take (images, mask, train, auxiliary) and return a ``DetrOutput``."""


def build_detector(config: DetrConfig, policy: Policy | None = None) -> Detector:
    """The module of ``config.family``."""
    return (DeformableDetr if config.family == "deformable" else Detr)(config, policy or Policy())


def memory_valid(config: DetrConfig, mask: jax.Array) -> jax.Array:
    """Which of the encoder's tokens lie on real pixels, as in ``DetrOutput``, without a model.

    Args:
      config: sizes.
      mask: bool [B, H, W].

    Returns:
      bool [B, S].
    """
    backbone, options = config.backbone, config.deformable
    strides = [backbone.stem_stride * (1 + backbone.stem_pool)]
    for stride in backbone.strides:
        strides.append(strides[-1] * stride)
    if config.family == "detr":
        strides = strides[-1:]
    else:
        strides = strides[1:][-min(options.stages, options.levels) :]
        while len(strides) < options.levels:
            strides.append(strides[-1] * 2)
    # A convolution of stride s leaves a side of n with the next integer to n / s.
    sizes = [tuple(-(-side // stride) for side in mask.shape[1:]) for stride in strides]
    cells = [downsample_mask(mask, *size).reshape(len(mask), -1) for size in sizes]
    return jnp.concatenate(cells, axis=1)


def example_input(bucket: tuple[int, int], batch: int = 1) -> tuple[jax.Array, jax.Array]:
    """A black image and its mask, for shapes."""
    return jnp.zeros((batch, *bucket, 3), jnp.uint8), jnp.ones((batch, *bucket), bool)


def record_ops(module: Detector, variables: Any, bucket: tuple[int, int]) -> list[OpRecord]:
    """The operations of one inference on one image of a bucket, without running it."""
    images, mask = example_input(bucket)
    with recording() as rows:
        jax.eval_shape(lambda v: module.apply(v, images, mask), variables)
    return rows


@functools.lru_cache(maxsize=8)
def grid_parameters(config: DetrConfig, policy: Policy, bucket: tuple[int, int]) -> tuple[str, ...]:
    """Paths of the parameters that a quantized model has and its float model has not.

    Args:
      config: sizes.
      policy: bits.
      bucket: of an image that the model takes; what it is makes no difference.
    """
    module = build_detector(config, policy)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *example_input(bucket)))
    paths = traverse_util.flatten_dict(shapes["params"], sep="/")
    return tuple(path for path in paths if path.endswith(GRID_PARAMETERS))
