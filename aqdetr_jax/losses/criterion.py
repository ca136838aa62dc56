"""The set criterion of DETR, one pure function per term.

Everything is seen from the queries: ``matched [L, B, Q]`` names the target of each query or -1. In
this form a target that is matched to several queries needs no copies, and nothing is scattered.

A term is divided by a count over the whole batch, of which the predictions may be a part
(``Targets.whole``). Under a global-view ``jit`` it is a plain sum, and no collective is written
here.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from aqdetr_jax.losses.targets import Predictions, Targets
from aqdetr_jax.ops import boxes as box_ops

__all__ = [
    "LossWeights",
    "box_l1_loss",
    "cardinality_error",
    "class_error",
    "focal_loss",
    "giou_loss",
    "set_loss",
    "softmax_loss",
]


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the set loss and of the matching cost.

    The defaults are DETR's; Deformable DETR uses ``LossWeights(cls=2.0, kind="focal")``.

    Attributes:
        cls: class term.
        l1: L1 distance of the boxes.
        giou: generalised IoU.
        eos: weight of the class "no object" in the softmax cross entropy.
        kind: ``softmax`` (C + 1 logits) or ``focal`` (C logits, sigmoid).
        focal_alpha: weight of positives in the focal loss, in [0, 1].
        focal_gamma: focusing exponent.
    """

    cls: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    eos: float = 0.1
    kind: Literal["softmax", "focal"] = "softmax"
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in ("softmax", "focal"):
            raise ValueError(f"LossWeights.kind must be 'softmax' or 'focal', got {self.kind!r}")
        for name in ("cls", "l1", "giou", "eos", "focal_gamma"):
            weight = getattr(self, name)
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {weight}")
        if not 0 <= self.focal_alpha <= 1:
            raise ValueError(f"focal_alpha must be in [0, 1], got {self.focal_alpha}")


def _take_targets(values: jax.Array, matched: jax.Array) -> jax.Array:
    """``values [B, T, ...]`` of each query's target; of the first slot where there is none."""
    index = jnp.maximum(matched, 0)
    take = jax.vmap(
        lambda row, i: jnp.take(row, i, axis=0, mode="clip"), in_axes=(0, 1), out_axes=1
    )
    return take(values, index)


def softmax_loss(
    logits: jax.Array,
    labels: jax.Array,
    matched: jax.Array,
    eos: float,
    total_weight: jax.Array | None = None,
) -> jax.Array:
    """Weighted cross entropy (DETR, equation 2; mean as in torch's weighted ``CrossEntropyLoss``).

    ``Σ w(y) · -log p(y) / Σ w(y)`` over all queries of the batch, ``w`` = ``eos`` for "no object"
    and 1 otherwise.

    Args:
        logits: float32 ``[L, B, Q, C + 1]``.
        labels: int32 ``[B, T]``.
        matched: int32 ``[L, B, Q]``.
        eos: weight of "no object".
        total_weight: float32 scalar, ``Σ w(y)`` of the whole batch where this is a part of it.

    Returns:
        float32 ``[L]``.
    """
    no_object = logits.shape[-1] - 1
    wanted = jnp.where(matched >= 0, _take_targets(labels, matched), no_object)
    log_probability = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_probability, wanted[..., None], axis=-1, mode="clip")[..., 0]
    weight = jnp.where(matched >= 0, 1.0, eos)
    total = jnp.sum(weight, axis=(1, 2)) if total_weight is None else total_weight
    return -jnp.sum(weight * picked, axis=(1, 2)) / jnp.maximum(total, 1e-8)


def focal_loss(
    logits: jax.Array,
    labels: jax.Array,
    matched: jax.Array,
    num_boxes: jax.Array,
    alpha: float,
    gamma: float,
) -> jax.Array:
    """Sigmoid focal loss (Lin et al., arXiv:1708.02002, equation 5), summed over all logits.

    Args:
        logits: float32 ``[L, B, Q, C]``.
        labels: int32 ``[B, T]``.
        matched: int32 ``[L, B, Q]``.
        num_boxes: float32 scalar, the normaliser.
        alpha: weight of positives.
        gamma: focusing exponent.

    Returns:
        float32 ``[L]``.
    """
    classes = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    label = jnp.where(matched >= 0, _take_targets(labels, matched), -1)
    positive = label[..., None] == classes
    signed = jnp.where(positive, logits, -logits)  # the logit of being right
    scale = jnp.where(positive, alpha, 1.0 - alpha)
    # p ** gamma as an exponential: its gradient is finite where p underflows, for every gamma.
    wrong = jnp.exp(gamma * jax.nn.log_sigmoid(-signed))
    loss = -scale * wrong * jax.nn.log_sigmoid(signed)
    return jnp.sum(loss, axis=(1, 2, 3)) / num_boxes


def box_l1_loss(
    boxes: jax.Array, target_boxes: jax.Array, matched: jax.Array, num_boxes: jax.Array
) -> jax.Array:
    """L1 distance of matched boxes, summed over coordinates (DETR, section 3.1).

    Args:
        boxes: float32 ``[L, B, Q, 4]``, ``cxcywh``.
        target_boxes: float32 ``[B, T, 4]``, ``cxcywh``.
        matched: int32 ``[L, B, Q]``.
        num_boxes: float32 scalar, the normaliser.

    Returns:
        float32 ``[L]``.
    """
    distance = jnp.sum(jnp.abs(boxes - _take_targets(target_boxes, matched)), axis=-1)
    return jnp.sum(jnp.where(matched >= 0, distance, 0.0), axis=(1, 2)) / num_boxes


