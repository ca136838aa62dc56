"""Q-DETR's foreground-aware query matching and the distillation over it: one function per equation.

Q-DETR (Xu et al., CVPR 2023) distils what the decoder's queries take from the image, the
co-attended features D, and of those the ones that look at an object [Q, eq. 10-15]. Student and
teacher have queries of their own order, so each foreground query of the student is matched with the
teacher's query whose box is most like its own.

Boxes are ``cxcywh``; only the student's features get a gradient. Sources are marked as in
docs/method.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from aqdetr_jax.ops.boxes import cxcywh_to_xyxy, pairwise_giou

__all__ = [
    "best_overlaps",
    "foreground_distillation",
    "foreground_loss",
    "foreground_queries",
    "matched_queries",
    "target_overlaps",
]

OVERLAP, DISTANCE = 2.0, 5.0
"""Weights of GIoU and of the L1 distance in the match of two queries [Q, eq. 12]."""


def target_overlaps(target_boxes: Array, boxes: Array) -> Array:
    """``GIoU(b_i, b_j^S)`` of every target and every query of the student [Q, eq. 10].

    Args:
      target_boxes: [B, T, 4].
      boxes: [B, Q, 4].

    Returns:
      float32 [B, T, Q].
    """
    return pairwise_giou(cxcywh_to_xyxy(target_boxes), cxcywh_to_xyxy(boxes))


def best_overlaps(overlaps: Array) -> Array:
    """``G_i = max_j GIoU(b_i, b_j^S)`` [Q, eq. 10]: [B, T, Q] -> [B, T]."""
    return jnp.max(overlaps, axis=-1)


def foreground_queries(overlaps: Array, valid: Array, tau: float) -> Array:
    """Queries j with ``GIoU(b_i, b_j^S) > τ G_i`` for a target i [Q, eq. 11].

    With τ = 1 none is left, with τ = 0 all that overlap with an object. A target that no query
    overlaps with (``G_i <= 0``) has none.

    Args:
      overlaps: from ``target_overlaps``, [B, T, Q].
      valid: bool [B, T], False = padding.
      tau: τ in [0, 1].

    Returns:
      bool [B, Q].
    """
    near = overlaps > tau * best_overlaps(overlaps)[..., None]
    return jnp.any(near & valid[..., None], axis=1)


def matched_queries(student_boxes: Array, teacher_boxes: Array) -> Array:
    """``argmax_k 2 GIoU(b_j^S, b_k^T) - 5 |b_j^S - b_k^T|_1`` of every j [Q, eq. 12].

    Args:
      student_boxes: [B, Q, 4].
      teacher_boxes: [B, Q', 4].

    Returns:
      int32 [B, Q], the first of several that are best.
    """
    giou = pairwise_giou(cxcywh_to_xyxy(student_boxes), cxcywh_to_xyxy(teacher_boxes))
    distance = jnp.sum(jnp.abs(student_boxes[:, :, None] - teacher_boxes[:, None]), axis=-1)
    return jnp.argmax(OVERLAP * giou - DISTANCE * distance, axis=-1).astype(jnp.int32)


def foreground_loss(student: Array, teacher: Array, kept: Array) -> Array:
    """``mean ‖D_j^S - D_k(j)^T‖₂`` over the foreground queries [Q, eq. 14].

    The mean is an image's, and then that of the images, so that parts of a batch add up to it
    [ours]; an image without foreground queries counts as 0.

    Args:
      student: co-attended features [B, Q, d].
      teacher: those of the matched queries, [B, Q, d].
      kept: bool [B, Q], foreground queries.

    Returns:
      float32 scalar.
    """
    difference = student.astype(jnp.float32) - lax.stop_gradient(teacher).astype(jnp.float32)
    square = jnp.sum(jnp.square(difference), axis=-1)
    # The root has no gradient at 0.
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0)) * (square > 0)
    count = jnp.maximum(jnp.sum(kept, axis=-1), 1)
    return jnp.mean(jnp.sum(norm * kept, axis=-1) / count)


def foreground_distillation(
    student_boxes: Array,
    teacher_boxes: Array,
    student_features: Array,
    teacher_features: Array,
    target_boxes: Array,
    valid: Array,
    tau: float,
) -> Array:
    """``L_DRD`` of ``L = L_det + λ L_DRD`` [Q, eq. 15].

    Args:
      student_boxes: [B, Q, 4].
      teacher_boxes: [B, Q', 4].
      student_features: [B, Q, d], co-attended.
      teacher_features: [B, Q', d].
      target_boxes: [B, T, 4].
      valid: bool [B, T], False = padding.
      tau: τ of ``foreground_queries``.

    Returns:
      float32 scalar.
    """
    student_boxes, teacher_boxes, target_boxes = (
        lax.stop_gradient(boxes).astype(jnp.float32)
        for boxes in (student_boxes, teacher_boxes, target_boxes)
    )
    kept = foreground_queries(target_overlaps(target_boxes, student_boxes), valid, tau)
    match = matched_queries(student_boxes, teacher_boxes)
    take = jax.vmap(lambda rows, index: rows[index])
    return foreground_loss(student_features, take(teacher_features, match), kept)
