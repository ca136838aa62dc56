"""Multi-scale deformable attention with quantized products, maps returned."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from aqdetr_jax.models import grid_use
from aqdetr_jax.models.attention import float_maps, merge_heads, row_sum
from aqdetr_jax.models.layers import FLOAT, DistributionAlignment
from aqdetr_jax.models.quantized import (
    QDense,
    activation_quantizer,
    bits_of,
    capturing,
    module_path,
    observing,
)
from aqdetr_jax.ops import deformable, deformable_kernel
from aqdetr_jax.ops.deformable import LevelShapes, Sampling
from aqdetr_jax.quant.contractions import MixSamples
from aqdetr_jax.quant.policy import Policy
from aqdetr_jax.quant.product import quantized_product
from aqdetr_jax.quant.quantizer import Quantizer
from aqdetr_jax.quant.record import OpRecord, record
from aqdetr_jax.quant.spec import ALIGNMENT

MIXED = "mixed"
"""Name of the attention's output before its last layer, for policies of ``jax.checkpoint``."""


class DeformableMaps(NamedTuple):
    """What the distillation and the pictures may look at.

    Attributes:
      scores: [B, M, Q, L * K] float32, before the softmax over levels and points.
      probabilities: [B, M, Q, L * K], before their own quantizer.
      locations: [B, Q, M, L, K, 2] where values are sampled, (x, y) in units of the level's grid.
      sizes: [L, 2] (width, height) of the levels, in cells.
      output: [B, Q, d] the mixed samples, heads concatenated, before the output layer.
      float_path: the same of the same attention unquantized (``attention.float_maps``), or None.
    """

    scores: Array
    probabilities: Array
    locations: Array
    sizes: Array
    output: Array
    float_path: DeformableMaps | None = None

    def of_first(self, n: int) -> DeformableMaps:
        """The maps of the first ``n`` queries."""
        return self._replace(
            scores=self.scores[:, :, :n],
            probabilities=self.probabilities[:, :, :n],
            locations=self.locations[:, :n],
            output=self.output[:, :n],
            float_path=None if self.float_path is None else self.float_path.of_first(n),
        )


def offset_bias_init(heads: int, levels: int, points: int) -> nn.initializers.Initializer:
    """Head m looks in direction ``2 pi m / M``; point k is k + 1 cells away, on a square's edge."""
    angle = np.arange(heads) * (2 * math.pi / heads)
    direction = np.stack([np.cos(angle), np.sin(angle)], -1)
    direction /= np.abs(direction).max(-1, keepdims=True)
    grid = np.tile(direction[:, None, None], (1, levels, points, 1))
    grid *= np.arange(1, points + 1)[:, None]

    def init(_key, shape, dtype=jnp.float32):
        return jnp.asarray(grid.reshape(shape), dtype)

    return init


