"""The dense detection loss of the pretraining (after FCOS, Tian et al., 2019) [ours].

A DETR from a random start learns almost nothing on a small budget: the original starts from
ImageNet features. Where there is no ImageNet, a few minutes of dense detection on the same data
stand in for it: every cell of the feature map predicts a class and a box, which gives thousands of
positives per batch at no matching cost. The head is thrown away afterwards.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from aqdetr_jax.losses.targets import Targets
from aqdetr_jax.ops.boxes import cxcywh_to_xyxy, elementwise_giou


def dense_assignment(centres: Array, targets: Targets, cell: Array, radius: float = 1.5) -> Array:
    """Which target each cell is responsible for: centre sampling, smallest box wins.

    Args:
      centres: cell centres (x, y) in [0, 1] of the image, float32 [B, S, 2].
      targets: ground truth, [B, T].
      cell: (width, height) of each cell in the same units, [B, S, 2].
      radius: a cell is positive within this many cells of the box centre, and inside the box.

    Returns:
      int32 [B, S]: target index, or -1 for background.
    """
    box = targets.boxes[:, None]  # [B, 1, T, 4]
    offset = jnp.abs(centres[:, :, None] - box[..., :2])
    size = cell[:, :, None]
    # A box smaller than a cell may contain no cell centre: half a cell always reaches one.
    inside = jnp.all(offset < jnp.maximum(box[..., 2:] / 2, size / 2), axis=-1)
    near = jnp.all(offset < radius * size, axis=-1)
    positive = inside & near & targets.valid[:, None]
    area = jnp.where(positive, box[..., 2] * box[..., 3], jnp.inf)
    best = jnp.argmin(area, axis=-1)
    return jnp.where(jnp.any(positive, axis=-1), best, -1).astype(jnp.int32)


def dense_loss(
    logits: Array,
    boxes: Array,
    cells_valid: Array,
    matched: Array,
    targets: Targets,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    l1: float = 5.0,
    giou: float = 2.0,
) -> tuple[Array, dict[str, Array]]:
    """Focal classification of every real cell; L1 and GIoU of the positive ones.

    Args:
      logits: float32 [B, S, C], one sigmoid per class.
      boxes: (cx, cy, w, h) in [0, 1], float32 [B, S, 4].
      cells_valid: bool [B, S], False for padding.
      matched: int32 [B, S], see ``dense_assignment``.
      targets: ground truth [B, T].
      alpha: weight of positives in the focal loss.
      gamma: its focusing exponent.
      l1: weight of the L1 term.
      giou: weight of the GIoU term.

    Returns:
      (loss, its unweighted terms ``loss_ce``, ``loss_bbox``, ``loss_giou``).
    """
    positive = matched >= 0
    index = jnp.maximum(matched, 0)
    label = jnp.take_along_axis(targets.labels, index, axis=1)
    target_box = jnp.take_along_axis(targets.boxes, index[..., None], axis=1)
    count = jnp.maximum(jnp.sum(positive), 1).astype(jnp.float32)

    onehot = jax.nn.one_hot(label, logits.shape[-1]) * positive[..., None]
    p = jax.nn.sigmoid(logits)
    cross = -(onehot * jax.nn.log_sigmoid(logits) + (1 - onehot) * jax.nn.log_sigmoid(-logits))
    p_true = p * onehot + (1 - p) * (1 - onehot)
    weight = alpha * onehot + (1 - alpha) * (1 - onehot)
    focal = jnp.where(cells_valid[..., None], weight * (1 - p_true) ** gamma * cross, 0)
    distance = jnp.sum(jnp.abs(boxes - target_box), axis=-1)
    overlap = elementwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_box))
    terms = {
        "loss_ce": jnp.sum(focal) / count,
        "loss_bbox": jnp.sum(jnp.where(positive, distance, 0)) / count,
        "loss_giou": jnp.sum(jnp.where(positive, 1 - overlap, 0)) / count,
    }
    return terms["loss_ce"] + l1 * terms["loss_bbox"] + giou * terms["loss_giou"], terms
