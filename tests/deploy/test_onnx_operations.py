"""Every word of the vocabulary as ONNX Runtime computes it, beside int64 and NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_bench import Bench, grid

from aqdetr_jax.deploy.bits import Codes
from aqdetr_jax.deploy.onnx.layers import signed_weights
from aqdetr_jax.deploy.parts import Grid, Layer, Norm

FEW = settings(max_examples=25, deadline=None, derandomize=True)


@given(
    st.sampled_from([np.uint8, np.int8]),
    st.sampled_from([2, 4, 8]),
    st.integers(-300, 40),
    st.sampled_from([(), (3,)]),
    st.integers(0, 99),
)
@FEW
def test_values_go_to_a_grid(dtype, bits, lower, heads, seed):
    """Rule 4, zero points outside the grid included."""
    rng = np.random.default_rng(seed)
    steps = rng.uniform(0.01, 2, heads).astype(np.float32)
    lowers = tuple(int(lower) - 2 * i for i in range(3)) if heads else lower
    to = Grid("site", steps, lowers, bits)
    x = (rng.normal(0, 1, (2, 3, 5, 4)) * 2.0**bits).astype(np.float32)
    x += np.float32(lower)
    bench = Bench(dtype)
    found, _ = bench.run(bench.ops.quantize(bench.floats(x), to))
    step, low, high = (
        a.reshape(-1, 1, 1) if heads else a for a in (to.step, to.lowest, to.highest)
    )
    np.testing.assert_array_equal(found, np.clip(np.rint(x / step), low, high))


def test_all_pairs_of_codes_are_added_by_the_rule():
    """Rule 5 for every pair; the runtime's float sums may round a tie's neighbour otherwise."""
    rng = np.random.default_rng(8)
    a, b = (x.reshape(1, 1, 256, 256) for x in np.meshgrid(*[np.arange(256)] * 2, indexing="ij"))
    different = 0
    for signed, bits in ((False, 8), (True, 8), (False, 4)):
        branch = grid(8, signed=True, step=rng.uniform(0.01, 1))
        identity = grid(8, signed=signed, step=rng.uniform(0.01, 1))
        to = grid(bits, signed=False, step=rng.uniform(0.1, 3))
        bench = Bench()
        total = bench.ops.add_maps(
            bench.coded(a - 128, branch, True), bench.coded(b + identity.lowest, identity, True)
        )
        found, kinds = bench.run(bench.ops.quantize(bench.ops.relu(total), to))
        ratios = [np.float32(g.step / to.step) for g in (branch, identity)]
        exact = (a - 128) * np.float64(ratios[0]) + (b + identity.lowest) * np.float64(ratios[1])
        expected = np.clip(np.rint(exact), 0, to.highest)
        tie = np.abs(exact - np.floor(exact) - 0.5) < 1e-4
        assert np.all((found == expected) | (tie & (np.abs(found - expected) == 1)))
        different += np.sum(found != expected)
        assert kinds["com.microsoft:QLinearAdd"] == 1
    assert different <= 10


@pytest.mark.parametrize("policy", ["float", "weights", "input"])
def test_layers_that_stay_float(policy):
    rng = np.random.default_rng(9)
    source = grid(4, signed=True, step=0.3)
    codes = Codes(rng.integers(-8, 8, (6, 5)).astype(np.int8), 4)
    scale = rng.uniform(-1, 1, 5).astype(np.float32)
    plain = codes.values * scale if policy == "weights" else rng.normal(size=(6, 5)).astype("f4")
    layer = Layer(
        "layer",
        codes if policy == "weights" else plain,
        scale if policy == "weights" else None,
        rng.normal(size=5).astype(np.float32),
        source if policy == "input" else None,
        shift=np.float32([0.1] * 6) if policy == "input" else None,
        spread=np.float32([0.5] * 6) if policy == "input" else None,
    )
    x = rng.normal(size=(2, 7, 6)).astype(np.float32)
    bench = Bench()
    found, _ = bench.run(bench.ops.relu(bench.ops.dense(bench.floats(x), layer)))
    if policy == "input":
        x = np.clip(np.rint((x - np.float32(0.1)) / np.float32(0.5) / source.step), -8, 7)
        x = x * source.step
    np.testing.assert_allclose(found, np.maximum(x @ plain + layer.bias, 0), rtol=1e-5, atol=1e-5)


def test_norms():
    rng = np.random.default_rng(10)
    x = rng.normal(3, 2, (2, 9, 12)).astype(np.float32)
    scale, bias = (rng.normal(size=12).astype(np.float32) for _ in range(2))
    for groups in (0, 4):
        split = x.reshape(2, 9, groups, -1) if groups else x[:, :, None]
        axes = (1, 3) if groups else (3,)
        mean, variance = (f(split, axes, keepdims=True) for f in (np.mean, np.var))
        expected = ((split - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * scale + bias
        bench = Bench()
        norm = Norm("norm", scale, bias, groups)
        found, _ = bench.run(bench.ops.normalize(bench.floats(x), norm))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_words_for_whole_numbers_and_shapes():
    rng = np.random.default_rng(11)
    x = rng.integers(0, 5, (2, 6)).astype(np.float32)  # with ties
    bench = Bench()
    ops, value = bench.ops, bench.floats(x)
    best = ops.best(value, 4)
    order = np.argsort(-x, axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(bench.run(best)[0], order)

    bench = Bench()
    ops, value = bench.ops, bench.floats(x)
    rows = ops.rows(ops.reshape(value, (2, 3, 2)), np.array([[2, 0], [1, 1]]))
    expected = np.stack([x.reshape(2, 3, 2)[0, [2, 0]], x.reshape(2, 3, 2)[1, [1, 1]]])
    np.testing.assert_array_equal(bench.run(rows)[0], expected)

    bench = Bench()
    largest, place = bench.ops.greatest(bench.floats(x))
    np.testing.assert_array_equal(bench.run(place)[0], x.argmax(1))
    del largest

    bench = Bench()
    whole, rest = bench.ops.divided(bench.floats(np.arange(7)), 3)
    both = bench.ops.concatenate([bench.ops.floats(v) for v in (whole, rest)], 0)
    np.testing.assert_array_equal(bench.run(both)[0], [0, 0, 0, 1, 1, 1, 2, 0, 1, 2, 0, 1, 2, 0])

    bench = Bench()
    value = bench.floats(x)
    total = bench.ops.running_total(value, 1)
    np.testing.assert_array_equal(bench.run(total)[0], np.cumsum(x, 1))


@pytest.mark.parametrize("low", [0.0, -1e9])
def test_where(low):
    rng = np.random.default_rng(12)
    x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    keep = rng.random((2, 1, 1, 5)) < 0.5
    bench = Bench()
    found, _ = bench.run(bench.ops.where(bench.floats(keep), bench.floats(x), low))
    np.testing.assert_array_equal(found, np.where(keep, x, np.float32(low)))


def test_samples_and_their_mix():
    """Beside ``ops.deformable``, points outside every level among them."""
    from aqdetr_jax.ops import deformable

    rng = np.random.default_rng(13)
    shapes = ((5, 4), (3, 2))
    values = rng.normal(size=(2, 26, 2, 3)).astype(np.float32)
    locations = rng.uniform(-0.3, 1.3, (2, 7, 2, 2, 4, 2)).astype(np.float32)
    weights = rng.uniform(0, 1, (2, 2, 7, 8)).astype(np.float32)
    bench = Bench()
    samples = bench.ops.sample(bench.floats(values), bench.floats(locations), shapes)
    found, _ = bench.run(bench.ops.mix_samples(bench.floats(weights), samples))
    expected = np.asarray(deformable.sample_values(values, locations, shapes))
    expected = np.einsum("bhqp,bhqpd->bhqd", weights, expected.reshape(2, 2, 7, 8, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_weights_are_unsigned_bytes_exactly_where_pairs_of_products_saturate():
    source = grid(8, signed=False)
    layer = Layer("l", Codes(np.zeros((2, 2), np.int8), 8), None, np.zeros(2, np.int32), source)
    assert not signed_weights(layer)
    assert signed_weights(dataclasses.replace(layer, grid=grid(7, signed=False)))
    assert signed_weights(dataclasses.replace(layer, kernel=Codes(layer.kernel.values, 7)))
