"""Every word of the vocabulary as ONNX Runtime computes it, beside int64 and NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

import onnx
import onnxruntime
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from aqdetr_jax.deploy.bits import Codes
from aqdetr_jax.deploy.onnx.graph import Graph
from aqdetr_jax.deploy.onnx.layers import signed_weights
from aqdetr_jax.deploy.onnx.operations import OnnxOperations
from aqdetr_jax.deploy.onnx.runner import operators, optimized
from aqdetr_jax.deploy.onnx.tensors import Coded, Map, carrier
from aqdetr_jax.deploy.parts import Grid, Layer, Norm
from aqdetr_jax.ops.convolution import Window

FEW = settings(max_examples=25, deadline=None, derandomize=True)


class Bench:
    """A graph whose inputs are given arrays, run at once."""

    def __init__(self, dtype=np.uint8):
        self.graph = Graph()
        self.ops = OnnxOperations(self.graph, dtype)
        self.feeds = {}

    def floats(self, x):
        name = f"x{len(self.feeds)}"
        self.feeds[name] = np.asarray(x)
        return self.graph.input(name, x.shape, x.dtype)

    def map(self, x):
        """[B, C, H, W]"""
        return Map(self.floats(x))

    def coded(self, codes, grid, is_map=False):
        kind = carrier(grid, self.ops.dtype)
        value = self.floats((codes + kind.zero).astype(kind.dtype))
        return Coded(value, grid, kind, is_map)

    def model(self, **outputs):
        for name, x in outputs.items():
            value = x.value if isinstance(x, Coded | Map) else self.ops.value(x)
            self.graph.output(name, value)
        model = helper.make_model(
            self.graph.finish("test"), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
        )
        onnx.checker.check_model(model, full_check=True)  # the shapes that we said, too
        return model

    def run(self, x):
        """The result of a word (codes as codes), and the kinds of its nodes."""
        model = self.model(y=x)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        (y,) = session.run(None, self.feeds)
        if isinstance(x, Coded):
            y = y.astype(np.int64) - x.carrier.zero
        return y, operators(optimized(model))


def grid(bits, *, signed, step=1.0, lower=None, site="site"):
    if lower is None:
        lower = -(1 << bits - 1) if signed else 0
    return Grid(site, np.float32(step), lower, bits)


def ends(rng, low, high, shape):
    """Codes at the ends of their grid, whole rows of one end among them."""
    x = rng.choice([low, high], size=shape)
    x[0] = high
    x[-1] = low
    return x


def range_of(bits, signed):
    low = -(1 << bits - 1) if signed else 0
    return low, low + (1 << bits) - 1


def sums_of_convolution(x, layer):
    """int64, [B, C, H, W] -> [B, N, H', W']."""
    window, kernel = layer.window, layer.kernel.values.astype(np.int64)
    x = np.pad(x.astype(np.int64), ((0, 0), (0, 0), *window.padding))
    (sh, sw), (dh, dw) = window.strides, window.dilation
    kh, kw = kernel.shape[:2]
    rows = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    columns = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    total = np.zeros((len(x), kernel.shape[3], rows, columns), np.int64)
    for i in range(kh):
        for j in range(kw):
            tap = x[:, :, i * dh : i * dh + sh * (rows - 1) + 1 : sh]
            tap = tap[:, :, :, j * dw : j * dw + sw * (columns - 1) + 1 : sw]
            total += np.einsum("bchw,cn->bnhw", tap, kernel[i, j])
    return total + layer.bias.astype(np.int64)[:, None, None]


def requantized(sums, layer, to, channel_axis, rectified=False):
    """Rule 3."""
    shape = [1] * sums.ndim
    shape[channel_axis] = -1
    factor = (layer.unit / np.float32(to.step)).astype(np.float32).reshape(shape)
    lower = max(0, int(to.lowest.min())) if rectified else to.lowest
    return np.clip(np.rint(sums.astype(np.float32) * factor), lower, to.highest)


def integer_layer(rng, shape, weight_bits, source, *, worst=False, window=None, spread=60.0):
    """A layer whose units have both signs and whose outputs fill ``spread`` codes or so."""
    low, high = range_of(weight_bits, True)
    kernel = ends(rng, low, high, shape) if worst else rng.integers(low, high + 1, shape)
    if worst:
        kernel[..., 0], kernel[..., -1] = low, high
    count = np.prod(shape[:-1])
    typical = source.reach * (1 << weight_bits - 1) * (count if worst else np.sqrt(count)) / 3
    scale = spread / typical * rng.uniform(0.5, 2, shape[-1]) * rng.choice([-1, 1], shape[-1])
    bias = rng.integers(-int(typical), int(typical) + 1, shape[-1]).astype(np.int32)
    codes = Codes(kernel.astype(np.int8), weight_bits)
    scale = (scale / source.step).astype(np.float32)
    return Layer("layer", codes, scale, bias, source, window=window)


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