class DeformableAttention(nn.Module):
    """``sum_m W_m [ sum_l sum_k A_mlqk W'_m x^l(phi_l(p_q) + dp_mlqk) ]`` (Deformable DETR, eq. 3).

    The four projections are dense layers of the policy's bits; the attention weights A and the
    sampled values are quantized at its attention bits [ours]. Reference points and sampling
    locations are float: they are coordinates, not features.

    Attributes:
      dim: model width, M * D.
      heads: M.
      levels: L.
      points: K, samples of each head on each level.
      policy: bits by module path.
      sampling: how values are sampled, see ``ops.deformable``; "kernel" by one that sums up too
        (``ops.deformable_kernel``; interpreted where no TPU is). "auto" is the kernel on a TPU, if
        it can take the sizes.
      remat: samples again in the backward pass, so that no samples are kept; but for the kernel one
        head after the other, so that the samples of one head exist at a time.
      dtype: carrier dtype of products.
      co_attention: it is the decoder's, whose query the policy may want aligned: what offsets and
        weights are made of [ours; Q-DETR has no deformable attention].
    """

    dim: int
    heads: int
    levels: int
    points: int
    policy: Policy = Policy()
    sampling: Sampling = "auto"
    remat: bool = False
    dtype: DTypeLike = jnp.float32
    co_attention: bool = False

    @nn.compact
    def __call__(
        self,
        query: Array,
        reference: Array,
        memory: Array,
        valid: Array,
        shapes: LevelShapes,
        *,
        float_path: bool = False,
    ) -> tuple[Array, DeformableMaps]:
        """Attends.

        Args:
          query: [B, Q, d].
          reference: [B, Q, L, 2] points or [B, Q, L, 4] boxes, in units of the level's grid.
          memory: [B, S, d] tokens of all levels.
          valid: bool [B, S], False for padding, which is sampled as zero.
          shapes: (height, width) of each level.
          float_path: the maps of its float path too.

        Returns:
          ([B, Q, d], maps).
        """
        inputs = query, reference, memory, valid, shapes
        if self.dim % self.heads:
            raise ValueError(f"model width {self.dim} is not divisible by {self.heads} heads")
        if len(shapes) != self.levels:
            raise ValueError(f"{self.levels} levels expected, got {len(shapes)}")
        dense = functools.partial(QDense, policy=self.policy, dtype=self.dtype)
        zeros = nn.initializers.zeros
        heads, levels, points = self.heads, self.levels, self.points
        batch, queries, _ = query.shape
        if self.co_attention and self.policy.align_queries:
            query = DistributionAlignment(self.policy, name=ALIGNMENT)(query)

        values = dense(self.dim, name="value_proj")(memory)
        values = jnp.where(valid[..., None], values, 0.0).reshape(
            batch, -1, heads, self.dim // heads
        )
        offsets = dense(
            heads * levels * points * 2,
            kernel_init=zeros,
            bias_init=offset_bias_init(heads, levels, points),
            out_dtype=jnp.float32,  # coordinates
            name="sampling_offsets",
        )(query)
        locations = deformable.sampling_locations(
            reference, offsets.reshape(batch, queries, heads, levels, points, 2), shapes
        )
        scores = dense(
            heads * levels * points,
            kernel_init=zeros,
            out_dtype=jnp.float32,
            name="attention_weights",
        )(query)
        scores = scores.reshape(batch, queries, heads, levels * points).transpose(0, 2, 1, 3)
        core = SamplingCore(self.policy, self.sampling, self.remat, self.dtype, name="core")
        mixed, maps = core(values, locations, scores, shapes)
        mixed = dense(self.dim, name="output_proj")(mixed)
        if float_path:
            maps = maps._replace(float_path=float_maps(self, *inputs))
        return mixed, maps


