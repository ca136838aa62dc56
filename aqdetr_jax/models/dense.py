"""The dense detector of the pretraining: backbone and encoder under a throw-away head."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from aqdetr_jax.models.backbone import build_backbone
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.heads import TORCH_LINEAR, normalize_images
from aqdetr_jax.models.levels import encode_levels
from aqdetr_jax.models.quantized import QConv, QDense
from aqdetr_jax.models.transformer import Encoder
from aqdetr_jax.ops.position import downsample_mask, sine_position_encoding
from aqdetr_jax.quant.policy import Policy


class DenseOutput(NamedTuple):
    """Predictions of every cell of the feature map.

    Attributes:
      logits: [B, S, C], one sigmoid per class.
      boxes: [B, S, 4] (cx, cy, w, h) in [0, 1] of the image without its padding.
      valid: bool [B, S].
      centres: [B, S, 2] cell centres (x, y) in the same units.
      cell: [B, S, 2] (width, height) of the cells in the same units.
    """

    logits: Array
    boxes: Array
    valid: Array
    centres: Array
    cell: Array


class DensePretrainer(nn.Module):
    """Backbone, input projections and encoder, named as in the detector, and a dense head.

    After training, the parameters under those names start the detector; the two dense layers are
    dropped.

    Attributes:
      config: the detector that is to be started.
    """

    config: DetrConfig

    @nn.compact
    def __call__(self, images: Array, mask: Array, *, train: bool = False) -> DenseOutput:
        """uint8 [B, H, W, 3], bool [B, H, W] -> predictions of every cell."""
        c = self.config
        if c.family == "deformable":
            encoded = encode_levels(self, c, Policy(), images, mask, train)
            x, cells = encoded.memory, encoded.masks
        else:
            x, cells = self._plain(images, mask, train)
        prior = nn.initializers.constant(-4.595)  # sigmoid = 0.01, as in the focal loss paper
        logits = QDense(
            c.num_classes, kernel_init=TORCH_LINEAR, bias_init=prior, name="dense_class"
        )(x)
        sides = QDense(4, kernel_init=TORCH_LINEAR, name="dense_box")(x)
        centres, cell = _cell_boxes(mask, cells)
        # Distances to the left, top, right and bottom side, in cells.
        sides = jnp.exp(jnp.clip(sides, -6, 6)) * jnp.concatenate([cell, cell], -1)
        low, high = centres - sides[..., :2], centres + sides[..., 2:]
        boxes = jnp.concatenate([(low + high) / 2, high - low], -1)
        valid = jnp.concatenate([m.reshape(m.shape[0], -1) for m in cells], axis=1)
        return DenseOutput(logits, boxes, valid, centres, cell)

    def _plain(self, images: Array, mask: Array, train: bool) -> tuple[Array, list[Array]]:
        """DETR's encoder output [B, S, d], and the mask of its one level."""
        c = self.config
        x = normalize_images(images, mask, c)
        x = build_backbone(c.backbone, dtype=c.carrier)(x, train=train)[-1]
        batch, height, width, _ = x.shape
        cells = downsample_mask(mask, height, width)
        position = sine_position_encoding(cells, c.dim).reshape(batch, -1, c.dim).astype(x.dtype)
        valid = cells.reshape(batch, -1)
        x = QConv(
            c.dim,
            (1, 1),
            use_bias=True,
            kernel_init=TORCH_LINEAR,
            dtype=c.carrier,
            name="input_proj",
        )(x)
        x, _ = Encoder(c, name="encoder")(x.reshape(batch, -1, c.dim), position, valid, train)
        return x, [cells]


def _cell_boxes(mask: Array, levels: list[Array]) -> tuple[Array, Array]:
    """Centres and sizes of the cells of all levels, both [B, S, 2], in units of the real image."""
    centres, sizes = [], []
    # The real image's part of the padded one.
    part = jnp.stack(
        [
            jnp.sum(jnp.any(mask, 1), -1) / mask.shape[2],
            jnp.sum(jnp.any(mask, 2), -1) / mask.shape[1],
        ],
        -1,
    )[:, None]
    for level in levels:
        height, width = level.shape[1:]
        extent = part * np.array([width, height], "f4")
        grid = jnp.stack(jnp.meshgrid(jnp.arange(width), jnp.arange(height)), -1).reshape(1, -1, 2)
        centres.append((grid + 0.5) / extent)
        sizes.append(jnp.broadcast_to(1 / extent, centres[-1].shape))
    return jnp.concatenate(centres, 1), jnp.concatenate(sizes, 1)
