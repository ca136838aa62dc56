"""Multi-head attention with quantized products (Q-MHSA and Q-MHCA), maps returned."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from aqdetr_jax.models.dropout import dropout
from aqdetr_jax.models.layers import FLOAT, DistributionAlignment
from aqdetr_jax.models.quantized import QDense, activation_quantizer, bits_of, module_path
from aqdetr_jax.ops.activations import softmax
from aqdetr_jax.quant.contractions import Mix, Scores
from aqdetr_jax.quant.policy import Policy
from aqdetr_jax.quant.product import quantized_product
from aqdetr_jax.quant.quantizer import Quantizer
from aqdetr_jax.quant.record import FLOAT_PATH, OpRecord, record, recorded_under

MASKED = -1e9
"""Score of a padded key: finite, so that a row without any valid key stays finite."""


class AttentionMaps(NamedTuple):
    """What the distillation may look at, in the layer's own terms.

    All of them in the carrier dtype of the activations.

    Attributes:
      scores: [B, H, Q, K], ``q k^T / sqrt(d)`` with padded keys at ``MASKED``.
      probabilities: [B, H, Q, K] softmax of the scores, before the probabilities' own quantizer.
      output: [B, Q, H*D] the mixed values ``A v``, heads concatenated, before the output layer.
      float_path: the same of the same attention unquantized (``float_maps``), or None.
    """

    scores: Array
    probabilities: Array
    output: Array
    float_path: AttentionMaps | None = None

    def of_first(self, n: int) -> AttentionMaps:
        """The maps of the first ``n`` queries."""
        return AttentionMaps(
            self.scores[:, :, :n],
            self.probabilities[:, :, :n],
            self.output[:, :n],
            None if self.float_path is None else self.float_path.of_first(n),
        )


def float_maps(attention: nn.Module, *inputs: Any, **options: Any) -> Any:
    """The maps of an attention with the same weights on the same input, unquantized.

    Targets of a distillation: no gradient, no dropout.

    Args:
      attention: bound, of any policy.
      *inputs: as it takes them.
      **options: likewise.

    Returns:
      The maps that it returns.
    """
    plain = attention.clone(policy=Policy(), parent=None)
    params = lax.stop_gradient(attention.variables["params"])
    with recorded_under(f"{FLOAT_PATH}/{module_path(attention)}"):
        maps = plain.apply({"params": params}, *inputs, **options)[1]
    return lax.stop_gradient(maps)


def split_heads(x: Array, heads: int) -> Array:
    """[B, S, H*D] -> [B, H, S, D]."""
    b, s, d = x.shape
    return x.reshape(b, s, heads, d // heads).transpose(0, 2, 1, 3)


def merge_heads(x: Array) -> Array:
    """[B, H, S, D] -> [B, S, H*D]."""
    b, h, s, d = x.shape
    return x.transpose(0, 2, 1, 3).reshape(b, s, h * d)


def packed_projection_init(packs: int) -> nn.initializers.Initializer:
    """Xavier-uniform of one [d, packs*d] matrix, of which this kernel is a d x d part.

    torch keeps q, k and v in one matrix, whose fan-out is three times as large; separate Xavier
    fans start the attention too sharp and slow DETR down.
    """
    return nn.initializers.variance_scaling(2.0 / (1 + packs), "fan_avg", "uniform")


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention; every product in it quantized as the policy says.

    ``A = softmax(Q(q) Q(k)^T / sqrt(d))``, ``D = Q(A) Q(v)`` (Q-DETR section 2; AQ-DETR's Q-MHSA
    and Q-MHCA differ in their query inputs only).

    Attributes:
      dim: model width, H*D.
      heads: H.
      policy: bits by module path.
      dropout: rate on the attention probabilities (training only).
      dtype: carrier dtype of products.
      co_attention: it is the decoder's, whose query the policy may want aligned.
    """

    dim: int
    heads: int
    policy: Policy = Policy()
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    co_attention: bool = False

    def setup(self):
        """Declares the four projections and the core."""
        if self.dim % self.heads:
            raise ValueError(f"model width {self.dim} is not divisible by {self.heads} heads")
        dense = functools.partial(
            QDense,
            self.dim,
            policy=self.policy,
            dtype=self.dtype,
            kernel_init=packed_projection_init(3),
        )
        self.q_proj = dense()
        self.k_proj = dense()
        self.v_proj = dense()
        self.out_proj = QDense(self.dim, policy=self.policy, dtype=self.dtype)
        self.core = AttentionCore(self.policy, self.dropout, self.dtype)
        if self.co_attention and self.policy.align_queries:
            self.alignment = DistributionAlignment(self.policy)

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        key_valid: Array | None = None,
        *,
        train: bool = False,
        query_sets: tuple[int, ...] | None = None,
        float_path: bool = False,
    ) -> tuple[Array, AttentionMaps]:
        """Attends.

        Args:
          query: [B, Q, dim].
          key: [B, K, dim].
          value: [B, K, dim].
          key_valid: bool [B, K], False for padding; None = all valid.
          train: dropout on.
          query_sets: for self-attention of several query sets kept apart from one another: their
            sizes, summing to Q = K. Each set attends to itself only; no (Q x K) block is computed.
          float_path: the maps of its float path too.

        Returns:
          ([B, Q, dim], maps of the first set).
        """
        q = split_heads(self.q_proj(query), self.heads)
        if self.co_attention and self.policy.align_queries:
            q = self.alignment(q)
        k = split_heads(self.k_proj(key), self.heads)
        v = split_heads(self.v_proj(value), self.heads)
        if query_sets is None or len(query_sets) == 1:
            mixed, maps = self.core(q, k, v, key_valid, train=train)
        else:
            mixed, maps = self._apart(q, k, v, query_sets, train)
            # The maps are the first set's, and so are those of the float path.
            query, key, value = (x[:, : query_sets[0]] for x in (query, key, value))
        mixed = self.out_proj(mixed)
        if float_path:
            maps = maps._replace(float_path=float_maps(self, query, key, value, key_valid))
        return mixed, maps

    def _apart(self, q, k, v, query_sets, train):
        """One attention per query set; equal neighbours are folded into the batch."""
        if sum(query_sets) != q.shape[2] or q.shape[2] != k.shape[2]:
            raise ValueError(f"query sets {query_sets} do not sum to {q.shape[2]} queries")
        outputs, first, start = [], None, 0
        for size, count in _runs(query_sets):
            stop = start + size * count
            q_set, k_set, v_set = (_fold(x[:, :, start:stop], count) for x in (q, k, v))
            mixed, maps = self.core(q_set, k_set, v_set, None, train=train)
            outputs.append(mixed.reshape(q.shape[0], count * size, -1))
            first = maps if first is None else first
            start = stop
        return jnp.concatenate(outputs, axis=1), first