class SamplingCore(nn.Module):
    """Softmax, sampling, and the product of weights and samples; owns their two step sizes."""

    policy: Policy = Policy()
    sampling: Sampling = "auto"
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, values: Array, locations: Array, scores: Array, shapes: LevelShapes
    ) -> tuple[Array, DeformableMaps]:
        """[B, S, M, D], [B, Q, M, L, K, 2], [B, M, Q, L * K] -> ([B, Q, M * D], maps)."""
        path, policy = module_path(self), self.policy
        probabilities = jax.nn.softmax(scores, axis=-1)

        def sample(values: Array, locations: Array) -> Array:
            return deformable.sample_values(
                values.astype(self.dtype), locations, shapes, self.sampling
            )

        # Only calibration, comparisons and health look at samples, at those of all heads.
        watched = observing(self) or capturing(self) or grid_use.watched(self)
        samples = (sample if watched else functools.partial(jax.eval_shape, sample))(
            values, locations
        )
        signed = policy.attention_spec(path, unsigned=False)
        unsigned = policy.attention_spec(path, unsigned=True)
        q_p = activation_quantizer(self, "probs", probabilities, unsigned, head_axis=1)
        q_s = activation_quantizer(self, "samples", samples, signed, head_axis=1)
        product = functools.partial(
            quantized_product,
            MixSamples(self.dtype, left_bits=bits_of(unsigned)),
            arithmetic=policy.arithmetic,
        )
        if watched:
            mixed = product(probabilities, samples, q_p, q_s)
        else:
            mixed = self._sample_and_mix(
                lambda v, x, p, qs: product(p, sample(v, x), *qs),
                (values, locations, probabilities),
                (q_p, q_s),
                shapes,
            )
        mixed = checkpoint_name(mixed, MIXED)
        if policy.renormalize and q_p is not None and policy.arithmetic != "observe":
            mixed = (mixed / row_sum(probabilities, q_p)).astype(self.dtype)
        rule = policy.rule_for(path)
        note = rule.note if rule else "no rule: float"
        macs = samples.size
        record(OpRecord(path, "softmax", note=FLOAT))
        # Four neighbours a sample; the multiply-adds are counted, as the papers do.
        record(OpRecord(path, "sampling", macs=4 * macs, note=FLOAT))
        heads = values.shape[2]
        record(
            OpRecord(path, "mix_samples", None, unsigned, signed, heads=heads, macs=macs, note=note)
        )
        mixed = merge_heads(mixed)
        sizes = jnp.array([(w, h) for h, w in shapes], jnp.float32)
        return mixed, DeformableMaps(scores, probabilities, locations, sizes, mixed)

    def _sample_and_mix(
        self,
        portable: Callable[..., Array],
        arrays: tuple[Array, Array, Array],
        quantizers: tuple[Quantizer | None, Quantizer | None],
        shapes: LevelShapes,
    ) -> Array:
        """By the kernel where it was asked for or is best, else ``portable(*arrays, quantizers)``.

        Args:
          portable: the product of weights and samples; of one head at a time with ``remat``.
          arrays: values [B, S, M, D], locations [B, Q, M, L, K, 2], probabilities [B, M, Q, L * K].
          quantizers: of probabilities and samples.
          shapes: sizes of the levels.

        Returns:
          [B, M, Q, D].
        """
        contraction = MixSamples(self.dtype, queries_last=True)
        arithmetic = self.policy.arithmetic

        def mix(weights, samples, quantizers):
            q_p, q_s = quantizers
            return quantized_product(contraction, weights, samples, q_p, q_s, arithmetic)

        def kernel(values, locations, probabilities, quantizers, interpret=False):
            return deformable_kernel.sample_and_mix(
                mix,
                values.astype(self.dtype),
                locations,
                probabilities,
                quantizers,
                shapes,
                interpret,
            )

        compiled: Callable[..., Array] = kernel
        interpreted: Callable[..., Array] = functools.partial(kernel, interpret=True)
        if self.remat:
            portable = functools.partial(head_by_head, portable)
            compiled, interpreted = jax.checkpoint(compiled), jax.checkpoint(interpreted)
        values, locations, _ = arrays
        misfit = deformable_kernel.misfit(values, locations, shapes)
        if self.sampling == "kernel":
            if misfit:
                raise ValueError(f"{module_path(self)}: sampling='kernel' cannot be: {misfit}")
            portable = interpreted
        elif self.sampling != "auto" or misfit or self.is_initializing():
            # (What initialises parameters is not split over devices.)
            return portable(*arrays, quantizers)
        return lax.platform_dependent(*arrays, quantizers, tpu=compiled, default=portable)


def head_by_head(
    mix: Callable[..., Array],
    values: Array,
    locations: Array,
    probabilities: Array,
    quantizers: Sequence[Quantizer | None] = (),
) -> Array:
    """``mix(values, locations, probabilities, quantizers)``, one head after the other.

    The backward pass computes ``mix`` again; in a loop, so that whatever a compiler reorders, the
    samples of one head exist at a time. Each image has its own copy of a head's steps, whose
    gradients are summed over the images after the loop: summed in it, they would be summed over all
    devices in every iteration.

    Args:
      mix: the product of one head, all arrays with one head: -> [B, 1, Q, D].
      values: [B, S, M, D].
      locations: [B, Q, M, L, K, 2].
      probabilities: [B, M, Q, L * K].
      quantizers: with steps of shape () or [M, 1, 1]; ``mix`` gets [B, 1, 1, 1].

    Returns:
      [B, M, Q, D].
    """
    batch, heads = probabilities.shape[:2]

    def of_each_image(x):
        return jnp.broadcast_to(jnp.reshape(x, (-1, 1, 1, 1, 1)), (heads, batch, 1, 1, 1))

    per_head = (
        jnp.moveaxis(values, 2, 0),
        jnp.moveaxis(locations, 2, 0),
        jnp.moveaxis(probabilities, 1, 0),
        jax.tree.map(of_each_image, quantizers),
    )

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(head):
        values, locations, probabilities, steps = head
        return mix(values[:, :, None], locations[:, :, None], probabilities[:, None], steps)[:, 0]

    return jnp.moveaxis(lax.map(one, per_head), 0, 1)
