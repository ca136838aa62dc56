"""The families of detectors behind one door, and the operations that one of them runs."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
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


def level_strides(config: DetrConfig) -> list[int]:
    """Pixels per cell of each level that the encoder sees, finest first."""
    backbone, options = config.backbone, config.deformable
    if config.family == "detr":
        return [backbone.output_stride]
    strides = list(backbone.stage_strides[-min(options.stages, options.levels) :])
    while len(strides) < options.levels:
        strides.append(strides[-1] * 2)
    return strides


def memory_valid(config: DetrConfig, mask: jax.Array) -> jax.Array:
    """Which of the encoder's tokens lie on real pixels, as in ``DetrOutput``, without a model.

    Args:
      config: sizes.
      mask: bool [B, H, W].

    Returns:
      bool [B, S].
    """
    # A convolution of stride s leaves a side of n with the next integer to n / s.
    sizes = [
        tuple(-(-side // stride) for side in mask.shape[1:]) for stride in level_strides(config)
    ]
    cells = [downsample_mask(mask, *size).reshape(len(mask), -1) for size in sizes]
    return jnp.concatenate(cells, axis=1)


def example_input(bucket: tuple[int, int], batch: int = 1) -> tuple[jax.Array, jax.Array]:
    """A black image and its mask, for shapes."""
    return jnp.zeros((batch, *bucket, 3), jnp.uint8), jnp.ones((batch, *bucket), bool)


def record_ops(module: Detector, variables: Any, bucket: tuple[int, int]) -> list[OpRecord]:
    """The operations of one inference on one image of a bucket, without running it."""
    images, mask = _image_shapes(bucket)
    with recording() as rows:
        # (A function of its own: what was traced before would be known, and record nothing.)
        jax.eval_shape(lambda v, x, m: module.apply(v, x, m), variables, images, mask)
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


def record_first_ops(module: Any, bucket: tuple[int, int]) -> tuple[list[OpRecord], Any]:
    """As ``record_ops``, of a model whose variables are not there yet.

    Args:
      module: one without auxiliary queries, which initialisation runs too.
      bucket: height and width of the image, pixels.

    Returns:
      (rows, shapes of the variables).
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    with recording() as rows:
        shapes = jax.eval_shape(lambda *inputs: module.init(*inputs), key, *_image_shapes(bucket))
    return rows, shapes


def _image_shapes(bucket: tuple[int, int]) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Of an image and its mask."""
    return (
        jax.ShapeDtypeStruct((1, *bucket, 3), jnp.uint8),
        jax.ShapeDtypeStruct((1, *bucket), jnp.bool_),
    )


def deployed_ops(rows: Sequence[OpRecord], config: DetrConfig) -> list[OpRecord]:
    """The operations that a deployed model keeps: heads predict from the last decoder layer.

    Training needs the predictions of every layer. Of heads that each layer has of its own the box
    heads stay, whose boxes the next layer refines.

    Args:
      rows: of one inference, see ``record_ops``.
      config: sizes.
    """
    layers = config.decoder_layers
    if config.family == "deformable" and config.deformable.box_refine:
        idle = {f"class_head_{i}" for i in range(layers - 1)}
        return [row for row in rows if row.path not in idle]
    kept, seen = [], set()
    for row in rows:
        if re.match(r"(class|box)_head(/|$)", row.path):
            if config.family == "detr":  # one product over all layers
                row = dataclasses.replace(row, macs=row.macs // layers)
            elif row.path in seen:
                continue
            seen.add(row.path)
        kept.append(row)
    return kept
