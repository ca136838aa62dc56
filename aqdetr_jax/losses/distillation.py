"""Layer-by-layer attention distillation: one pure function per equation.

AQ-DETR distils, in each encoder layer, the quantized self-attention from the attention of the
full-precision model [A]. The loss itself is not public; what follows is marked as in
docs/method.md: [A] AQ-DETR's abstract, [ours] our choice.

All functions take the teacher's array first, stop its gradient, and are zero when student and
teacher agree. Scores are ``q k^T / sqrt(d)`` with padded keys at a large negative value, so that
their probability is zero in both and they never count. Maps may be bfloat16; what is computed of
them is float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

Kind = Literal["kl", "mse", "logits", "output"]

SCORE_FLOOR = -1e8
"""Scores below this belong to padded keys."""


@dataclasses.dataclass(frozen=True)
class DistillationWeights:
    """What is distilled, and how much.

    Attributes:
      encoder: λ_dist, weight of the encoder's self-attention term [A].
      decoder_self: weight of the same term on the decoder's self-attention of the object queries
        [ours].
      decoder_cross: weight of the term on the decoder's cross-attention of the object queries
        [ours].
      locations: weight of the distance between sampling locations beside the "kl" or "mse" of a
        deformable attention's weights, which say nothing of where they look [ours].
      foreground: λ of Q-DETR's distillation of its foreground queries' co-attended features
        (``losses.foreground``; 2.5 there), 0 = none.
      tau: τ, how much of an object's best overlap makes a query of the foreground [Q].
      kind: "kl" on the probabilities (default), "mse" on them, "logits" (mean squared difference of
        the centred scores) or "output" (mean squared difference of A v, relative to the teacher's
        mean square) [ours].
    """

    encoder: float = 0.0
    decoder_self: float = 0.0
    decoder_cross: float = 0.0
    locations: float = 0.1
    foreground: float = 0.0
    tau: float = 0.6
    kind: Kind = "kl"

    def __post_init__(self):
        weights = self.encoder, self.decoder_self, self.decoder_cross, self.foreground
        if min(*weights, self.locations) < 0:
            raise ValueError(f"distillation weights must not be negative: {self}")
        if self.kind not in ("kl", "mse", "logits", "output"):
            raise ValueError(
                f"distillation kind {self.kind!r}: one of 'kl', 'mse', 'logits', 'output'"
            )

        if not 0 <= self.tau <= 1:
            raise ValueError(f"distillation tau must lie in [0, 1], got {self.tau}")

    @property
    def maps(self) -> bool:
        """Whether attention maps are compared."""
        return self.encoder + self.decoder_self + self.decoder_cross > 0

    @property
    def active(self) -> bool:
        """Whether any term is used, that is, whether there is something to distil from."""
        return self.maps or self.foreground > 0


def masked_mean(values: Array, query_valid: Array | None) -> Array:
    """Mean of ``values`` [B, H, Q] over batch, heads and valid queries (bool [B, Q] or None)."""
    if query_valid is None:
        return jnp.mean(values)
    weight = query_valid[:, None, :].astype(jnp.float32)
    total = jnp.sum(values * weight)
    return total / jnp.maximum(jnp.sum(weight) * values.shape[1], 1.0)


def attention_kl(teacher: Array, student: Array, query_valid: Array | None = None) -> Array:
    """``mean over batch, heads, valid queries of KL(A_T || A_S)`` from scores [ours].

    Args:
      teacher: scores [B, H, Q, K].
      student: scores [B, H, Q, K] of the quantized q k^T, before the probabilities' own quantizer,
        so that the gradient is exact.
      query_valid: bool [B, Q], False = padding, None = all valid.

    Returns:
      float32 scalar >= 0.
    """
    return masked_mean(_row_kl(lax.stop_gradient(teacher), student), query_valid)


@jax.custom_vjp
def _row_kl(teacher: Array, student: Array) -> Array:
    """``KL(softmax(teacher) || softmax(student))`` over the last axis, float32.

    Its gradient is ``softmax(student) - softmax(teacher)``: made of the scores themselves, so that
    no map is kept beside them.
    """
    return _row_kl_fwd(teacher, student)[0]


def _row_kl_fwd(teacher, student):
    t, s = teacher.astype(jnp.float32), student.astype(jnp.float32)
    norm_t, norm_s = (jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in (t, s))
    log_t, log_s = t - norm_t, s - norm_s
    kl = jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)
    return kl, (teacher, student, norm_t, norm_s)


def _row_kl_bwd(residuals, cotangent):
    teacher, student, norm_t, norm_s = residuals
    p_t, p_s = jnp.exp(teacher - norm_t), jnp.exp(student - norm_s)  # float32, as the norms are
    gradient = (p_s - p_t) * cotangent[..., None]
    return jnp.zeros_like(teacher), gradient.astype(student.dtype)


_row_kl.defvjp(_row_kl_fwd, _row_kl_bwd)


def attention_mse(teacher: Array, student: Array, query_valid: Array | None = None) -> Array:
    """``mean of sum_k (A_T - A_S)^2`` over batch, heads, valid queries, from scores [ours]."""
    a_t = jax.nn.softmax(lax.stop_gradient(teacher).astype(jnp.float32), axis=-1)
    a_s = jax.nn.softmax(student.astype(jnp.float32), axis=-1)
    return masked_mean(jnp.sum(jnp.square(a_t - a_s), axis=-1), query_valid)


def score_mse(teacher: Array, student: Array, query_valid: Array | None = None) -> Array:
    """Mean squared difference of the scores, each row centred over its real keys [ours].

    Softmax does not see a constant added to a row, so the row means are removed first.
    """
    teacher = lax.stop_gradient(teacher).astype(jnp.float32)
    student = student.astype(jnp.float32)
    real = teacher > SCORE_FLOOR
    count = jnp.maximum(jnp.sum(real, axis=-1, keepdims=True), 1)

    def centred(x: Array) -> Array:
        x = jnp.where(real, x, 0.0)
        return jnp.where(real, x - jnp.sum(x, axis=-1, keepdims=True) / count, 0.0)

    difference = jnp.square(centred(teacher) - centred(student))
    return masked_mean(jnp.sum(difference, axis=-1) / count[..., 0], query_valid)


def output_mse(teacher: Array, student: Array, query_valid: Array | None = None) -> Array:
    """Mean squared difference of the mixed values ``D = A v`` [B, Q, d], over the teacher's [ours].

    Relative to the teacher's mean square, so that layers of different scale weigh alike.
    """
    teacher = lax.stop_gradient(teacher).astype(jnp.float32)
    difference = masked_mean(jnp.mean(jnp.square(teacher - student), -1)[:, None], query_valid)
    scale = masked_mean(jnp.mean(jnp.square(teacher), -1)[:, None], query_valid)
    return difference / jnp.maximum(scale, 1e-12)


def location_distance(
    teacher: Array,
    student: Array,
    weights: Array,
    sizes: Array,
    query_valid: Array | None = None,
) -> Array:
    """``mean over batch, heads, valid queries of sum_lk A_T |p_T - p_S|_1`` in cells [ours].

    A deformable attention's map is a set of (location, weight) pairs: where the teacher looks
    matters by how much it takes from there.

    Args:
      teacher: sampling locations [B, Q, M, L, K, 2] in units of the level's grid.
      student: the same.
      weights: the teacher's probabilities [B, M, Q, L * K].
      sizes: [L, 2] (width, height) of the levels, in cells.
      query_valid: bool [B, Q] or None.

    Returns:
      float32 scalar >= 0.
    """
    teacher, weights = lax.stop_gradient(teacher), lax.stop_gradient(weights)
    distance = jnp.sum(jnp.abs(teacher - student) * sizes[:, None], axis=-1)  # [B, Q, M, L, K]
    distance = distance.reshape(*distance.shape[:3], -1).transpose(0, 2, 1, 3)
    return masked_mean(jnp.sum(weights * distance, axis=-1), query_valid)


def map_kl(teacher: Array, student: Array, query_valid: Array | None = None) -> Array:
    """``KL(A_T || A_S)`` of dense maps that need not sum to 1 over the cells [ours].

    For the maps that deformable attention induces (``ops.deformable.attention_map``): what falls
    outside the grid is one more cell. Costs a map for every query; small levels, and checks.

    Args:
      teacher: [B, M, Q, cells] >= 0, sums at most 1.
      student: the same.
      query_valid: bool [B, Q] or None.

    Returns:
      float32 scalar >= 0.
    """

    def closed(x: Array) -> Array:
        x = jnp.concatenate([x, 1 - jnp.sum(x, axis=-1, keepdims=True)], axis=-1)
        return jnp.maximum(x, 1e-8)

    t, s = closed(lax.stop_gradient(teacher)), closed(student)
    return masked_mean(jnp.sum(t * (jnp.log(t) - jnp.log(s)), axis=-1), query_valid)


def layer_loss(
    kind: Kind, teacher, student, query_valid: Array | None = None, locations: float = 0.0
) -> Array:
    """The chosen term for one layer.

    Args:
      kind: which term.
      teacher: maps with ``scores`` and ``output``; a deformable attention's with ``locations``,
        ``probabilities`` and ``sizes`` too.
      student: the same.
      query_valid: bool [B, Q] or None.
      locations: weight of ``location_distance`` beside "kl" and "mse" of a deformable attention.
    """
    if kind == "logits":
        return score_mse(teacher.scores, student.scores, query_valid)
    if kind == "output":
        return output_mse(teacher.output, student.output, query_valid)
    term = attention_kl if kind == "kl" else attention_mse
    loss = term(teacher.scores, student.scores, query_valid)
    if locations and hasattr(teacher, "locations"):
        loss = loss + locations * location_distance(
            teacher.locations,
            student.locations,
            teacher.probabilities,
            teacher.sizes,
            query_valid,
        )
    return loss


def layer_by_layer_loss(
    kind: Kind,
    teacher: Sequence,
    student: Sequence,
    query_valid: Array | None = None,
    locations: float = 0.0,
) -> Array:
    """``L_dist = 1/L sum over layers`` of the layer's term [A: each encoder layer; ours: the mean].

    Args:
      kind: which term.
      teacher: attention maps per layer, see ``layer_loss``.
      student: the same, as many.
      query_valid: bool [B, Q] or None.
      locations: see ``layer_loss``.

    Returns:
      float32 scalar.

    Raises:
      ValueError: different numbers of layers.
    """
    if len(teacher) != len(student):
        raise ValueError(
            f"layer-by-layer distillation needs as many teacher layers as student layers, "
            f"got {len(teacher)} and {len(student)}"
        )
    terms = [
        layer_loss(kind, t, s, query_valid, locations)
        for t, s in zip(teacher, student, strict=True)
    ]
    return sum(terms, jnp.float32(0.0)) / len(terms)
