"""Products by their geometry: what is multiplied and summed, on floats and on integers.

``quant.product`` puts operands on their grids and gives the gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from aqdetr_jax.ops import convolution
from aqdetr_jax.ops.mapping import axis_to_map

_FEW_BITS = 4
"""Bits of a grid on which bfloat16 sums suffice for a step's gradient."""


@dataclasses.dataclass(frozen=True)
class _Contraction:
    """A bilinear map of two operands, on floats and on integers.

    Attributes:
      dtype: dtype that carries the operands of the float arithmetic; sums are float32.
      out_dtype: dtype of the scaled product; None = ``dtype``.
      constant_left: the left operand is data (images): it gets no gradient, and its step's is
        taken without making one.
      left_bits: of the left operand's grid; None = unknown.
    """

    dtype: DTypeLike = jnp.float32
    out_dtype: DTypeLike | None = dataclasses.field(default=None, kw_only=True)
    constant_left: bool = dataclasses.field(default=False, kw_only=True)
    left_bits: int | None = dataclasses.field(default=None, kw_only=True)

    @property
    def sums_suffice(self) -> bool:
        """Whether the left step's gradient may be the difference of two sums, which is quicker.

        A cotangent's rounding error counts as often as the operand's code says there, and half a
        time at most in ``lsq.vjp``: with cotangents in bfloat16 that is noise, little on a grid of
        16 levels, and several percent on one of 256.
        """
        few = self.left_bits is not None and self.left_bits <= _FEW_BITS
        return few or jnp.dtype(self.dtype) == jnp.float32

    def contract(self, a: Array, b: Array, out_dtype: DTypeLike) -> Array:
        """The product of ``a`` and ``b``, summed and returned in ``out_dtype``."""
        raise NotImplementedError

    def floats(self, a: Array, b: Array) -> Array:
        """The product on floats (exact for integer-valued operands, see ``quant.product``)."""
        return self.contract(a.astype(self.dtype), b.astype(self.dtype), jnp.float32)

    def integers(self, a: Array, b: Array) -> Array:
        """The product on int32 operands with int32 sums."""
        return self.contract(a, b, jnp.int32)

    def scaled(self, total: Array, scale: Array | float) -> Array:
        """The product from its float32 sums."""
        return (total * scale).astype(self.out_dtype or self.dtype)

    def left_gradient(self, a: Array, b: Array, cotangent: Array) -> Array:
        """Cotangent of ``a`` in ``dtype``, which carries the operands too."""
        return self._pulled(
            lambda x: self.contract(x, b.astype(self.dtype), self.dtype), a, cotangent
        )

    def right_gradient(self, a: Array, b: Array, cotangent: Array) -> Array:
        """Cotangent of ``b``: a weight's in float32, the dtype of its sum, else in ``dtype``."""
        return self._pulled(
            lambda y: self.contract(a.astype(self.dtype), y, self.dtype), b, cotangent
        )

    def _pulled(self, product: Callable[[Array], Array], x: Array, cotangent: Array) -> Array:
        _, pullback = jax.vjp(product, x.astype(self.dtype))
        return pullback(cotangent.astype(self.dtype))[0]


def _as_written(x: Array) -> Array:
    """Attention maps [B, H, Q, K], on a TPU with Q and K innermost in memory; a gradient's too.

    Left alone, XLA puts the heads inside the queries, which pads a little less, and then copies
    every map before and after its products: half of an attention's memory traffic.
    """
    layout = Layout(tuple(range(x.ndim)))

    def constrained(x: Array) -> Array:
        return with_layout_constraint(x, layout)

    mesh = axis_to_map("data", x.shape[0])
    if mesh is not None:
        # On a torus of 4x4x4 chips and more the partitioner would gather the whole batch's maps.
        spec = PartitionSpec("data")
        constrained = jax.shard_map(
            constrained,
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
            axis_names={"data"},
            check_vma=False,
        )
    return lax.platform_dependent(x, tpu=constrained, default=lambda x: x)


@dataclasses.dataclass(frozen=True)
class Dense(_Contraction):
    """``x [..., K] . w [K, N] -> [..., N]``."""

    def contract(self, a: Array, b: Array, out_dtype: DTypeLike) -> Array:
        """See the class."""
        dims = (((a.ndim - 1,), (0,)), ((), ()))
        return lax.dot_general(a, b, dims, preferred_element_type=out_dtype)

    def right_gradient(self, a: Array, b: Array, cotangent: Array) -> Array:
        """See the class."""
        positions = tuple(range(a.ndim - 1))
        return lax.dot_general(
            a.astype(self.dtype),
            cotangent.astype(self.dtype),
            ((positions, positions), ((), ())),
            preferred_element_type=jnp.float32,
        )


@dataclasses.dataclass(frozen=True)
class Scores(_Contraction):
    """Attention scores, ``q [B, H, Q, D] . k [B, H, K, D] -> [B, H, Q, K]``."""

    def contract(self, a: Array, b: Array, out_dtype: DTypeLike) -> Array:
        """See the class."""
        dims = (((3,), (3,)), ((0, 1), (0, 1)))
        return _as_written(lax.dot_general(a, b, dims, preferred_element_type=out_dtype))


@dataclasses.dataclass(frozen=True)
class Mix(_Contraction):
    """Attention output, ``probabilities [B, H, Q, K] . v [B, H, K, D] -> [B, H, Q, D]``."""

    def contract(self, a: Array, b: Array, out_dtype: DTypeLike) -> Array:
        """See the class."""
        dims = (((3,), (2,)), ((0, 1), (0, 1)))
        return lax.dot_general(_as_written(a), b, dims, preferred_element_type=out_dtype)