def giou_loss(
    boxes: jax.Array, target_boxes: jax.Array, matched: jax.Array, num_boxes: jax.Array
) -> jax.Array:
    """``1 - GIoU`` of matched boxes (DETR, section 3.1); arguments as in `box_l1_loss`."""
    wanted = box_ops.cxcywh_to_xyxy(_take_targets(target_boxes, matched))
    giou = box_ops.elementwise_giou(box_ops.cxcywh_to_xyxy(boxes), wanted)
    return jnp.sum(jnp.where(matched >= 0, 1.0 - giou, 0.0), axis=(1, 2)) / num_boxes


def cardinality_error(
    logits: jax.Array, valid: jax.Array, kind: Literal["softmax", "focal"] = "softmax"
) -> jax.Array:
    """Mean over images of |number of predicted objects - number of targets|; no gradient.

    A query predicts an object if its best class is not "no object" (softmax) or if its best class
    has a probability above one half (focal).

    Args:
        logits: float ``[B, Q, K]``.
        valid: bool ``[B, T]``.
        kind: as in `LossWeights`.

    Returns:
        float32 scalar.
    """
    logits = lax.stop_gradient(jnp.asarray(logits, jnp.float32))
    if kind == "softmax":
        is_object = jnp.argmax(logits, axis=-1) != logits.shape[-1] - 1
    else:
        is_object = jnp.max(logits, axis=-1) > 0.0
    predicted = jnp.sum(is_object, axis=-1)
    wanted = jnp.sum(valid, axis=-1)
    return jnp.mean(jnp.abs(predicted - wanted).astype(jnp.float32))


def class_error(
    logits: jax.Array, labels: jax.Array, matched: jax.Array, num_boxes: jax.Array | None = None
) -> jax.Array:
    """Fraction of matched queries whose best class is not that of their target; no gradient.

    Args:
        logits: float ``[B, Q, K]``.
        labels: int32 ``[B, T]``.
        matched: int32 ``[B, Q]``.
        num_boxes: int32 scalar, matched queries of the whole batch where this is a part of it.

    Returns:
        float32 scalar in [0, 1]; 0 if nothing is matched.
    """
    best = jnp.argmax(lax.stop_gradient(logits), axis=-1)
    wrong = (matched >= 0) & (best != _take_targets(labels, matched[None])[0])
    count = jnp.sum(matched >= 0) if num_boxes is None else num_boxes
    return jnp.sum(wrong) / jnp.maximum(count, 1).astype(jnp.float32)


def set_loss(
    predictions: Predictions,
    targets: Targets,
    matched: jax.Array,
    weights: LossWeights,
    num_boxes: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The set loss with auxiliary decoding losses: the weighted terms, summed over decoder layers.

    Box terms (and the focal term) are divided by the number of matched queries of a layer in the
    global batch, at least 1. Every layer has the same number: that of the (repeated) boxes.

    Args:
        predictions: ``[L, B, Q, ...]``; computed in float32.
        targets: ``[B, T, ...]``.
        matched: int32 ``[L, B, Q]``, the target of each query or -1.
        weights: of the terms.
        num_boxes: int32 scalar, that number where the predictions are of a part of the batch; see
            `aqdetr_jax.losses.targets.positives`.

    Returns:
        The loss, float32 scalar, and its unweighted terms, float32 scalars: ``loss_ce``,
        ``loss_bbox``, ``loss_giou`` of the last layer, and ``aux_layers/loss_ce``, … of the sum of
        the others (0 with one layer).
    """
    logits = jnp.asarray(predictions.logits, jnp.float32)
    boxes = jnp.asarray(predictions.boxes, jnp.float32)
    target_boxes = jnp.asarray(targets.boxes, jnp.float32)
    positives = (jnp.sum(matched[-1] >= 0) if num_boxes is None else num_boxes).astype(jnp.float32)
    divisor = jnp.maximum(positives, 1.0)
    if weights.kind == "softmax":
        total = None
        if targets.whole is not None:
            queries = len(targets.whole) * matched.shape[-1]
            total = positives + weights.eos * (queries - positives)
        ce = softmax_loss(logits, targets.labels, matched, weights.eos, total)
    else:
        ce = focal_loss(
            logits, targets.labels, matched, divisor, weights.focal_alpha, weights.focal_gamma
        )
    per_layer = {
        "loss_ce": ce,
        "loss_bbox": box_l1_loss(boxes, target_boxes, matched, divisor),
        "loss_giou": giou_loss(boxes, target_boxes, matched, divisor),
    }
    scale = {"loss_ce": weights.cls, "loss_bbox": weights.l1, "loss_giou": weights.giou}
    total = jnp.float32(0.0)
    for name, value in per_layer.items():
        total = total + scale[name] * jnp.sum(value)
    terms = {name: value[-1] for name, value in per_layer.items()}
    terms |= {f"aux_layers/{name}": jnp.sum(value[:-1]) for name, value in per_layer.items()}
    return total, terms
