"""One op, two arithmetics: products of quantized operands as exact floats or as real integers.

A product of two quantized operands is ``s_a s_b * (a_bar . b_bar)``: integers are multiplied and
summed, and one float scale is applied to the sum. Training computes ``a_bar . b_bar`` on
integer-valued floats. Those sums are exact while they stay below 2^24 in magnitude, whatever the
order of summation, and codes of up to 8 bits are exact in bfloat16 too; so the training forward and
the integer forward (int8 operands, int32 sums) are the same numbers, bit for bit.

The scale is applied in float32; what is rounded to the dtype that carries activations is the scaled
product, never the integer sums.

The gradient is LSQ's: with ``a_hat = s_a a_bar``, dL/da_hat is the transposed product of the
cotangent with ``b_hat``, from which ``lsq.vjp`` gives the gradients of ``a`` and of ``s_a``. (Here
bfloat16 operands do round: the values on the grid, as they do the cotangent.) Cotangents of
activations stay in their dtype; weights' and steps' gradients are summed in float32.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from aqdetr_jax.quant import lsq
from aqdetr_jax.quant.contractions import Contraction
from aqdetr_jax.quant.quantizer import Quantizer

Arithmetic = Literal["fake", "integer", "observe"]


def quantized_product(
    contraction: Contraction,
    a: Array,
    b: Array,
    quantizer_a: Quantizer | None,
    quantizer_b: Quantizer | None,
    arithmetic: Arithmetic = "fake",
) -> Array:
    """``contraction(a_hat, b_hat)`` for quantized operands, with LSQ gradients.

    Args:
      contraction: which product (``Dense``, ``Conv``, ``Scores``, ``Mix``, ``MixSamples``).
      a: left operand, float.
      b: right operand, float.
      quantizer_a: how ``a`` is put on its grid; None leaves it float.
      quantizer_b: the same for ``b``.
      arithmetic: "fake" (integer-valued floats, differentiable), "integer" (real integers, int32
        sums; not differentiable; products with a float operand stay floats) or "observe" (no
        quantization: the float product, used by calibration).

    Returns:
      The product in ``contraction.out_dtype``. "fake" and "integer" agree bit for bit while sums
      stay below 2^24.
    """
    if arithmetic == "observe":
        return _fake_product(contraction, a, b, None, None)
    if arithmetic == "integer" and quantizer_a is not None and quantizer_b is not None:
        code_a, code_b = quantizer_a.codes(a), quantizer_b.codes(b)
        total = contraction.integers(code_a.astype(jnp.int32), code_b.astype(jnp.int32))
        return contraction.scaled(total.astype(jnp.float32), quantizer_a.step * quantizer_b.step)
    return _fake_product(contraction, a, b, quantizer_a, quantizer_b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fake_product(contraction, a, b, quantizer_a, quantizer_b):
    code_a, step_a = _encode(a, quantizer_a)
    code_b, step_b = _encode(b, quantizer_b)
    return contraction.scaled(contraction.floats(code_a, code_b), step_a * step_b)


def _encode(x: Array, quantizer: Quantizer | None) -> tuple[Array, Array | float]:
    if quantizer is None:
        return x, 1.0
    return quantizer.codes(x), quantizer.step


def _fake_product_fwd(contraction, a, b, quantizer_a, quantizer_b):
    out = _fake_product(contraction, a, b, quantizer_a, quantizer_b)
    return out, (a, b, quantizer_a, quantizer_b)


def _fake_product_bwd(contraction, residuals, cotangent):
    a, b, quantizer_a, quantizer_b = residuals
    code_a, step_a = _encode(a, quantizer_a)
    b_hat = _on_grid(b, quantizer_b)
    # No pass over the cotangent is spent on the scales: b's is in b_hat, a's in the result.
    d_b_hat = contraction.right_gradient(code_a, b_hat, cotangent) * step_a
    db, dqb = _cotangents(b, quantizer_b, d_b_hat)
    if contraction.constant_left:
        da = jnp.zeros_like(a)
        dqa = _cotangents_of_constant(contraction, a, quantizer_a, b_hat, cotangent)
        return da, db, dqa, dqb
    d_a_hat = contraction.left_gradient(a, b_hat, cotangent)
    if quantizer_a is None or jnp.ndim(step_a) or not contraction.sums_suffice:
        da, dqa = _cotangents(a, quantizer_a, d_a_hat)
    else:
        total = jnp.sum(d_b_hat * b_hat.astype(contraction.dtype))
        (lower, upper), g = quantizer_a.ends, quantizer_a.gradient_scale
        da, ds = lsq.vjp_of_total(a, quantizer_a.step, lower, upper, g, d_a_hat, total)
        dqa = quantizer_a.cotangent(ds, _offset_cotangent(a, quantizer_a, d_a_hat))
    return da, db, dqa, dqb


def _on_grid(x: Array, quantizer: Quantizer | None) -> Array:
    code, step = _encode(x, quantizer)
    return code * step


def _cotangents(x: Array, quantizer: Quantizer | None, d_hat: Array):
    if quantizer is None:
        return d_hat.astype(x.dtype), None
    dx, ds = lsq.vjp(x, quantizer.step, *quantizer.ends, quantizer.gradient_scale, d_hat)
    return dx, quantizer.cotangent(ds, _offset_cotangent(x, quantizer, d_hat))


def _offset_cotangent(x: Array, quantizer: Quantizer, d_hat: Array) -> Array | None:
    if quantizer.offset is None:
        return None
    return lsq.offset_vjp(x, quantizer.step, *quantizer.ends, quantizer.gradient_scale, d_hat)


def _cotangents_of_constant(contraction, a, quantizer, b_hat, cotangent):
    """The cotangents of the step and the offset where ``a`` takes none.

    ``dL/ds = g sum(dL/da_hat . da_hat/ds)``, and ``b_hat`` may change places in a sum of products:
    ``g sum(b_hat . right_gradient(da_hat/ds))``. So no gradient of ``a`` is made.
    """
    if quantizer is None:
        return None
    step, ends = quantizer.step, quantizer.ends
    if jnp.ndim(step):
        raise ValueError(f"constant_left needs one step for the operand, got {jnp.shape(step)}")

    def along(derivative: Array) -> Array:
        moved = contraction.right_gradient(derivative, b_hat, cotangent)
        return quantizer.gradient_scale * jnp.sum(b_hat * moved)

    d_offset = None
    if quantizer.offset is not None:
        d_offset = along(jnp.where(lsq.inside(a, step, *ends), 0.0, step))
    return quantizer.cotangent(along(lsq.step_derivative(a, step, *ends)), d_offset)


_fake_product.defvjp(_fake_product_fwd, _fake_product_bwd)
