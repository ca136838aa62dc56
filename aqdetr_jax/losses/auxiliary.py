"""The detection loss with auxiliary queries.

AQ-DETR adds auxiliary queries to the decoder, in training only, because the number of matching
queries and of positive samples limits what quantized queries can represent [A]. How they are
matched is not published; as in H-DETR (arXiv:2207.13080) each target is matched to ``K`` of the
``M`` auxiliary queries [H].

Sources of the equations: [A] AQ-DETR's abstract, [H] H-DETR, [ours] our choice; see docs/method.md.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from aqdetr_jax.losses.criterion import LossWeights, cardinality_error, class_error, set_loss
from aqdetr_jax.losses.matching import QuerySet, match_sets
from aqdetr_jax.losses.targets import Predictions, Targets, positives, repeat_counts

__all__ = [
    "AuxiliaryLossConfig",
    "aqdetr_detection_loss",
    "combine_losses",
    "split_groups",
]


@dataclasses.dataclass(frozen=True)
class AuxiliaryLossConfig:
    """How the auxiliary queries are matched and weighted.

    Attributes:
        weight: λ_aux ≥ 0 [H: 1].
        repeats: K ≥ 1, queries matched to each target in each group [H: 6 with M = 1500; ours: 3
            with M = 300].
        groups: G ≥ 1; the M queries are G groups of M / G, each matched on its own. With
            ``repeats=1`` this is Group DETR (arXiv:2207.13085) [ours].
    """

    weight: float = 1.0
    repeats: int = 3
    groups: int = 1

    def __post_init__(self) -> None:
        if self.weight < 0 or self.repeats < 1 or self.groups < 1:
            raise ValueError(
                "AuxiliaryLossConfig needs weight >= 0, repeats >= 1 and groups >= 1, got "
                f"{self.weight}, {self.repeats} and {self.groups}"
            )


def split_groups(predictions: Predictions, groups: int) -> list[Predictions]:
    """Cuts the auxiliary queries into G groups of consecutive queries [ours, after Group DETR].

    Args:
        predictions: ``[L, B, M, ...]``.
        groups: G.

    Returns:
        G predictions ``[L, B, M / G, ...]``.

    Raises:
        ValueError: if G does not divide M.
    """
    num_queries = predictions.boxes.shape[-2]
    if num_queries % groups:
        raise ValueError(
            f"{num_queries} auxiliary queries cannot be cut into {groups} groups of equal size"
        )
    logits = jnp.split(predictions.logits, groups, axis=-2)
    boxes = jnp.split(predictions.boxes, groups, axis=-2)
    return [Predictions(*pair) for pair in zip(logits, boxes, strict=True)]


def combine_losses(object_loss: jax.Array, auxiliary_loss: jax.Array, weight: float) -> jax.Array:
    """``L = L_det(object queries) + λ_aux · L_det(auxiliary queries)`` [H, section 3.2]."""
    return object_loss + weight * auxiliary_loss


def aqdetr_detection_loss(
    object_predictions: Predictions,
    auxiliary_predictions: Predictions | None,
    targets: Targets,
    weights: LossWeights,
    auxiliary: AuxiliaryLossConfig,
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """Matches all query sets of all decoder layers in one solve and sums their set losses.

    * Object queries: one-to-one, as DETR [A, H].
    * Auxiliary queries: each target matched to K of them, per group [H]; K limited so that
      K·boxes ≤ M / G, image by image [ours]. Their loss is divided by their own number of repeated
      boxes [H].

    Args:
        object_predictions: ``[L, B, Q, ...]``.
        auxiliary_predictions: ``[L, B, M, ...]``, or None (evaluation, or no auxiliary queries).
        targets: ``[B, T, ...]``; of a part of a batch (``Targets.whole``) the loss, the terms and
          the diagnostics are the part's share: they add up to those of the batch.
        weights: of cost and loss.
        auxiliary: λ_aux, K, G.

    Returns:
        * the loss, float32 scalar;
        * its unweighted terms, float32 scalars: those of `set_loss` for the object queries, and the
          same with the prefix ``auxiliary_queries/``;
        * diagnostics without gradient: ``num_boxes`` and ``auxiliary_num_boxes`` (int32, positives
          per decoder layer in the global batch), ``class_error`` (fraction) and
          ``cardinality_error`` of the last layer's object queries, ``limited_images`` (int32,
          images with more targets than the queries can serve K times), ``replaced_costs`` (int32
          ``[B]``, non-finite costs per image), and ``matched`` (int32 ``[L, B, Q]``, target of each
          object query or -1).

        Entries of auxiliary queries are there only with auxiliary predictions.

    Raises:
        ValueError: if the groups do not divide the auxiliary queries.
    """
    object_predictions = Predictions(*object_predictions)
    counts, limited = repeat_counts(targets.valid, 1, object_predictions.boxes.shape[-2])
    sets = [QuerySet(object_predictions, counts)]
    if auxiliary_predictions is not None:
        auxiliary_predictions = Predictions(*auxiliary_predictions)
        parts = split_groups(auxiliary_predictions, auxiliary.groups)
        counts, auxiliary_limited = repeat_counts(
            targets.valid, auxiliary.repeats, parts[0].boxes.shape[-2]
        )
        limited = limited | auxiliary_limited
        sets += [QuerySet(part, counts) for part in parts]
    matched, replaced = match_sets(sets, targets, weights)

    num_boxes = positives(targets, 1, object_predictions.boxes.shape[-2])
    loss, terms = set_loss(object_predictions, targets, matched[0], weights, num_boxes)
    last = object_predictions.logits[-1]
    diagnostics = {
        "num_boxes": jnp.sum(matched[0][-1] >= 0),
        "class_error": class_error(last, targets.labels, matched[0][-1], num_boxes),
        "cardinality_error": cardinality_error(last, targets.valid, weights.kind),
        "limited_images": jnp.sum(limited, dtype=jnp.int32),
        "replaced_costs": replaced,
        "matched": matched[0],
    }
    if auxiliary_predictions is not None:
        auxiliary_matched = jnp.concatenate(matched[1:], axis=-1)
        num_boxes = positives(
            targets, auxiliary.repeats, parts[0].boxes.shape[-2], auxiliary.groups
        )
        auxiliary_loss, auxiliary_terms = set_loss(
            auxiliary_predictions, targets, auxiliary_matched, weights, num_boxes
        )
        loss = combine_losses(loss, auxiliary_loss, auxiliary.weight)
        terms |= {f"auxiliary_queries/{name}": value for name, value in auxiliary_terms.items()}
        diagnostics["auxiliary_num_boxes"] = jnp.sum(auxiliary_matched[-1] >= 0)
    return loss, terms, diagnostics
