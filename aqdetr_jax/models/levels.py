"""From images to the encoded tokens of several feature levels (Deformable DETR)."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.deformable_attention import DeformableMaps
from aqdetr_jax.models.deformable_transformer import DeformableEncoder
from aqdetr_jax.models.heads import normalize_images
from aqdetr_jax.models.layers import FLOAT, GroupNorm
from aqdetr_jax.models.quantized import QConv
from aqdetr_jax.models.resnet import ResNet
from aqdetr_jax.ops import deformable
from aqdetr_jax.ops.deformable import LevelShapes
from aqdetr_jax.ops.position import downsample_mask, sine_position_encoding
from aqdetr_jax.quant.policy import Policy
from aqdetr_jax.quant.record import OpRecord, record


class EncodedLevels(NamedTuple):
    """What the encoder makes of an image.

    Attributes:
      memory: [B, S, d] tokens of all levels, level by level.
      maps: self-attention maps per encoder layer.
      masks: bool [B, H_l, W_l] per level, True = real.
      valid: the same as bool [B, S].
      ratios: [B, L, 2] valid part (x, y) of each level.
      shapes: (height, width) of each level.
    """

    memory: Array
    maps: tuple[DeformableMaps, ...]
    masks: list[Array]
    valid: Array
    ratios: Array
    shapes: LevelShapes


def encode_levels(
    module: nn.Module,
    config: DetrConfig,
    policy: Policy,
    images: Array,
    mask: Array,
    train: bool,
    float_path: bool = False,
) -> EncodedLevels:
    """Backbone, input projections, level embedding and encoder.

    Args:
      module: the module that owns them (and calls this in its compact method): detector and dense
        pretraining share their names.
      config: sizes.
      policy: bits by module path.
      images: as for ``DeformableDetr``.
      mask: bool [B, H, W].
      train: dropout and learning norms on.
      float_path: the maps of the attentions' float paths too.
    """
    levels, masks = _feature_levels(config, policy, images, mask, train)
    start = nn.initializers.normal(1.0)
    embedding = module.param("level_embed", start, (len(levels), config.dim))
    record(OpRecord("level_embed", "embedding", parameters=embedding.size, note=FLOAT))
    tokens, position = _join_levels(levels, masks, embedding)
    shapes = tuple((m.shape[1], m.shape[2]) for m in masks)
    ratios = deformable.valid_ratios(masks)
    valid = jnp.concatenate([m.reshape(m.shape[0], -1) for m in masks], axis=1)
    centres = deformable.encoder_reference_points(shapes, ratios)
    memory, maps = DeformableEncoder(config, policy, name="encoder")(
        tokens, position, centres, valid, shapes, train, float_path
    )
    return EncodedLevels(memory, maps, masks, valid, ratios, shapes)


def _feature_levels(
    config: DetrConfig, policy: Policy, images: Array, mask: Array, train: bool
) -> tuple[list[Array], list[Array]]:
    """Backbone and input projections: maps [B, H_l, W_l, d] and masks bool [B, H_l, W_l]."""
    c, options = config, config.deformable
    x = normalize_images(images, mask, c)
    features = ResNet(c.backbone, policy, c.carrier, name="backbone")(x, train=train)
    features = features[-min(options.stages, options.levels, len(features)) :]
    levels: list[Array] = []
    for i in range(options.levels):
        # Beyond the backbone: a strided convolution of its last stage, then of that, and so on.
        given = i < len(features)
        source = features[i] if given else features[-1] if i == len(features) else levels[-1]
        size, stride = (1, 1) if given else (3, 2)
        projected = QConv(
            c.dim,
            (size, size),
            policy,
            stride,
            use_bias=True,
            unsigned=i <= len(features),
            kernel_init=nn.initializers.xavier_uniform(),
            dtype=c.carrier,
            name=f"input_proj_{i}",
        )(source)
        levels.append(GroupNorm(options.norm_groups, name=f"input_norm_{i}")(projected))
    masks = [downsample_mask(mask, x.shape[1], x.shape[2]) for x in levels]
    return levels, masks


def _join_levels(levels: list[Array], masks: list[Array], embedding: Array) -> tuple[Array, Array]:
    """The tokens of all levels, level by level, and their position encodings, [B, S, d] each.

    Args:
      levels: [B, H_l, W_l, d] feature maps.
      masks: bool [B, H_l, W_l].
      embedding: [L, d], added to the encodings of each level.
    """
    batch, dim = levels[0].shape[0], levels[0].shape[-1]
    tokens = jnp.concatenate([x.reshape(batch, -1, dim) for x in levels], axis=1)
    record(OpRecord("position", "position", note=FLOAT))
    positions = [
        sine_position_encoding(mask, dim, offset=-0.5).reshape(batch, -1, dim) + embedding[i]
        for i, mask in enumerate(masks)
    ]
    return tokens, jnp.concatenate(positions, axis=1).astype(tokens.dtype)
