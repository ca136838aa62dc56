"""Learned step size quantization (LSQ, Esser et al., ICLR 2020): one function per equation.

Symbols follow the paper: ``v`` the real value, ``s`` the step size, ``Qn``/``Qp`` the magnitudes of
the smallest and the largest integer level, ``v_bar`` the integer code, ``v_hat`` the value on the
grid. Here the levels are given as ``lower = -Qn`` and ``upper = Qp`` so that a grid with a zero
point (``lower = -z``, ``upper = 2^b - 1 - z``) is the same code.

This module imports no neural network library. ``v`` and its cotangent may be bfloat16; everything
else is float32, what is computed of them too. ``s``, ``lower`` and ``upper`` broadcast against
``v``.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

LARGEST_BIAS = 2.0**31 - 128
"""The largest float32 that is an int32."""


def codes(v: Array, s: Array, lower: Array | float, upper: Array | float) -> Array:
    """Integer codes ``v_bar = round(clip(v / s, -Qn, Qp))`` (LSQ eq. 1), as floats.

    Rounds half to even. Not differentiable: ``fake_quantize`` and ``quantized_product`` carry
    the gradients.

    Args:
      v: values, any shape.
      s: positive step size, broadcastable to ``v``.
      lower: smallest code.
      upper: largest code.

    Returns:
      Array of ``v``'s shape holding integers in ``[lower, upper]``.
    """
    return jnp.round(jnp.clip(v / s, lower, upper))


def inside(v: Array, s: Array, lower: Array | float, upper: Array | float) -> Array:
    """Whether ``-Qn < v / s < Qp``: the range test of LSQ eq. 3, taken before rounding."""
    ratio = v / s
    return (ratio > lower) & (ratio < upper)


def step_derivative(v: Array, s: Array, lower: Array | float, upper: Array | float) -> Array:
    """``d v_hat / d s`` (LSQ eq. 3): ``-v/s + round(v/s)`` inside, ``-Qn``/``Qp`` outside."""
    ratio = v / s
    code = jnp.round(jnp.clip(ratio, lower, upper))
    return jnp.where((ratio > lower) & (ratio < upper), code - ratio, code)


def gradient_scale(count: int, upper: int) -> float:
    """The step's gradient factor ``g = 1 / sqrt(N Qp)`` (LSQ section 2.2).

    Args:
      count: N, the weights that share the step, or the activation elements of one example that
        share it (the batch is never counted, so the factor does not depend on the batch size).
      upper: Qp.
    """
    return 1.0 / math.sqrt(max(count, 1) * max(upper, 1))


def initial_step(v: Array, upper: int, axes: tuple[int, ...] | None = None) -> Array:
    """LSQ's initial step ``2 mean|v| / sqrt(Qp)``, the mean taken over ``axes`` (dims kept)."""
    mean = jnp.mean(jnp.abs(v), axis=axes, keepdims=axes is not None)
    return 2.0 * mean / math.sqrt(max(upper, 1))


def sum_to_shape(x: Array, shape: tuple[int, ...]) -> Array:
    """Sums ``x`` over the axes along which an array of ``shape`` was broadcast to ``x.shape``."""
    lead = x.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(
        lead + i for i, n in enumerate(shape) if n == 1 and x.shape[lead + i] != 1
    )
    return jnp.sum(x, axis=axes, keepdims=False).reshape(shape) if axes else x.reshape(shape)


def vjp(
    v: Array,
    s: Array,
    lower: Array | float,
    upper: Array | float,
    g: Array | float,
    cotangent: Array,
) -> tuple[Array, Array]:
    """LSQ's backward pass: cotangents of ``v`` and ``s`` from the cotangent of ``v_hat``.

    ``dL/dv = dL/dv_hat`` inside the range and 0 outside; ``dL/ds = g * sum dL/dv_hat * dv_hat/ds``.

    Args:
      v: values.
      s: step, broadcastable to ``v``.
      lower: smallest code.
      upper: largest code.
      g: gradient factor of the step, see ``gradient_scale``.
      cotangent: dL/dv_hat, of ``v``'s shape.

    Returns:
      (dL/dv of ``v``'s shape and dtype, dL/ds of ``s``'s shape).
    """
    dv = jnp.where(inside(v, s, lower, upper), cotangent, 0).astype(v.dtype)
    ds = sum_to_shape(cotangent * step_derivative(v, s, lower, upper), jnp.shape(s))
    return dv, g * ds


def vjp_of_total(
    v: Array,
    s: Array,
    lower: Array | float,
    upper: Array | float,
    g: Array | float,
    cotangent: Array,
    total: Array,
) -> tuple[Array, Array]:
    """``vjp`` where ``total = sum dL/dv_hat . v_hat`` is known already.

    Of eq. 3, ``s dv_hat/ds`` is ``v_hat - v`` inside the range and ``v_hat`` outside, where
    ``dL/dv = 0``: so ``dL/ds = g / s (total - sum dL/dv . v)``, from the gradient that is made
    anyway, and what is made of ``dL/dv_hat`` need not be kept. The two sums nearly cancel: a
    rounding error of a cotangent counts ``v / s`` times here, and ``round(v / s) - v / s`` times
    in ``vjp``.

    Args:
      v: values.
      s: one step for all of them.
      lower: smallest code.
      upper: largest code.
      g: gradient factor of the step.
      cotangent: dL/dv_hat, of ``v``'s shape.
      total: scalar.

    Returns:
      As ``vjp``.
    """
    dv = jnp.where(inside(v, s, lower, upper), cotangent, 0).astype(v.dtype)
    moved = jnp.sum(dv.astype(jnp.float32) * v.astype(jnp.float32))
    return dv, g / s * (total - moved)


