"""The loss of the encoder's proposals in two-stage Deformable DETR (arXiv:2010.04159, A.4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aqdetr_jax.losses.criterion import LossWeights, set_loss
from aqdetr_jax.losses.matching import QuerySet, match_sets
from aqdetr_jax.losses.targets import Predictions, Targets, positives, repeat_counts

__all__ = ["proposal_loss"]


def proposal_loss(
    predictions: Predictions, targets: Targets, weights: LossWeights
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """The set loss of the tokens' boxes, every target being of the first class.

    A proposal says whether there is an object, not which: the first class is trained to be that
    score, and is what the best proposals are chosen by. Matched once, not for the auxiliary queries
    again [H].

    Args:
        predictions: ``[1, B, S, ...]``.
        targets: ``[B, T, ...]``.
        weights: as for the decoder.

    Returns:
        The loss, float32 scalar; its unweighted terms ``proposals/loss_ce``, …; and int32 ``[B]``,
        non-finite costs that were replaced.
    """
    anything = targets._replace(labels=jnp.zeros_like(targets.labels))
    counts, _ = repeat_counts(targets.valid, 1, predictions.boxes.shape[-2])
    matched, replaced = match_sets([QuerySet(predictions, counts)], anything, weights)
    num_boxes = positives(anything, 1, predictions.boxes.shape[-2])
    loss, terms = set_loss(predictions, anything, matched[0], weights, num_boxes)
    kept = {f"proposals/{k}": v for k, v in terms.items() if not k.startswith("aux_layers/")}
    return loss, kept, replaced
