"""LSQ against hand values of the paper's equations and a NumPy re-statement of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aqdetr_jax.quant import lsq
from aqdetr_jax.quant.spec import QuantSpec

# v, code, d v_hat / d s, d v_hat / d v for s = 1 on the signed 4-bit grid [-8, 7].
HAND = [
    (-9.0, -8, -8.0, 0),
    (-8.3, -8, -8.0, 0),  # rounds into the grid, but lies outside the range before rounding
    (-8.0, -8, -8.0, 0),
    (-7.9, -8, -0.1, 1),
    (-0.5, 0, 0.5, 1),
    (0.0, 0, 0.0, 1),
    (0.5, 0, -0.5, 1),
    (1.5, 2, 0.5, 1),
    (2.5, 2, -0.5, 1),
    (6.6, 7, 0.4, 1),
    (7.0, 7, 7.0, 0),
    (7.4, 7, 7.0, 0),
    (7.6, 7, 7.0, 0),
]
SPECS = [QuantSpec(bits, signed) for bits in (2, 3, 4, 8) for signed in (True, False)]


@jax.jit
def forward_and_gradients(v, s, lower, upper, g, cotangent):
    out, pullback = jax.vjp(lambda v, s: lsq.fake_quantize(v, s, lower, upper, g), v, s)
    return out, *pullback(cotangent)


@jax.jit
def quantize(v, s, lower, upper):
    return lsq.fake_quantize(v, s, lower, upper)


def restated(v, s, lower, upper, g, cotangent):
    """LSQ eq. 1-3 in NumPy, one scalar at a time; s one number per last-axis entry or one."""
    out, dv, ds = np.zeros_like(v), np.zeros_like(v), np.zeros(np.shape(s), np.float64)
    for index in np.ndindex(*v.shape):
        where = index[-1:] if np.ndim(s) else ()
        step = np.float32(s[where])
        ratio = np.float32(v[index] / step)
        if ratio <= lower:
            code, slope, passes = lower, lower, 0
        elif ratio >= upper:
            code, slope, passes = upper, upper, 0
        else:
            code = np.rint(ratio)
            slope, passes = code - float(ratio), 1
        out[index] = np.float32(code) * step
        dv[index] = cotangent[index] * passes
        ds[where] += float(cotangent[index]) * slope * g
    return out, dv, ds


@pytest.mark.accelerator
@pytest.mark.parametrize(("v", "code", "slope", "passes"), HAND)
def test_hand_values_of_the_four_bit_grid(v, code, slope, passes):
    one = jnp.float32(1)
    out, dv, ds = forward_and_gradients(jnp.float32(v), one, -8.0, 7.0, 1.0, one)
    assert float(out) == code
    assert float(dv) == passes
    np.testing.assert_allclose(ds, slope, atol=1e-6)


def test_python_integers_are_valid_bounds():
    gradient = jax.grad(lambda s: lsq.fake_quantize(jnp.array([-9.0, 0.5]), s, -8, 7).sum())
    np.testing.assert_allclose(gradient(jnp.float32(1.0)), -8.5)


@pytest.mark.accelerator
@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
@pytest.mark.parametrize("per_channel", [False, True])
def test_agrees_with_the_restatement(spec, per_channel):
    rng = np.random.default_rng(spec.bits + 10 * per_channel)
    v = rng.normal(size=(3, 4, 5)).astype(np.float32) * 3
    s = rng.uniform(0.1, 1.0, 5 if per_channel else ()).astype(np.float32)
    cotangent = rng.normal(size=v.shape).astype(np.float32)
    expected = restated(v, s, spec.lower, spec.upper, 0.25, cotangent)
    got = forward_and_gradients(
        v, s, np.float32(spec.lower), np.float32(spec.upper), np.float32(0.25), cotangent
    )
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (4,), (1, 1, 4), (3, 1, 1), (1, 3, 1, 1), (2, 1, 1, 4)])
def test_step_gradient_has_the_steps_shape(shape):
    rng = np.random.default_rng(0)
    v = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
    s = rng.uniform(0.2, 0.5, shape).astype(np.float32)
    _, ds = lsq.vjp(v, s, -8, 7, 1.0, jnp.ones_like(v))
    full = np.asarray(lsq.step_derivative(v, s, -8, 7))
    aligned = (1,) * (4 - len(shape)) + shape
    axes = tuple(i for i, n in enumerate(aligned) if n == 1)
    assert ds.shape == shape
    np.testing.assert_allclose(ds, full.sum(axes, keepdims=True).reshape(shape), rtol=1e-4)


def test_gradient_factor():
    # LSQ section 2.2: 1 / sqrt(N Qp).
    assert lsq.gradient_scale(100, 7) == pytest.approx(1 / np.sqrt(700))
    one = jnp.float32(1)
    _, _, plain = forward_and_gradients(jnp.float32(9), one, -8.0, 7.0, 1.0, one)
    _, _, scaled = forward_and_gradients(jnp.float32(9), one, -8.0, 7.0, 0.1, one)
    np.testing.assert_allclose(scaled, 0.1 * plain, rtol=1e-6)


def test_initial_step():
    v = jnp.array([[1.0, -2.0], [-3.0, 6.0]])
    assert float(lsq.initial_step(v, 7)) == pytest.approx(2 * 3 / np.sqrt(7))
    np.testing.assert_allclose(
        lsq.initial_step(v, 7, (0,)), np.array([[4.0, 8.0]]) / np.sqrt(7), rtol=1e-6
    )


VALUES = hnp.arrays(np.float32, (16,), elements=st.floats(-100, 100, width=32))
STEPS = st.floats(0.0078125, 10, width=32)


@given(VALUES, STEPS, st.sampled_from(SPECS))
@settings(max_examples=60)
def test_idempotent_and_on_a_grid_of_few_levels(v, s, spec):
    lower, upper, s = np.float32(spec.lower), np.float32(spec.upper), np.float32(s)
    once = np.asarray(quantize(v, s, lower, upper))
    np.testing.assert_array_equal(quantize(once, s, lower, upper), once)
    codes = np.rint(once / s)
    np.testing.assert_array_equal(codes.astype(np.float32) * s, once)
    assert codes.min() >= spec.lower
    assert codes.max() <= spec.upper
    assert len(np.unique(once)) <= spec.levels == spec.upper - spec.lower + 1


@given(VALUES, STEPS, st.sampled_from(SPECS))
@settings(max_examples=30)
def test_error_is_at_most_half_a_step_inside_the_range(v, s, spec):
    lower, upper, s = np.float32(spec.lower), np.float32(spec.upper), np.float32(s)
    inside = (v / s > lower) & (v / s < upper)
    error = np.abs(np.asarray(quantize(v, s, lower, upper)) - v)[inside]
    assert np.all(error <= s * (0.5 + 1e-4))


@given(VALUES, STEPS)
@settings(max_examples=20)
def test_step_gradient_of_a_batch_is_the_sum_over_its_examples(v, s):
    examples, s = v.reshape(2, 8), jnp.float32(s)
    together = lsq.vjp(examples, s, -8.0, 7.0, 0.5, jnp.ones_like(examples))[1]
    apart = [lsq.vjp(e, s, -8.0, 7.0, 0.5, jnp.ones_like(e))[1] for e in examples]
    np.testing.assert_allclose(together, sum(apart), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
def test_gradients_from_a_known_total(spec):
    rng = np.random.default_rng(spec.bits)
    v, cotangent = rng.normal(size=(2, 40, 50)).astype(np.float32) * 3
    s, g = np.float32(0.7), np.float32(0.25)
    total = np.sum(np.float64(cotangent) * lsq.fake_quantize(v, s, spec.lower, spec.upper, 1.0))
    _, dv, ds = restated(v, s, spec.lower, spec.upper, g, cotangent)
    got = lsq.vjp_of_total(v, s, spec.lower, spec.upper, g, cotangent, np.float32(total))
    np.testing.assert_array_equal(got[0], dv)
    np.testing.assert_allclose(got[1], ds, rtol=1e-4)


@given(VALUES, STEPS, st.sampled_from([2, 3, 4, 8]), st.data())
@settings(max_examples=30)
def test_zero_point_grid_holds_integers_and_zero(v, s, bits, data):
    zero = data.draw(st.integers(0, 2**bits - 1))
    lower, upper = np.float32(-zero), np.float32(2**bits - 1 - zero)
    v = np.concatenate([v[:-1], np.zeros(1, np.float32)])
    codes = np.asarray(lsq.codes(v, np.float32(s), lower, upper))
    np.testing.assert_array_equal(codes, np.rint(codes))
    assert codes[-1] == 0
    # The stored code is unsigned: b bits hold it exactly.
    stored = codes + zero
    assert stored.min() >= 0
    assert stored.max() <= 2**bits - 1


def lsq_plus(v, s, n, qn, qp):
    """Q-DETR's eq. 1-2 with ``z = s n`` in float64: (codes x_q, values), one scalar at a time."""
    z = np.float64(s) * n
    codes = np.array([np.rint(np.clip((np.float64(x) - z) / s, -qn, qp)) for x in v.ravel()])
    return codes.reshape(v.shape), (s * codes + z).reshape(v.shape)


