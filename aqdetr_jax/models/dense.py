"""The dense detector of the pretraining: DETR's backbone and encoder under a throw-away head."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.heads import TORCH_LINEAR, normalize_images
from aqdetr_jax.models.quantized import QConv, QDense
from aqdetr_jax.models.resnet import ResNet
from aqdetr_jax.models.transformer import Encoder
from aqdetr_jax.ops.position import downsample_mask, sine_position_encoding


class DenseOutput(NamedTuple):
    """Predictions of every cell of the feature map.

    Attributes:
      logits: [B, S, C], one sigmoid per class.
      boxes: [B, S, 4] (cx, cy, w, h) in [0, 1] of the image without its padding.
      valid: bool [B, S].
      centres: [B, S, 2] cell centres (x, y) in the same units.
      cell: [B, 1, 2] (width, height) of a cell in the same units.
    """

    logits: Array
    boxes: Array
    valid: Array
    centres: Array
    cell: Array


class DensePretrainer(nn.Module):
    """Backbone, input projection and encoder with the names they have in ``Detr``; a dense head.

    After training, the parameters under those names start a ``Detr``; the two dense layers are
    dropped.

    Attributes:
      config: the DETR that is to be started.
    """

    config: DetrConfig

    @nn.compact
    def __call__(self, images: Array, mask: Array, *, train: bool = False) -> DenseOutput:
        """uint8 [B, H, W, 3], bool [B, H, W] -> predictions of every cell."""
        c = self.config
        x = normalize_images(images, mask, c)
        x = ResNet(c.backbone, dtype=jnp.dtype(c.dtype), name="backbone")(x, train=train)[-1]
        batch, height, width, _ = x.shape
        cells = downsample_mask(mask, height, width)
        position = sine_position_encoding(cells, c.dim).reshape(batch, -1, c.dim)
        valid = cells.reshape(batch, -1)
        x = QConv(c.dim, (1, 1), use_bias=True, kernel_init=TORCH_LINEAR, name="input_proj")(x)
        x, _ = Encoder(c, name="encoder")(x.reshape(batch, -1, c.dim), position, valid, train)
        prior = nn.initializers.constant(-4.595)  # sigmoid = 0.01, as in the focal loss paper
        logits = QDense(
            c.num_classes, kernel_init=TORCH_LINEAR, bias_init=prior, name="dense_class"
        )(x)
        sides = QDense(4, kernel_init=TORCH_LINEAR, name="dense_box")(x)

        # Extent of the real image in cells: normalised units are those of the targets.
        extent = jnp.stack(
            [
                jnp.sum(jnp.any(mask, 1), -1) / mask.shape[2] * width,
                jnp.sum(jnp.any(mask, 2), -1) / mask.shape[1] * height,
            ],
            -1,
        )[:, None]
        grid = jnp.stack(jnp.meshgrid(jnp.arange(width), jnp.arange(height)), -1).reshape(1, -1, 2)
        centres = (grid + 0.5) / extent
        # Distances to the left, top, right and bottom side, in cells.
        sides = jnp.exp(jnp.clip(sides, -6, 6)) / jnp.concatenate([extent, extent], -1)
        low, high = centres - sides[..., :2], centres + sides[..., 2:]
        boxes = jnp.concatenate([(low + high) / 2, high - low], -1)
        return DenseOutput(logits, boxes, valid, centres, 1 / extent)