@dataclasses.dataclass(frozen=True)
class MixSamples(_Contraction):
    """Deformable attention's output, ``weights [B, H, Q, P] . samples [B, H, Q, P * D]``.

    Every query has values of its own: ``out[.., d] = sum_p weights[.., p] samples[.., p, d]``. The
    points lie beside the channels so that a per-head step ``[H, 1, 1]`` fits operand and output.

    Attributes:
      queries_last: ``weights [P, Q] . samples [P * D, Q] -> [D, Q]`` instead, of one head: how a
        vector unit's lanes are filled.
    """

    queries_last: bool = False

    def contract(self, a: Array, b: Array, out_dtype: DTypeLike) -> Array:
        """See the class."""
        if self.queries_last:
            b = b.reshape(a.shape[0], -1, a.shape[1])
            return jnp.sum(a.astype(out_dtype)[:, None] * b.astype(out_dtype), axis=0)

        def summed(a, b):
            return jnp.sum(a.astype(out_dtype)[..., None] * b.astype(out_dtype), axis=3)

        def product(a, b):
            dims = (((3,), (3,)), ((0, 1, 2), (0, 1, 2)))
            return lax.dot_general(a, b, dims, preferred_element_type=out_dtype)

        # A product of one row with a small matrix, for every query: no matrix unit is filled. A CPU
        # has none, and its library's products are many times as fast as its sums over an axis.
        b = b.reshape(*a.shape, -1)
        return lax.platform_dependent(a, b, cpu=product, default=summed)

    def left_gradient(self, a: Array, b: Array, cotangent: Array) -> Array:
        """See the class. Outside a matrix unit only float32 sums are summed in float32."""
        cotangent = cotangent.astype(jnp.float32)
        if self.queries_last:
            b = b.astype(self.dtype).reshape(a.shape[0], -1, a.shape[1])
            return jnp.sum(b.astype(jnp.float32) * cotangent, axis=1)

        def summed(b, cotangent):
            return jnp.sum(b * cotangent[..., None, :], axis=-1)

        def product(b, cotangent):
            dims = (((3,), (4,)), ((0, 1, 2), (0, 1, 2)))
            return lax.dot_general(cotangent, b, dims)

        b = b.astype(self.dtype).reshape(*a.shape, -1).astype(jnp.float32)
        return lax.platform_dependent(b, cotangent, cpu=product, default=summed)

    def right_gradient(self, a: Array, b: Array, cotangent: Array) -> Array:
        """See the class; no sum."""
        a = a.astype(self.dtype).astype(jnp.float32)
        if self.queries_last:
            return (a[:, None] * cotangent).reshape(b.shape)
        return (a[..., None] * cotangent[..., None, :]).reshape(b.shape)


@dataclasses.dataclass(frozen=True)
class Conv(_Contraction):
    """2-d convolution, ``x [B, H, W, C] * w [kh, kw, C, N] -> [B, H', W', N]`` (NHWC, HWIO).

    Attributes:
      strides: (vertical, horizontal).
      padding: zeros added, ((top, bottom), (left, right)).
      dilation: kernel dilation.
      depthwise: every channel has a kernel of its own, ``w [kh, kw, 1, C]``.
    """

    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    depthwise: bool = False

    def contract(self, a: Array, b: Array, out_dtype: DTypeLike) -> Array:
        """See the class."""
        return convolution.convolve(self._window, a, b, out_dtype)

    def left_gradient(self, a: Array, b: Array, cotangent: Array) -> Array:
        """See the class."""
        b, cotangent = b.astype(self.dtype), cotangent.astype(self.dtype)
        return convolution.input_gradient(self._window, cotangent, b, a.shape, self.dtype)

    def right_gradient(self, a: Array, b: Array, cotangent: Array) -> Array:
        """See the class."""
        a, cotangent = a.astype(self.dtype), cotangent.astype(self.dtype)
        return convolution.kernel_gradient(self._window, a, cotangent, b.shape[:2], jnp.float32)

    @property
    def _window(self) -> convolution.Window:
        return convolution.Window(self.strides, self.padding, self.dilation, self.depthwise)

    def integers(self, a: Array, b: Array) -> Array:
        """The product on integers: a sum of matrix products over the kernel's taps.

        XLA's CPU integer convolution is tens of times slower than its float one; shifted integer
        matrix products are not, and are as exact. (Of a depthwise kernel products of arrays.)
        """
        if self.depthwise:
            return convolution.depthwise_taps(self._window, a, b, jnp.int32)
        kh, kw = b.shape[:2]
        (sh, sw), (dh, dw) = self.strides, self.dilation
        a = jnp.pad(a, ((0, 0), *self.padding, (0, 0)))
        out_h = (a.shape[1] - dh * (kh - 1) - 1) // sh + 1
        out_w = (a.shape[2] - dw * (kw - 1) - 1) // sw + 1
        total = jnp.zeros((a.shape[0], out_h, out_w, b.shape[3]), jnp.int32)
        dims = (((3,), (0,)), ((), ()))
        for i in range(kh):
            for j in range(kw):
                top, left = i * dh, j * dw
                tap = a[:, top : top + sh * (out_h - 1) + 1 : sh]
                tap = tap[:, :, left : left + sw * (out_w - 1) + 1 : sw]
                total += lax.dot_general(tap, b[i, j], dims, preferred_element_type=jnp.int32)
        return total


Contraction = Dense | Conv | Scores | Mix | MixSamples