# v, x_q, value, d value / d s, d value / d n, d value / d v for s = 0.5, n = -3: [-5.5, 2].
MOVED = [
    (-6.0, -8, -5.5, -11.0, 0.5, 0),
    (-5.5, -8, -5.5, -11.0, 0.5, 0),
    (-5.3, -8, -5.5, -11 + 10.6, 0.0, 1),
    (0.0, 3, 0.0, 0.0, 0.0, 1),
    (1.6, 6, 1.5, 3 - 3.2, 0.0, 1),
    (2.0, 7, 2.0, 4.0, 0.5, 0),
    (9.0, 7, 2.0, 4.0, 0.5, 0),
]


def test_a_grid_with_an_offset_by_hand():
    v = np.float32([row[0] for row in MOVED])
    s, n = np.float32(0.5), np.float32(-3)
    lower, upper = np.float32(-8) + n, np.float32(7) + n
    codes, values = lsq_plus(v, 0.5, -3, 8, 7)
    np.testing.assert_array_equal(codes, [row[1] for row in MOVED])
    np.testing.assert_allclose(values, [row[2] for row in MOVED])
    np.testing.assert_array_equal(lsq.codes(v, s, lower, upper) - n, codes)
    np.testing.assert_allclose(quantize(v, s, lower, upper), values)
    for (x, _, _, ds, dn, dv), one in zip(MOVED, v, strict=True):
        got_v, got_s = lsq.vjp(one, s, lower, upper, 1.0, np.float32(1))
        np.testing.assert_allclose((got_v, got_s), (dv, ds), atol=1e-5, err_msg=str(x))
        got_n = lsq.offset_vjp(one, s, lower, upper, 0.25, np.float32(2))
        np.testing.assert_allclose(got_n, 0.25 * 2 * dn, err_msg=str(x))


