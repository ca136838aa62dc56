"""The quantized product: composition of LSQ and a product, and one number in two arithmetics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from aqdetr_jax.quant import lsq
from aqdetr_jax.quant.contractions import Conv, Dense, Mix, MixSamples, Scores
from aqdetr_jax.quant.product import quantized_product
from aqdetr_jax.quant.quantizer import Quantizer

# contraction, shapes of both operands, shapes of both steps
CASES = {
    "dense": (Dense, {}, (2, 3, 6), (6, 5), (), (1, 5)),
    "conv": (Conv, {"padding": ((1, 1), (1, 1))}, (2, 5, 4, 3), (3, 3, 3, 2), (), (1, 1, 1, 2)),
    "conv_strided_dilated": (
        Conv,
        {"strides": (2, 2), "dilation": (2, 2), "padding": ((2, 1), (0, 2))},
        (2, 8, 7, 3),
        (3, 3, 3, 2),
        (),
        (1, 1, 1, 2),
    ),
    "scores": (Scores, {}, (2, 3, 4, 5), (2, 3, 6, 5), (3, 1, 1), (3, 1, 1)),
    "mix": (Mix, {}, (2, 3, 4, 6), (2, 3, 6, 5), (3, 1, 1), (3, 1, 1)),
    "mix_samples": (MixSamples, {}, (2, 3, 4, 6), (2, 3, 4, 6 * 5), (3, 1, 1), (3, 1, 1)),
}


def plain_product(name, a, b):
    """The products once more, by ``einsum`` and loops over taps, in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if name == "dense":
        return a @ b
    if name == "scores":
        return np.einsum("bhqd,bhkd->bhqk", a, b)
    if name == "mix":
        return np.einsum("bhqk,bhkd->bhqd", a, b)
    if name == "mix_samples":
        return np.einsum("bhqp,bhqpd->bhqd", a, b.reshape(*a.shape, -1))
    _, options, *_ = CASES[name]
    (sh, sw), (dh, dw) = options.get("strides", (1, 1)), options.get("dilation", (1, 1))
    a = np.pad(a, ((0, 0), *options["padding"], (0, 0)))
    kh, kw = b.shape[:2]
    out_h = (a.shape[1] - dh * (kh - 1) - 1) // sh + 1
    out_w = (a.shape[2] - dw * (kw - 1) - 1) // sw + 1
    out = np.zeros((a.shape[0], out_h, out_w, b.shape[3]))
    for y, x in np.ndindex(out_h, out_w):
        window = a[:, y * sh : y * sh + dh * kh : dh, x * sw : x * sw + dw * kw : dw]
        out[:, y, x] = np.einsum("bijc,ijcn->bn", window, b)
    return out


def operands(name, seed=0, bits=(4, 4), signed=(True, True), scale=1.0):
    _, _, shape_a, shape_b, step_a, step_b = CASES[name]
    rng = np.random.default_rng(seed)

    def one(shape, step_shape, bits, signed):
        x = rng.normal(size=shape).astype(np.float32) * np.float32(scale)
        lower, upper = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        # Small enough that some values clip, so that all branches of the gradient occur.
        step = rng.uniform(1.0, 2.0, step_shape).astype(np.float32) * np.float32(scale / upper)
        return x, Quantizer(step, np.float32(lower), np.float32(upper), np.float32(0.3))

    a, qa = one(shape_a, step_a, bits[0], signed[0])
    b, qb = one(shape_b, step_b, bits[1], signed[1])
    return a, b, qa, qb


@functools.cache
def product(name, arithmetic="fake", dtype="float32"):
    kind, options, *_ = CASES[name]
    contraction = kind(jnp.dtype(dtype), **options)
    return jax.jit(lambda a, b, qa, qb: quantized_product(contraction, a, b, qa, qb, arithmetic))


def on_grid(x, q):
    return lsq.fake_quantize(x, q.step, q.lower, q.upper, q.gradient_scale)


