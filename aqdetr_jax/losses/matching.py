"""Bipartite matching of predictions to targets.

The cost is DETR's (arXiv:2005.12872, section 3.1; focal class cost: Deformable DETR,
arXiv:2010.04159, appendix A.4). All decoder layers of all query sets are solved by one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from aqdetr_jax.losses.criterion import LossWeights
from aqdetr_jax.losses.targets import Predictions, Targets
from aqdetr_jax.ops import boxes as box_ops
from aqdetr_jax.ops.assignment import assign_sharded

__all__ = ["QuerySet", "box_cost", "class_cost", "match_sets", "matching_cost"]


class QuerySet(NamedTuple):
    """A set of queries that is matched on its own.

    Attributes:
        predictions: ``[L, B, Q, ...]``.
        repeats: int32 ``[B, T]``, queries wanted by each target (0 = padding); at most ``Q`` in
            total per image, see `aqdetr_jax.losses.targets.repeat_counts`.
    """

    predictions: Predictions
    repeats: jax.Array


def class_cost(logits: jax.Array, labels: jax.Array, weights: LossWeights) -> jax.Array:
    """Cost of giving each query the class of each target.

    ``softmax``: ``-p(class)``. ``focal``: ``α(1-p)^γ(-log p) - (1-α)p^γ(-log(1-p))``, the focal
    loss of the class being present minus that of its being absent.

    Args:
        logits: float32 ``[..., Q, K]``, ``K = C + 1`` (softmax) or ``C`` (focal).
        labels: int32 ``[..., T]``, broadcastable leading axes.
        weights: gives the kind, ``α`` and ``γ``.

    Returns:
        float32 ``[..., T, Q]``, unweighted.
    """
    if weights.kind == "softmax":
        table = -jax.nn.softmax(logits, axis=-1)
    else:
        probability = jax.nn.sigmoid(logits)
        alpha, gamma = weights.focal_alpha, weights.focal_gamma
        present = alpha * (1.0 - probability) ** gamma * -jax.nn.log_sigmoid(logits)
        absent = (1.0 - alpha) * probability**gamma * -jax.nn.log_sigmoid(-logits)
        table = present - absent
    table = jnp.swapaxes(table, -1, -2)  # [..., K, Q]: a label selects one contiguous row
    labels = jnp.broadcast_to(labels, (*table.shape[:-2], labels.shape[-1]))
    # Padding may carry any label; real labels are checked where data is read.
    return jnp.take_along_axis(table, labels[..., None], axis=-2, mode="clip")


def box_cost(boxes: jax.Array, target_boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """L1 distance and negative GIoU of all pairs.

    Args:
        boxes: float32 ``[..., Q, 4]``, ``cxcywh``.
        target_boxes: float32 ``[..., T, 4]``, ``cxcywh``, broadcastable leading axes.

    Returns:
        Two float32 ``[..., T, Q]``, unweighted.
    """
    a, b = target_boxes[..., :, None, :], boxes[..., None, :, :]
    distance = jnp.abs(a[..., 0] - b[..., 0])
    for i in range(1, 4):  # an innermost axis of 4 would waste the vector lanes
        distance = distance + jnp.abs(a[..., i] - b[..., i])
    giou = box_ops.pairwise_giou(
        box_ops.cxcywh_to_xyxy(target_boxes), box_ops.cxcywh_to_xyxy(boxes)
    )
    return distance, -giou


def matching_cost(predictions: Predictions, targets: Targets, weights: LossWeights) -> jax.Array:
    """The matching cost of every target and query: weighted class + L1 - GIoU.

    Args:
        predictions: ``[..., Q, ...]``; computed in float32, no gradient flows.
        targets: ``[..., T, ...]``, broadcastable leading axes. Padded rows hold some number.
        weights: the same weights as in the loss, as in both official settings.

    Returns:
        float32 ``[..., T, Q]``; not finite where the predictions are not.
    """
    logits = lax.stop_gradient(jnp.asarray(predictions.logits, jnp.float32))
    boxes = lax.stop_gradient(jnp.asarray(predictions.boxes, jnp.float32))
    l1, negative_giou = box_cost(boxes, jnp.asarray(targets.boxes, jnp.float32))
    cost = weights.cls * class_cost(logits, targets.labels, weights)
    return cost + weights.l1 * l1 + weights.giou * negative_giou


def match_sets(
    sets: Sequence[QuerySet], targets: Targets, weights: LossWeights
) -> tuple[list[jax.Array], jax.Array]:
    """Matches several query sets, all decoder layers, in one solve.

    The sets may differ in their number of queries: the cost is padded with queries that do not
    exist for the solver. Under ``jax.set_mesh`` with an axis ``data`` each device solves its own
    images (see `aqdetr_jax.ops.assignment.assign_sharded`).

    Args:
        sets: at least one; all with the same ``L``, ``B`` and targets.
        targets: ``[B, T, ...]``.
        weights: costs and kind.

    Returns:
        For each set int32 ``[L, B, Q]``, the target of each query or -1; and int32 ``[B]``, the
        number of non-finite costs that were replaced in each image, over all layers and sets.
        Anything but zero means that the predictions are broken and must be reported.
    """
    widths = [query_set.predictions.boxes.shape[-2] for query_set in sets]
    widest = max(widths)
    # Images first: a TPU solves neighbouring problems in one block, which takes as long as its
    # slowest, and the problems of an image are about equally hard.
    per_image = jax.tree.map(lambda x: x[:, None], targets)
    costs = []
    for query_set, width in zip(sets, widths, strict=True):
        predictions = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), query_set.predictions)
        cost = matching_cost(predictions, per_image, weights)
        costs.append(jnp.pad(cost, [(0, 0)] * (cost.ndim - 1) + [(0, widest - width)]))
    supply = jnp.stack([query_set.repeats for query_set in sets], axis=1)[:, :, None]
    num_columns = jnp.asarray(widths, jnp.int32)[:, None]
    owner, replaced = assign_sharded(
        jnp.stack(costs, axis=1), supply, num_columns, batch_axis=0
    )  # [B, S, L, Q], [B, S, L]
    matched = [jnp.swapaxes(owner[:, i, :, :width], 0, 1) for i, width in enumerate(widths)]
    return matched, jnp.sum(replaced, axis=(1, 2))