@given(VALUES, STEPS, st.sampled_from([2, 3, 4, 8]), st.data())
@settings(max_examples=30)
def test_a_moved_grid_is_the_equations_and_holds_zero(v, s, bits, data):
    spec = QuantSpec(bits, offset=True)
    raw = data.draw(st.floats(-300, 300, width=32))
    n = np.asarray(lsq.whole_offset(np.float32(raw), -spec.upper, -spec.lower))
    assert n == np.rint(np.clip(raw, -spec.upper, -spec.lower))
    lower, upper = spec.lower + n, spec.upper + n
    assert lower <= 0 <= upper  # padding is exact, and b bits hold what is left of the lower end
    assert upper - lower == 2**bits - 1
    got = np.asarray(lsq.codes(v, np.float32(s), lower, upper))
    codes, _ = lsq_plus(v, np.float32(s), n, -spec.lower, spec.upper)
    # A tie goes to the even code of either count.
    ratio = v / np.float32(s)
    tie = np.abs(ratio - np.floor(ratio) - 0.5) < 1e-3
    np.testing.assert_array_equal((got - n)[~tie], codes[~tie])
    assert np.abs(got - n - codes).max() <= 1


def test_the_gradient_of_an_offset_leads_back_into_its_range():
    def slope(raw, sign):
        _, pullback = jax.vjp(lambda n: lsq.whole_offset(n, -7.0, 8.0), np.float32(raw))
        return float(pullback(np.float32(sign))[0])

    for raw in (-6.4, 0.0, 0.5, 7.9):
        assert (slope(raw, 2), slope(raw, -2)) == (2, -2)
    # Descent goes against the gradient: down at the lower end is nowhere, up is inside.
    assert (slope(-7, 2), slope(-7, -2)) == (0, -2)
    assert (slope(9, 2), slope(9, -2)) == (2, 0)


@pytest.mark.parametrize("bits", [0, 1, 9, 32, "4"])
def test_unsupported_bits_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be one of"):
        QuantSpec(bits)


def test_grids_of_the_paper():
    assert (QuantSpec(4).lower, QuantSpec(4).upper) == (-8, 7)
    assert (QuantSpec(4, signed=False).lower, QuantSpec(4, signed=False).upper) == (0, 15)
    assert (QuantSpec(2).lower, QuantSpec(2).upper, QuantSpec(2).levels) == (-2, 1, 4)
    assert QuantSpec(3, granularity="channel").describe() == "s3/channel"
    assert QuantSpec(8, signed=False, zero_point=True).describe() == "u8+z"
    assert QuantSpec(4, granularity="head", offset=True).describe() == "s4/head+o"
    for other in ({"signed": False}, {"zero_point": True}):
        with pytest.raises(ValueError, match="offset is signed and has no zero point"):
            QuantSpec(4, offset=True, **other)