@pytest.mark.accelerator
@pytest.mark.parametrize("name", CASES)
def test_forward_is_the_product_of_quantized_operands(name):
    a, b, qa, qb = operands(name, signed=(False, True))
    expected = plain_product(name, on_grid(a, qa), on_grid(b, qb))
    got = product(name)(a, b, qa, qb)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["both", "left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_the_composition(name, which):
    kind, options, *_ = CASES[name]
    contraction = kind(**options)
    a, b, qa, qb = operands(name, seed=1)
    cotangent = np.random.default_rng(2).normal(size=plain_product(name, a, b).shape)
    cotangent = cotangent.astype(np.float32)
    use_a, use_b = which != "right", which != "left"

    def ours(a, b, step_a, step_b):
        out = quantized_product(
            contraction,
            a,
            b,
            qa._replace(step=step_a) if use_a else None,
            qb._replace(step=step_b) if use_b else None,
        )
        return jnp.sum(out * cotangent)

    def composed(a, b, step_a, step_b):
        a = on_grid(a, qa._replace(step=step_a)) if use_a else a
        b = on_grid(b, qb._replace(step=step_b)) if use_b else b
        return jnp.sum(contraction.contract(a, b, jnp.float32) * cotangent)

    got, expected = jax.jit(
        lambda *x: (jax.grad(ours, (0, 1, 2, 3))(*x), jax.grad(composed, (0, 1, 2, 3))(*x))
    )(a, b, qa.step, qb.step)
    for mine, reference, x in zip(got, expected, (a, b, qa.step, qb.step), strict=True):
        assert mine.shape == np.shape(x)
        size = float(jnp.max(jnp.abs(reference)))
        np.testing.assert_allclose(mine, reference, rtol=1e-5, atol=1e-5 * max(size, 1e-3))
    for step_gradient, used in ((got[2], use_a), (got[3], use_b)):
        assert bool(np.any(np.asarray(step_gradient))) == used


@pytest.mark.accelerator
@pytest.mark.parametrize("name", CASES)
@given(
    seed=st.integers(0, 2**31 - 1),
    bits=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    signed=st.tuples(st.booleans(), st.booleans()),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
)
@settings(max_examples=12)
def test_fake_integer_and_bfloat16_are_the_same_numbers(name, seed, bits, signed, scale):
    a, b, qa, qb = operands(name, seed, bits, signed, scale)
    a.flat[::3] = 0.5 * np.float32(qa.step.max() if np.ndim(qa.step) else qa.step)  # ties
    fake = np.asarray(product(name)(a, b, qa, qb))
    np.testing.assert_array_equal(fake, product(name, "integer")(a, b, qa, qb))
    # bfloat16 carries the codes exactly; what it rounds is the scaled product, once.
    rounded = fake.astype(jnp.bfloat16)
    for arithmetic in ("fake", "integer"):
        low = product(name, arithmetic, "bfloat16")(a, b, qa, qb)
        assert low.dtype == jnp.bfloat16
        np.testing.assert_array_equal(low, rounded)


@pytest.mark.accelerator
@pytest.mark.parametrize("name", ["dense", "conv"])
def test_zero_point_grid_in_integers(name):
    a, b, qa, qb = operands(name, seed=5, bits=(8, 8), signed=(False, True))
    zero = np.float32(93)
    qa = qa._replace(lower=qa.lower - zero, upper=qa.upper - zero)
    fake = product(name)(a, b, qa, qb)
    np.testing.assert_array_equal(fake, product(name, "integer")(a, b, qa, qb))
    # Zero padding of the convolution is the code of real zero.
    np.testing.assert_allclose(
        fake, plain_product(name, on_grid(a, qa), on_grid(b, qb)), rtol=1e-5, atol=1e-4
    )


def straight_through(x, q):
    """Q-DETR's eq. 1-2 with ``z = s n``, rounding passed by: JAX differentiates the rest."""
    z = q.step * q.offset
    code = jnp.clip((x - z) / q.step, q.lower, q.upper)
    code = code + jax.lax.stop_gradient(jnp.round(code) - code)
    return q.step * code + z


@pytest.mark.accelerator
@pytest.mark.parametrize("name", CASES)
def test_a_learned_offset_in_both_arithmetics_and_its_gradient(name):
    kind, options, *_ = CASES[name]
    contraction = kind(**options)
    a, b, qa, qb = operands(name, seed=6)
    # Positive values, the upper half of which would be beyond a grid that is not moved.
    a = 3 * np.abs(a)
    qa = qa._replace(offset=np.full_like(qa.step, 5), gradient_scale=np.float32(1))
    qb = qb._replace(gradient_scale=np.float32(1))
    fake = product(name)(a, b, qa, qb)
    np.testing.assert_array_equal(fake, product(name, "integer")(a, b, qa, qb))
    b_hat = on_grid(b, qb)
    expected = plain_product(name, straight_through(a, qa), b_hat)
    np.testing.assert_allclose(fake, expected, rtol=1e-5, atol=1e-5)

    cotangent = np.random.default_rng(7).normal(size=fake.shape).astype(np.float32)

    def ours(contraction):
        def loss(a, step, offset):
            quantizer = qa._replace(step=step, offset=offset)
            return jnp.sum(quantized_product(contraction, a, b, quantizer, qb) * cotangent)

        return jax.grad(loss, (0, 1, 2))

    def composed(a, step, offset):
        a_hat = straight_through(a, qa._replace(step=step, offset=offset))
        return jnp.sum(contraction.contract(a_hat, b_hat, jnp.float32) * cotangent)

    at = a, qa.step, qa.offset
    wanted = jax.jit(jax.grad(composed, (0, 1, 2)))(*at)
    assert np.any(np.asarray(wanted[2]))
    for mine, reference in zip(jax.jit(ours(contraction))(*at), wanted, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=1e-4, atol=1e-4)
    if not np.ndim(qa.step):  # of data, to which no gradient goes
        constant = jax.jit(ours(kind(**options, constant_left=True)))(*at)
        assert not np.any(constant[0])
        np.testing.assert_allclose(constant[1:], wanted[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_observe_is_the_float_product(name):
    kind, options, *_ = CASES[name]
    a, b, qa, qb = operands(name)
    floats = jax.jit(kind(**options).floats)(a, b)
    np.testing.assert_array_equal(product(name, "observe")(a, b, qa, qb), floats)
    np.testing.assert_array_equal(product(name)(a, b, None, None), floats)


def test_bfloat16_gradients_are_close_to_float32_ones():
    a, b, qa, qb = operands("dense", seed=3)

    def gradients(dtype):
        def loss(a, step):
            out = quantized_product(Dense(dtype), a, b, qa._replace(step=step), qb)
            return jnp.sum(jnp.sin(out))

        return jax.jit(jax.grad(loss, (0, 1)))(a, qa.step)

    for low, full in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert low.dtype == jnp.float32  # as the operands
        np.testing.assert_allclose(low, full, rtol=0.05, atol=0.02 * float(jnp.abs(full).max()))


@pytest.mark.parametrize("name", ["dense", "conv", "conv_strided_dilated"])
def test_bfloat16_weight_and_step_gradients_are_float32_sums(name):
    """Of operands that bfloat16 holds, every product of codes and cotangents is exact."""
    kind, options, *_ = CASES[name]
    a, b, qa, qb = operands(name, seed=4)
    qa, qb = (q._replace(step=np.full_like(q.step, 0.25)) for q in (qa, qb))
    # 4096 images of one kind: sums beyond what eight bits of a mantissa can count.
    a = np.repeat(a[:1], 4096, 0).astype(jnp.bfloat16)

    def gradients(dtype, a):
        def loss(b, step_a, step_b):
            out = quantized_product(
                kind(dtype, **options), a, b, qa._replace(step=step_a), qb._replace(step=step_b)
            )
            return jnp.sum(out.astype(jnp.float32))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(b, qa.step, qb.step)

    for low, full in zip(
        gradients(jnp.bfloat16, a), gradients(jnp.float32, a.astype(np.float32)), strict=True
    ):
        assert low.dtype == jnp.float32
        np.testing.assert_allclose(low, full, rtol=1e-3, atol=1e-3 * float(jnp.abs(full).max()))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_bfloat16_step_gradients_hold_on_fine_grids(bits, signed):
    """The rounding of a cotangent must not be multiplied by codes of up to 255."""
    a, b, qa, qb = operands("dense", bits=(bits, 4), signed=(signed, True))
    rng = np.random.default_rng(8)
    a = jnp.asarray(np.abs(rng.normal(size=(4096, 6))), jnp.bfloat16)
    qa = qa._replace(step=np.float32(4.87) / qa.upper)  # nothing is clipped, no tie
    qb = qb._replace(step=np.full_like(qb.step, 0.25))  # a grid that bfloat16 holds
    cotangent = jnp.asarray(rng.normal(size=(4096, 5)), jnp.bfloat16)

    def gradient(dtype, which, quantizer):
        def loss(a, step):
            q = quantizer and quantizer._replace(step=step)
            out = quantized_product(Dense(dtype, left_bits=bits), a, b, q, qb)
            return jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32))

        return jax.jit(jax.grad(loss, which))(a.astype(dtype), qa.step)

    low, full = (gradient(dtype, 1, qa) for dtype in (jnp.bfloat16, jnp.float32))
    # What a sum of so many terms of either sign comes to.
    slope = lsq.step_derivative(a.astype(jnp.float32), qa.step, qa.lower, qa.upper)
    terms = gradient(jnp.float32, 0, None) * slope
    size = float(qa.gradient_scale * jnp.sqrt(jnp.sum(terms**2)))
    assert abs(float(low - full)) < 0.02 * size


@pytest.mark.parametrize("which", ["both", "left", "right", "none"])
@pytest.mark.parametrize("name", ["dense", "conv", "conv_strided_dilated"])
def test_a_constant_operand_changes_no_other_gradient(name, which):
    kind, options, *_ = CASES[name]
    a, b, qa, qb = operands(name, seed=6)
    qa = qa if which in ("both", "left") else None
    qb = qb if which in ("both", "right") else None
    cotangent = np.random.default_rng(7).normal(size=plain_product(name, a, b).shape)
    cotangent = cotangent.astype(np.float32)

    def gradients(constant):
        def loss(a, b, qa, qb):
            contraction = kind(**options, constant_left=constant)
            return jnp.sum(quantized_product(contraction, a, b, qa, qb) * cotangent)

        return jax.grad(loss, (0, 1, 2, 3))

    got, expected = jax.jit(lambda *x: (gradients(True)(*x), gradients(False)(*x)))(a, b, qa, qb)
    np.testing.assert_array_equal(got[0], 0)
    assert np.any(np.asarray(expected[0]))
    for mine, reference in zip(
        jax.tree.leaves(got[1:]), jax.tree.leaves(expected[1:]), strict=True
    ):
        scale = max(float(jnp.abs(reference).max()), 1e-3)
        np.testing.assert_allclose(mine, reference, rtol=1e-5, atol=1e-5 * scale)


def test_a_constant_operand_has_one_step():
    a, b, qa, qb = operands("mix")
    contraction = Mix(constant_left=True)
    with pytest.raises(ValueError, match=r"one step for the operand, got \(3, 1, 1\)"):
        jax.grad(lambda s: quantized_product(contraction, a, b, qa._replace(step=s), qb).sum())(
            jnp.asarray(qa.step)
        )


def test_deformable_mix_sums_its_gradients_in_float32():
    """A bfloat16 sum over the channels would lose what a matrix unit keeps."""
    a, b = jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 3, 4 * 8))
    mix = MixSamples(jnp.bfloat16)
    cotangent = jnp.ones((1, 2, 3, 8), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(mix.left_gradient)(a, b, cotangent)
    sums = [e for e in tiny.equations(jaxpr.jaxpr) if e.primitive.name == "reduce_sum"]
    assert sums
    assert all(e.invars[0].aval.dtype == jnp.float32 for e in sums)
    np.testing.assert_array_equal(mix.left_gradient(a, b, cotangent), np.full(a.shape, 8.0))
    np.testing.assert_array_equal(mix.right_gradient(a, b, cotangent), np.ones(b.shape))


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_attention_maps_keep_their_layout_on_a_tpu_alone(platform):
    """Nothing is computed: what would be compiled asks for it, or not."""
    q = jax.ShapeDtypeStruct((2, 3, 4, 5), jnp.float32)

    def step(q, k, v):
        return jnp.sum(Mix().floats(Scores().floats(q, k), v))

    traced = jax.jit(jax.value_and_grad(step)).trace(q, q, q)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    # The scores, the product's operand, and the gradients of both.
    assert text.count("LayoutConstraint") == (4 if platform == "tpu" else 0)