@jax.custom_vjp
def whole_offset(offset: Array, least: Array | float, most: Array | float) -> Array:
    """The whole number of steps by which LSQ+ moves a grid; the gradient passes unchanged.

    LSQ+ (Bhalgat et al., 2020), as Q-DETR's eq. 1-2 write it, has an offset z that is learned:
    ``v_bar = round(clip((v - z) / s, -Qn, Qp))`` and ``v_hat = s v_bar + z``. With ``z = s n`` and
    n whole [ours] this is the grid of all functions here with its ends moved by n,
    ``v_hat = s round(clip(v / s, n - Qn, n + Qp))``: an offset needs no second sum beside a
    product's, and 0 is on the grid. n is learned as a real number, in steps, so that one rate
    fits steps of any size.

    Args:
      offset: float32, real.
      least: the smallest n with which 0 is still a code, ``-Qp``.
      most: the largest, ``Qn``.

    Returns:
      float32 whole numbers in ``[least, most]``. Beyond them only gradients pass whose descent
      leads back.
    """
    return jnp.round(jnp.clip(offset, least, most))


def _whole_offset_fwd(offset, least, most):
    return whole_offset(offset, least, most), (offset, least, most)


def _whole_offset_bwd(residuals, cotangent):
    offset, least, most = residuals
    stuck = ((offset <= least) & (cotangent > 0)) | ((offset >= most) & (cotangent < 0))
    return jnp.where(stuck, 0.0, cotangent), jnp.zeros_like(least), jnp.zeros_like(most)


whole_offset.defvjp(_whole_offset_fwd, _whole_offset_bwd)


def offset_vjp(
    v: Array,
    s: Array,
    lower: Array | float,
    upper: Array | float,
    g: Array | float,
    cotangent: Array,
) -> Array:
    """Cotangent of the number n of steps by which a grid's ends were moved.

    LSQ+'s ``d v_hat / d z`` is 0 inside the range and 1 outside, and ``z = s n``.

    Args:
      v: values.
      s: step, broadcastable to ``v``.
      lower: smallest code of the moved grid.
      upper: its largest.
      g: gradient factor of the step, n's too.
      cotangent: dL/dv_hat, of ``v``'s shape.

    Returns:
      dL/dn of ``s``'s shape, ``g * s * sum dL/dv_hat`` over what lies outside.
    """
    outside = jnp.where(inside(v, s, lower, upper), 0, cotangent).astype(jnp.float32)
    return g * sum_to_shape(outside * s, jnp.shape(s))


@jax.custom_vjp
def fake_quantize(
    v: Array, s: Array, lower: Array | float, upper: Array | float, g: Array | float = 1.0
) -> Array:
    """``v_hat = v_bar * s`` (LSQ eq. 2) with LSQ's gradients for ``v`` and ``s``.

    Args:
      v: values, any shape.
      s: positive step, broadcastable to ``v``.
      lower: smallest code (no gradient).
      upper: largest code (no gradient).
      g: factor on the step's gradient, see ``gradient_scale`` (no gradient).

    Returns:
      Array of ``v``'s shape with at most ``upper - lower + 1`` distinct values per step.
    """
    return codes(v, s, lower, upper) * s


def _fake_quantize_fwd(v, s, lower, upper, g=1.0):
    return codes(v, s, lower, upper) * s, (v, s, lower, upper, g)


def _fake_quantize_bwd(residuals, cotangent):
    v, s, lower, upper, g = residuals
    dv, ds = vjp(v, s, lower, upper, g, cotangent)
    return dv, ds, *(jnp.zeros_like(x) for x in (lower, upper, g))


fake_quantize.defvjp(_fake_quantize_fwd, _fake_quantize_bwd)


def bias_codes(bias: Array, unit: Array) -> Array:
    """The int32 biases ``round(b / u)`` of integer sums, as float32.

    Rounds half to even; what no int32 holds becomes ``LARGEST_BIAS``. Not differentiable.

    Args:
      bias: float32 [N].
      unit: float32 [N], the value of a one in the sums, of either sign; where it is 0, sums are
        worth nothing and the code is 0.

    Returns:
      float32 [N] integers.
    """
    ratio = bias / jnp.where(unit == 0, jnp.inf, unit)
    return jnp.clip(jnp.round(ratio), -LARGEST_BIAS, LARGEST_BIAS)


def round_bias(bias: Array, unit: Array) -> Array:
    """The values ``bias_codes(b, u) u`` that integer sums can add; the gradient passes unchanged.

    Args:
      bias: float32 [N].
      unit: float32 [N] (no gradient); where it is 0 the channel is its bias, which stays.

    Returns:
      float32 [N].
    """
    unit = lax.stop_gradient(unit)
    rounded = jnp.where(unit == 0, bias, bias_codes(bias, unit) * unit)
    # Exactly the rounded value: the difference is 0.
    return lax.stop_gradient(rounded) + (bias - lax.stop_gradient(bias))
