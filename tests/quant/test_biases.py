"""Biases of integer layers: whole numbers of the sums' unit, as int64 arithmetic adds them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aqdetr_jax.models.fold import sum_affine
from aqdetr_jax.models.layers import BatchNorm, norm_affine
from aqdetr_jax.models.quantized import QConv, QDense
from aqdetr_jax.quant import lsq
from aqdetr_jax.quant.policy import Policy, Rule, stock_policy
from aqdetr_jax.quant.quantizer import SumSteps

W4A4 = stock_policy("w4a4")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 5, 6)).astype(np.float32)
PARAMS = {
    "kernel": RNG.normal(size=(6, 4)).astype(np.float32),
    "bias": np.float32([0.31, -2.2, 1e6, 0.0]),
    "kernel_step": RNG.uniform(0.2, 0.4, 4).astype(np.float32),
    "input_step": np.float32(0.3),
}


@pytest.mark.parametrize(
    ("bias", "unit", "code"),
    [
        (0.26, 0.1, 3),
        (-0.26, 0.1, -3),
        (0.26, -0.1, -3),  # a norm with a negative factor
        (2.5, 1.0, 2),  # half to even
        (-3.5, 1.0, -4),
        (1.0, 1e-30, 2**31 - 128),
        (-1.0, 1e-30, -(2**31) + 128),
        (1.0, 0.0, 0),
        (0.0, 0.0, 0),
    ],
)
def test_codes_by_hand(bias, unit, code):
    found = lsq.bias_codes(jnp.float32([bias]), jnp.float32([unit]))
    assert found.dtype == jnp.float32
    assert np.asarray(found).astype(np.int32).tolist() == [code]
    want = bias if unit == 0 else np.float32(code) * np.float32(unit)
    np.testing.assert_array_equal(lsq.round_bias(*jnp.float32([[bias], [unit]])), np.float32(want))


@given(
    hnp.arrays(np.float32, 5, elements=st.floats(-1e3, 1e3, width=32)),
    hnp.arrays(np.float32, 5, elements=st.floats(0.0009765625, 8, width=32)),
)
def test_rounding_moves_a_bias_by_half_a_unit_and_its_gradient_not_at_all(bias, unit):
    rounded, pullback = jax.vjp(lsq.round_bias, jnp.asarray(bias), jnp.asarray(unit))
    ulp = np.spacing(np.abs(bias))
    assert np.all(np.abs(np.float64(rounded) - bias) <= 0.5 * unit + ulp)
    for d_bias, d_unit in [pullback(jnp.arange(5.0))]:
        np.testing.assert_array_equal(d_bias, np.arange(5.0))
        np.testing.assert_array_equal(d_unit, 0)


def integers(x, step, lower, upper):
    return np.rint(np.clip(np.float32(x) / np.float32(step), lower, upper)).astype(np.int64)


@pytest.mark.parametrize("arithmetic", ["fake", "integer"])
def test_a_dense_layer_is_integers_times_a_unit(arithmetic):
    layer = QDense(4, stock_policy("w4a4", arithmetic=arithmetic))
    found = np.float64(layer.apply({"params": PARAMS}, X))
    unit = np.float64(PARAMS["input_step"] * PARAMS["kernel_step"])
    sums = integers(X, 0.3, -8, 7) @ integers(PARAMS["kernel"], PARAMS["kernel_step"], -8, 7)
    sums += np.rint(PARAMS["bias"] / unit).astype(np.int64)
    np.testing.assert_allclose(found, sums * unit, rtol=1e-6)
    codes = found / unit
    np.testing.assert_allclose(codes, np.rint(codes), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "policy",
    [
        stock_policy("float"),
        stock_policy("w4a4", arithmetic="observe"),
        Policy(rules=(Rule(".*", 4, None, None),)),
        Policy(rules=(Rule(".*", None, 4, None),)),
    ],
)
def test_a_layer_without_integer_sums_adds_its_bias_as_it_is(policy):
    zero = np.zeros_like(X)
    for layer, x in ((QDense(4, policy), zero), (_conv(policy), zero[None])):
        kernel = PARAMS["kernel"]
        params = {**PARAMS, "kernel": kernel if x is zero else kernel[None, None]}
        found = layer.apply({"params": params}, x)
        np.testing.assert_array_equal(found, np.broadcast_to(PARAMS["bias"], found.shape))


def _conv(policy):
    return QConv(4, (1, 1), policy, use_bias=True, unsigned=False)


def test_a_convolution_is_the_dense_layer():
    dense = QDense(4, W4A4).apply({"params": PARAMS}, X)
    params = {**PARAMS, "kernel": PARAMS["kernel"][None, None]}
    np.testing.assert_allclose(_conv(W4A4).apply({"params": params}, X[None])[0], dense, rtol=1e-6)


def test_of_a_centred_layer_the_whole_bias_is_rounded():
    """Where the input is its own mean, nothing but m W + b is left."""
    shift = RNG.normal(size=6).astype(np.float32)
    params = {**PARAMS, "input_shift": shift, "input_scale": np.full(6, 2, np.float32)}
    layer = QDense(4, stock_policy("w4a4", grid="centred"))
    (found,) = layer.apply({"params": params}, shift[None])
    unit = PARAMS["input_step"] * PARAMS["kernel_step"]
    whole = np.float64(shift) @ PARAMS["kernel"] + PARAMS["bias"]
    np.testing.assert_allclose(found, np.rint(whole / unit) * unit, rtol=1e-6)
    assert np.abs(found - whole).max() > 0.01


NORM = {"scale": np.float32([1.5, -0.7, 0.0, -2]), "bias": RNG.normal(size=4).astype("f4")}
STATS = {"mean": RNG.normal(size=4).astype("f4"), "var": np.float32([0.5, 1, 2, 3])}


def normed(frozen, train, policy=W4A4):
    conv = QConv(4, (1, 1), policy, unsigned=False)
    params = {name: PARAMS[name] for name in ("kernel_step", "input_step")}
    params["kernel"] = PARAMS["kernel"][None, None]
    y, steps = conv.apply({"params": params}, X[None], method="with_steps")
    given = {"params": NORM, "batch_stats": STATS}
    out = BatchNorm(frozen).apply(given, y, steps, train=train, mutable=["batch_stats"])[0]
    plain = BatchNorm(frozen).apply(given, y, train=train, mutable=["batch_stats"])[0]
    return np.asarray(out), np.asarray(plain), y


@pytest.mark.parametrize(("frozen", "train"), [(True, True), (True, False), (False, False)])
def test_a_norm_that_does_not_learn_rounds_its_bias_to_the_sums_before_it(frozen, train):
    found, _, y = normed(frozen, train)
    factor, bias = (np.asarray(v) for v in norm_affine(*(jnp.asarray(v) for v in _vectors())))
    unit = PARAMS["input_step"] * (PARAMS["kernel_step"] * factor)
    sums = np.rint(np.asarray(y) / (PARAMS["input_step"] * PARAMS["kernel_step"]))
    with np.errstate(divide="ignore"):
        codes = np.rint(bias / unit)
    want = np.where(unit == 0, bias, (sums + np.where(unit == 0, 0, codes)) * unit)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    assert (unit < 0).sum() == 2


def _vectors():
    return NORM["scale"], NORM["bias"], STATS["mean"], STATS["var"]


def test_a_conversion_finds_the_norms_biases_bit_by_bit():
    """Compiled apart, ``sum_affine`` is what a compiled network adds: no code is another one."""
    rng, count = np.random.default_rng(3), 30_000
    norm = {"scale": rng.normal(size=count), "bias": rng.normal(size=count)}
    stats = {"mean": rng.normal(size=count), "var": rng.uniform(0.1, 4, count)}
    steps = SumSteps(jnp.float32(0.013), jnp.asarray(rng.uniform(1e-3, 1e-2, count), jnp.float32))
    norm, stats = jax.tree.map(jnp.float32, (norm, stats))

    @jax.jit
    def network(x, norm, stats, steps):
        y = BatchNorm().apply({"params": norm, "batch_stats": stats}, x, steps)
        return jnp.maximum(y, 0), jnp.minimum(y, 0)

    positive, negative = network(jnp.zeros((2, 3, 3, count)), norm, stats, steps)
    scale, bias = jax.jit(sum_affine)(*steps, norm, stats)
    for row in np.asarray(positive + negative).reshape(-1, count):
        np.testing.assert_array_equal(row, bias)
    codes = np.asarray(lsq.bias_codes(bias, scale))
    np.testing.assert_array_equal(codes * np.asarray(scale), bias)
    assert np.abs(codes).max() > 1e5


@pytest.mark.parametrize(
    ("frozen", "train", "policy"),
    [
        (False, True, W4A4),  # learns
        (True, False, stock_policy("w4a4", arithmetic="observe")),
        (True, False, stock_policy("float")),
    ],
)
def test_other_norms_do_not_round(frozen, train, policy):
    found, plain, _ = normed(frozen, train, policy)
    np.testing.assert_array_equal(found, plain)
