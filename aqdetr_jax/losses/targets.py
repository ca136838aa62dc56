"""What the detection losses compare: padded targets, predictions, and repeat counts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Predictions", "Targets", "positives", "repeat_counts"]


class Targets(NamedTuple):
    """Ground truth of a batch, padded to ``T`` slots per image.

    Attributes:
        boxes: float32 ``[B, T, 4]``, ``cxcywh`` divided by the image's own size; 0 in padding.
        labels: int32 ``[B, T]``, contiguous classes from 0; 0 in padding.
        valid: bool ``[B, T]``; True for real boxes, in any order.
        whole: bool ``[B', T]``; ``valid`` of the whole batch, where this is a part of it. What a
            loss is divided by is counted there, so that the losses of all parts add up to that of
            the whole. None: this is the whole.
    """

    boxes: jax.Array
    labels: jax.Array
    valid: jax.Array
    whole: jax.Array | None = None


class Predictions(NamedTuple):
    """What the heads say for one set of queries, after every decoder layer.

    Attributes:
        logits: float ``[L, B, Q, C + 1]``, the last class is "no object" (softmax losses); or
            ``[L, B, Q, C]`` (sigmoid losses). The last layer is the output.
        boxes: float ``[L, B, Q, 4]``, ``cxcywh`` in [0, 1].
    """

    logits: jax.Array
    boxes: jax.Array


def positives(targets: Targets, repeats: int, num_queries: int, groups: int = 1) -> jax.Array:
    """Queries that are matched after each decoder layer in the whole batch, int32 scalar.

    Args:
        targets: of a batch or of a part of it.
        repeats: K, as in `repeat_counts`.
        num_queries: M of a group.
        groups: G, sets of queries that are each matched on their own.
    """
    valid = targets.valid if targets.whole is None else targets.whole
    return groups * jnp.sum(repeat_counts(valid, repeats, num_queries)[0])


def repeat_counts(valid: jax.Array, repeats: int, num_queries: int) -> tuple[jax.Array, jax.Array]:
    """How many queries each target is matched to.

    Every real target gets ``K = repeats`` queries [H]. An image with ``n`` targets can serve that
    only while ``K·n ≤ M``, ``M`` being the number of queries; with more targets it uses
    ``⌊M / n⌋`` queries for each, and with ``n > M`` one for each of the first ``M`` [ours].

    The repetition is a count per target, not ``K`` copies of it: padding stays where it is, and
    cost and losses keep their size.

    Args:
        valid: bool ``[B, T]``.
        repeats: ``K`` ≥ 1.
        num_queries: ``M`` ≥ 1.

    Returns:
        Counts int32 ``[B, T]`` (0 in padding) and ``limited`` bool ``[B]``, the images where the
        limit bites.

    Raises:
        ValueError: if ``repeats`` or ``num_queries`` is below 1.
    """
    if repeats < 1 or num_queries < 1:
        raise ValueError(
            f"repeats and num_queries must be at least 1, got {repeats} and {num_queries}"
        )
    rank = jnp.cumsum(valid, axis=-1, dtype=jnp.int32)
    count = rank[..., -1:] if valid.shape[-1] else jnp.zeros((*valid.shape[:-1], 1), jnp.int32)
    each = jnp.clip(num_queries // jnp.maximum(count, 1), 1, repeats)
    counts = jnp.where(valid & (rank <= num_queries), each, 0)
    return counts.astype(jnp.int32), (count * repeats > num_queries)[..., 0]
