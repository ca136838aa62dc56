"""Sums of products as ONNX Runtime computes them, beside int64: the worst ones, any layer's."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_bench import Bench, ends, grid, integer_layer, range_of, requantized, sums_of_convolution

from aqdetr_jax.deploy.parts import Grid
from aqdetr_jax.ops.convolution import Window

FEW = settings(max_examples=25, deadline=None, derandomize=True)
BITS = [(4, 4), (4, 8), (8, 4), (7, 8), (8, 8)]
"""Of weights and of activations."""


@pytest.mark.parametrize(("weight_bits", "bits"), BITS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shape", [(3, 3, 64, 16), (1, 1, 128, 16), (7, 7, 3, 16)])
def test_worst_sums_of_a_convolution_are_exact(shape, weight_bits, bits, signed):
    rng = np.random.default_rng(0)
    source, to = grid(bits, signed=signed, step=0.3), grid(8, signed=True, step=0.9)
    pad = (shape[0] // 2,) * 2
    layer = integer_layer(
        rng, shape, weight_bits, source, worst=True, window=Window(padding=(pad, pad))
    )
    codes = ends(rng, *range_of(bits, signed), (3, shape[2], 9, 8))
    bench = Bench()
    found, kinds = bench.run(
        bench.ops.quantize(bench.ops.convolve(bench.coded(codes, source, True), layer), to)
    )
    expected = requantized(sums_of_convolution(codes, layer), layer, to, 1)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected)) > 20
    assert kinds["com.microsoft:QLinearConv"] == 1
    assert "Conv" not in kinds


@pytest.mark.parametrize(("weight_bits", "bits"), BITS)
@pytest.mark.parametrize("signed", [False, True])
def test_worst_sums_of_a_dense_layer_are_exact(weight_bits, bits, signed):
    rng = np.random.default_rng(1)
    source, to = grid(bits, signed=signed, step=0.3), grid(8, signed=True, step=0.9)
    layer = integer_layer(rng, (256, 24), weight_bits, source, worst=True)
    codes = ends(rng, *range_of(bits, signed), (2, 10, 256))
    sums = codes.astype(np.int64) @ layer.kernel.values.astype(np.int64) + layer.bias

    bench = Bench()
    found, kinds = bench.run(
        bench.ops.quantize(bench.ops.dense(bench.coded(codes, source), layer), to)
    )
    np.testing.assert_array_equal(found, requantized(sums, layer, to, 2))
    assert kinds["com.microsoft:QLinearConv"] == 1

    bench = Bench()
    found, kinds = bench.run(bench.ops.dense(bench.coded(codes, source), layer))
    np.testing.assert_array_equal(found, sums.astype(np.float32) * layer.unit)
    assert kinds["com.microsoft:QGemm"] == 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("heads", [False, True])
def test_worst_sums_of_mixed_values_are_exact(bits, heads):
    rng = np.random.default_rng(2)
    steps = np.float32([0.5, 0.03]) if heads else np.float32(0.5)
    lower = (lambda n: (n, n)) if heads else (lambda n: n)
    probs = Grid("p", steps, lower(0), bits)
    values = Grid("v", 2 * steps, lower(-(1 << bits - 1)), bits)
    a = ends(rng, *range_of(bits, False), (2, 2, 5, 850))
    b = ends(rng, *range_of(bits, True), (2, 2, 850, 16))
    unit = (probs.step * values.step).astype(np.float32)
    sums = a.astype(np.int64) @ b.astype(np.int64)
    bench = Bench()
    found, kinds = bench.run(bench.ops.mix(bench.coded(a, probs), bench.coded(b, values)))
    expected = sums.astype(np.float32) * (unit.reshape(-1, 1, 1) if heads else unit)
    np.testing.assert_array_equal(found, expected)
    assert kinds["com.microsoft:MatMulIntegerToFloat"] == 1


@pytest.mark.parametrize("heads", [False, True])
def test_scores_are_those_of_integer_sums(heads):
    rng = np.random.default_rng(3)
    steps = np.float32([0.5, 0.03]) if heads else np.float32(0.5)
    signed = Grid("q", steps, (-128, -128) if heads else -128, 8)
    q, k = (ends(rng, -128, 127, (1, 2, n, 32)) for n in (5, 40))
    sums = q.astype(np.int64) @ k.transpose(0, 1, 3, 2).astype(np.int64)
    unit = np.float64(signed.step) ** 2 * 0.25
    bench = Bench()
    found, _ = bench.run(bench.ops.scores(bench.coded(q, signed), bench.coded(k, signed), 0.25))
    expected = sums * (unit.reshape(-1, 1, 1) if heads else unit)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=np.abs(expected).max() * 1e-6)


@given(
    st.sampled_from([(1, 1), (3, 1), (3, 2), (5, 1)]),
    st.sampled_from([1, 2]),
    st.integers(1, 9),
    st.integers(1, 7),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([2, 4, 8]),
    st.booleans(),
    st.integers(-20, 3),
    st.booleans(),
    st.integers(0, 99),
)
@FEW
def test_a_convolutions_codes(
    window, stride, channels, features, bits, to_bits, signed, lower, rectified, seed
):
    rng = np.random.default_rng(seed)
    size, dilation = window
    source = grid(bits, signed=signed, step=0.2)
    to = grid(to_bits, signed=True, step=0.7, lower=lower)
    pad = dilation * (size - 1) // 2
    layer = integer_layer(
        rng,
        (size, size, channels, features),
        4,
        source,
        window=Window((stride, stride), ((pad, pad), (pad, pad)), (dilation, dilation)),
        spread=2.0**to_bits,
    )
    codes = rng.integers(source.lowest, source.highest + 1, (2, channels, 11, 9))
    bench = Bench()
    sums = bench.ops.convolve(bench.coded(codes, source, True), layer)
    sums = bench.ops.relu(sums) if rectified else sums
    found, kinds = bench.run(bench.ops.quantize(sums, to))
    expected = requantized(sums_of_convolution(codes, layer), layer, to, 1, rectified)
    np.testing.assert_array_equal(found, expected)
    assert kinds["com.microsoft:QLinearConv"] == 1


@pytest.mark.parametrize("window", [(1, 1, 1), (3, 2, 1), (3, 1, 2)])
def test_a_convolutions_floats_are_those_of_its_sums(window):
    size, stride, dilation = window
    rng = np.random.default_rng(5)
    source = grid(4, signed=True, step=0.3)
    layer = integer_layer(
        rng,
        (size, size, 6, 5),
        4,
        source,
        window=Window((stride, stride), ((1, 1), (1, 1)), (dilation, dilation)),
    )
    codes = rng.integers(-8, 8, (2, 6, 9, 8))
    bench = Bench()
    found, kinds = bench.run(
        bench.ops.tokens(bench.ops.convolve(bench.coded(codes, source, True), layer))
    )
    sums = sums_of_convolution(codes, layer).astype(np.float32) * layer.unit[:, None, None]
    np.testing.assert_array_equal(found, sums.reshape(2, 5, -1).transpose(0, 2, 1))
    assert kinds["com.microsoft:QGemm"] == 1


def test_pooled_sums_are_the_largest_values_whatever_the_sign_of_their_unit():
    rng = np.random.default_rng(6)
    source = grid(8, signed=True, step=0.02)
    layer = integer_layer(rng, (7, 7, 3, 8), 8, source, window=Window((2, 2), ((3, 3), (3, 3))))
    codes = rng.integers(-128, 128, (1, 3, 20, 18))
    bench = Bench()
    found, _ = bench.run(
        bench.ops.max_pool(bench.ops.convolve(bench.coded(codes, source, True), layer))
    )
    values = sums_of_convolution(codes, layer).astype(np.float32) * layer.unit[:, None, None]
    padded = np.pad(values, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    taps = [padded[:, :, i : i + 10 : 2, j : j + 9 : 2] for i in range(3) for j in range(3)]
    np.testing.assert_array_equal(found, np.max(taps, 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_sums_of_heads_go_to_a_grid_a_head(dtype):
    rng = np.random.default_rng(7)
    source = grid(4, signed=True, step=0.3)
    layer = integer_layer(rng, (32, 12), 4, source)
    heads = Grid("heads", np.float32([0.5, 1.5, 4]), (-8, -3, 0), 4)
    codes = rng.integers(-8, 8, (2, 7, 32))
    bench = Bench(dtype)
    found, _ = bench.run(
        bench.ops.quantize(bench.ops.dense(bench.coded(codes, source), layer), heads)
    )
    sums = codes @ layer.kernel.values.astype(np.int64) + layer.bias
    channels = [np.repeat(x, 4) for x in (heads.step, heads.lowest, heads.highest)]
    expected = np.rint(sums.astype(np.float32) * (layer.unit / channels[0]).astype(np.float32))
    np.testing.assert_array_equal(found, np.clip(expected, *channels[1:]))
