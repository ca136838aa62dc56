"""Words of the ONNX vocabulary run at once, and their results by int64 and NumPy."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

import onnx
import onnxruntime
from onnx import helper

from aqdetr_jax.deploy.bits import Codes
from aqdetr_jax.deploy.onnx.graph import Graph
from aqdetr_jax.deploy.onnx.operations import OnnxOperations
from aqdetr_jax.deploy.onnx.runner import operators, optimized
from aqdetr_jax.deploy.onnx.tensors import Coded, Map, carrier
from aqdetr_jax.deploy.parts import Grid, Layer


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