def _runs(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Run lengths, the first set always alone: (100, 100, 100) -> [(100, 1), (100, 2)]."""
    runs: list[tuple[int, int]] = [(sizes[0], 1)]
    for i, size in enumerate(sizes[1:]):
        if i and runs[-1][0] == size:
            runs[-1] = (size, runs[-1][1] + 1)
        else:
            runs.append((size, 1))
    return runs


def _fold(x: Array, count: int) -> Array:
    """[B, H, count*S, D] -> [B*count, H, S, D]."""
    b, h, s, d = x.shape
    x = x.reshape(b, h, count, s // count, d).transpose(0, 2, 1, 3, 4)
    return x.reshape(b * count, h, s // count, d)


class AttentionCore(nn.Module):
    """The two attention products and the softmax between them; owns their four step sizes."""

    policy: Policy = Policy()
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, q: Array, k: Array, v: Array, key_valid: Array | None, *, train: bool
    ) -> tuple[Array, AttentionMaps]:
        """[B, H, Q, D], [B, H, K, D], [B, H, K, D] -> ([B, Q, H*D], maps)."""
        path = module_path(self)
        policy = self.policy
        signed = policy.attention_spec(path, unsigned=False)
        unsigned = policy.attention_spec(path, unsigned=True)
        q_q = activation_quantizer(self, "q", q, signed, head_axis=1)
        q_k = activation_quantizer(self, "k", k, signed, head_axis=1)
        product = Scores(self.dtype, left_bits=bits_of(signed))
        scores = quantized_product(product, q, k, q_q, q_k, policy.arithmetic)
        scores = (scores.astype(jnp.float32) / math.sqrt(q.shape[-1])).astype(self.dtype)
        if key_valid is not None:
            scores = jnp.where(key_valid[:, None, None, :], scores, MASKED)
        probabilities = softmax(scores)
        # Dropout acts before the quantizer, so that what is mixed is always on the grid.
        weights = dropout(self, probabilities, self.dropout, train=train)
        q_p = activation_quantizer(self, "probs", weights, unsigned, head_axis=1)
        q_v = activation_quantizer(self, "v", v, signed, head_axis=1)
        mix = Mix(self.dtype, left_bits=bits_of(unsigned))
        mixed = quantized_product(mix, weights, v, q_p, q_v, policy.arithmetic)
        if policy.renormalize and q_p is not None and policy.arithmetic != "observe":
            mixed = (mixed / row_sum(weights, q_p)).astype(self.dtype)
        rule = policy.rule_for(path)
        note = rule.note if rule else "no rule: float"
        macs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
        row = functools.partial(OpRecord, path, heads=q.shape[1], macs=macs, note=note)
        record(row("scores", activation=signed, other=signed))
        record(OpRecord(path, "softmax", note=FLOAT))
        record(row("mix", activation=unsigned, other=signed))
        mixed = merge_heads(mixed)
        return mixed, AttentionMaps(scores, probabilities, mixed)


def row_sum(weights: Array, quantizer: Quantizer) -> Array:
    """Sum of the quantized probabilities of each query, float32 [B, H, Q, 1], at least one level.

    A column of ones beside the values: an integer sum and one scale, exact in any order, so that
    both arithmetics agree here too.
    """
    ones = jnp.ones((*weights.shape[:2], weights.shape[3], 1), jnp.float32)
    total = quantized_product(Mix(), weights, ones, quantizer, None)
    return jnp.where(total > 0, total, jax.lax.stop_gradient(quantizer.step))
