"""Dense layers and convolutions: with integers, with weights as codes, and in floats."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from aqdetr_jax.deploy.bits import Codes
from aqdetr_jax.deploy.onnx.graph import Value
from aqdetr_jax.deploy.onnx.grids import GridOperations
from aqdetr_jax.deploy.onnx.tensors import Coded, Map, MapSum, Sums
from aqdetr_jax.deploy.operations import Tensor
from aqdetr_jax.deploy.parts import Layer

LARGEST_PAIR = 2**15 - 1
"""Of two products of bytes, in the sums of x86 without VNNI."""

LARGEST_SUM = 2**24
"""Below it whole numbers are exact in float32."""

ONE = np.ones((), np.float32)
"""The step of codes as whole numbers."""


class LayerOperations(GridOperations):
    """The words for layers and maps."""

    # --- layers -----------------------------------------------------------------------------------

    def dense(self, x: Tensor, layer: Layer) -> Tensor:
        """See ``Operations``."""
        if layer.grid is None:
            return self.dense_floats(self.value(x), layer)
        coded = self._on_grid(x, layer)
        if not layer.integer:
            return self.dense_floats(self.dequantize(coded), layer)
        return Sums(coded, layer, (*coded.value.shape[:-1], len(layer.bias)))

    def _on_grid(self, x: Tensor, layer: Layer) -> Coded:
        if isinstance(x, Coded):
            return x
        if layer.shift is not None:
            assert layer.spread is not None
            x = self.divide(self.subtract(x, layer.shift), layer.spread)
        assert layer.grid is not None
        return self.quantize(x, layer.grid)

    def convolve(self, x: Tensor, layer: Layer) -> Tensor:
        """See ``Operations``."""
        if layer.grid is None:
            return Map(self.convolved_floats(self.map_floats(x), layer))
        coded = self._on_grid(x, layer)
        if not layer.integer:
            return Map(self.convolved_floats(self.dequantize(coded).value, layer))
        return Sums(coded, layer, convolved_shape(coded.value.shape, layer))

    def max_pool(self, x: Tensor) -> Tensor:
        """See ``Operations``."""
        if not isinstance(x, Sums):
            return Map(self.max_pooled(self.map_floats(x)))
        # Whole numbers as floats: an integer convolution would have to be computed for every grid
        # that follows, and with an image's few channels it is no faster. Pooled before they are
        # multiplied with their unit, whose sign therefore goes to the weights.
        sign = np.where(x.layer.unit < 0, -1, 1)
        layer = self._whole(x.layer, sign)
        y = self.convolved_floats(self._operand(x.source, whole=True), layer)
        y = self.elementwise("Mul", self.max_pooled(y), np.abs(x.layer.unit)[:, None, None])
        return Map(self._ended(x, y))

    def _ended(self, x: Sums | MapSum, y: Value) -> Value:
        """Floats of sums after the ReLU or ReLU6 that follows them, if one does."""
        ceiling = x.ceiling if isinstance(x, Sums) else None
        if ceiling is not None:
            return self.clip(y, 0.0, ceiling)
        return self.elementwise("Relu", y) if x.rectified else y

    def _operand(self, x: Tensor, *, whole: bool) -> Value:
        """Floats; of codes the whole numbers or what they stand for."""
        if not isinstance(x, Coded):
            return self.value(x)
        return self.dequantized(x.value, ONE if whole else x.grid.step, x.carrier)

    def _whole(self, layer: Layer, sign: Any = 1) -> Layer:
        """An integer layer with its codes and whole biases as floats, times a channel's sign."""
        if layer.largest_sum() >= LARGEST_SUM:
            raise ValueError(f"{layer.name}: its sums are so large that no float32 holds them")
        return dataclasses.replace(
            layer,
            kernel=(_values(layer) * sign).astype("f4"),
            bias=(layer.bias * sign).astype("f4"),
        )

    def add_maps(self, a: Tensor, b: Tensor) -> Tensor:
        """See ``Operations``."""
        if isinstance(a, Coded) and isinstance(b, Coded):
            return MapSum(a, b)
        a, b = (self.map_floats(x) for x in (a, b))
        return Map(self.elementwise("Add", a, b))

    # --- sums -------------------------------------------------------------------------------------

    def times(self, x: Sums, factor: np.ndarray, *, fused: bool = False) -> Value:
        """Sums times a factor a channel, as floats.

        Args:
          x: of a map or of rows.
          factor: [N].
          fused: a quantizer follows, from bytes to bytes. Then rows are the columns of a map, for a
            pointwise convolution: ONNX Runtime requantizes its sums while they are in a cache,
            those of a matrix product after all are made.

        Returns:
          [..., N], of a map [B, N, H', W'], of fused rows [1, N, rows, 1].
        """
        layer, kind = x.layer, x.source.carrier
        if not kind.is_bytes:
            return self._float_times(x, factor)
        bias = self._constant_codes(layer.bias, factor, 0)
        value, pointwise = x.source.value, not x.source.is_map
        if pointwise:
            value = self.rows_of(value)
        if pointwise and not fused:
            weights = self._weights(layer, factor, 1)
            return self.of_rows(
                self.graph.add(
                    "Gemm",
                    [self.dequantized(value, ONE, kind), weights, bias],
                    (value.shape[0], len(factor)),
                    "f4",
                    name=layer.name,
                    alpha=1.0,
                    beta=1.0,  # the runtime's fusion looks for it
                ),
                x.shape,
            )
        if pointwise:
            length, channels = value.shape
            value = self.transposed(self.reshaped(value, (1, length, 1, channels)), (0, 3, 1, 2))
            shape: tuple[int, ...] = (1, len(factor), length, 1)
            attributes: dict[str, Any] = {"kernel_shape": [1, 1]}
        else:
            shape, attributes = convolved_shape(value.shape, layer), window(layer)
        given = [self.dequantized(value, ONE, kind), self._weights(layer, factor, 0), bias]
        return self.graph.add("Conv", given, shape, "f4", name=layer.name, **attributes)

    def _float_times(self, x: Sums, factor: np.ndarray) -> Value:
        """``times`` where a byte has no room for the input's codes: whole numbers as floats."""
        layer = self._whole(x.layer)
        if x.source.is_map:
            y = self.convolved_floats(x.source.value, layer)
            return self.elementwise("Mul", y, factor[:, None, None])
        return self.elementwise("Mul", self.dense_floats(x.source.value, layer), factor)

    def _weights(self, layer: Layer, factor: np.ndarray, axis: int) -> Value:
        """Codes of a layer times ``factor``: [K, N] with axis 1, [N, C, kh, kw] with axis 0."""
        codes = _values(layer)
        if axis == 0:
            codes = codes if codes.ndim == 4 else codes[None, None]
            codes = codes.transpose(3, 2, 0, 1)
        else:
            codes = codes.reshape(-1, codes.shape[-1])
        if signed_weights(layer) or self.dtype == np.int8:
            return self._constant_codes(codes.astype(np.int8), factor, axis)
        codes = (codes.astype(np.int16) + 128).astype(np.uint8)
        return self._constant_codes(codes, factor, axis, 128)

    def _constant_codes(self, codes: np.ndarray, step: np.ndarray, axis: int, zero=0) -> Value:
        operands = (codes, step, np.full(step.shape, zero, codes.dtype))
        given = [self.graph.constant(a) for a in operands]
        return self.graph.add("DequantizeLinear", given, codes.shape, "f4", axis=axis)

    # --- floats -----------------------------------------------------------------------------------

    def dense_floats(self, x: Value, layer: Layer) -> Value:
        """[..., K] -> [..., N] in floats."""
        rows = self.rows_of(x)
        bias = self.graph.constant(layer.bias, np.float32)
        given = [rows, self._float_weights(layer), bias]
        shape = (rows.shape[0], len(layer.bias))
        y = self.graph.add("Gemm", given, shape, "f4", name=layer.name)
        return self.of_rows(y, (*x.shape[:-1], len(layer.bias)))

    def convolved_floats(self, x: Value, layer: Layer) -> Value:
        """[B, C, H, W] -> [B, N, H', W'] in floats."""
        given = [x, self._float_weights(layer), self.graph.constant(layer.bias, np.float32)]
        shape = convolved_shape(x.shape, layer)
        return self.graph.add("Conv", given, shape, "f4", name=layer.name, **window(layer))

    def _float_weights(self, layer: Layer) -> Value:
        """The kernel, [K, N] or [N, C, kh, kw]; codes are dequantized when the file is opened.

        (By a cast: ONNX Runtime takes a ``DequantizeLinear`` of weights alone for a product that
        quantizes the activations by itself.)
        """
        kernel = _values(layer)
        scale = layer.scale
        if kernel.ndim == 4:
            kernel = kernel.transpose(3, 2, 0, 1)
            scale = None if scale is None else scale[:, None, None, None]
        weights = self.graph.constant(kernel)
        if not isinstance(layer.kernel, Codes):
            return weights
        return self.elementwise("Mul", self.cast(weights, np.float32), np.float32(scale))

    def max_pooled(self, x: Value) -> Value:
        """[B, C, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]."""
        batch, channels, height, width = x.shape
        shape = (batch, channels, (height + 1) // 2, (width + 1) // 2)
        return self.graph.add(
            "MaxPool",
            [x],
            shape,
            x.dtype,
            kernel_shape=[3, 3],
            strides=[2, 2],
            pads=[1, 1, 1, 1],
        )

    # --- maps -------------------------------------------------------------------------------------

    def map_floats(self, x: Tensor) -> Value:
        """[B, C, H, W] floats of any map."""
        if isinstance(x, Map):
            return x.value
        if isinstance(x, Coded):
            return self.dequantize(x).value
        if isinstance(x, MapSum):
            y = self.elementwise("Add", self.map_floats(x.a), self.map_floats(x.b))
            return self._ended(x, y)
        if isinstance(x, Sums):
            batch, channels, height, width = x.shape
            cells = self.transposed(self.value(x), (0, 2, 1))
            return self.reshaped(cells, (batch, channels, height, width))
        raise TypeError(f"{type(x).__name__} where a float map is expected")

    def map_shape(self, x: Tensor) -> tuple[int, int]:
        """See ``Operations``."""
        if isinstance(x, MapSum):
            x = x.a
        shape = x.shape if isinstance(x, Sums) else x.value.shape
        return shape[2], shape[3]

    def tokens(self, x: Tensor) -> Tensor:
        """See ``Operations``."""
        if isinstance(x, Sums):
            return self.value(x)
        return self._cells(self.map_floats(x))

    def to_map(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """See ``Operations``."""
        x = self.value(x)
        batch, _, channels = x.shape
        return Map(self.reshaped(self.transposed(x, (0, 2, 1)), (batch, channels, *shape)))

    def image_map(
        self, images: Tensor, sizes: Tensor, mean: Sequence[float], std: Sequence[float]
    ) -> Tensor:
        """See ``Operations``."""
        batch, height, width, channels = images.shape
        # Line by line, pixels beside channels: long runs, whatever a runtime does to layouts.
        x = self.reshaped(images, (batch, height, width * channels))
        x = self.divide(self.cast(x, np.float32), np.float32(255))
        x = self.subtract(x, np.tile(np.array(mean, np.float32), width))
        x = self.divide(x, np.tile(np.array(std, np.float32), width))
        ends = [self.reshaped(self.sliced(sizes, 1, i, i + 1), (batch, 1, 1)) for i in range(2)]
        lines = self.less(np.arange(height, dtype=np.int32)[None, :, None], ends[0])
        columns = np.repeat(np.arange(width, dtype=np.int32), channels)[None, None]
        inside = [self.floats(v) for v in (lines, self.less(columns, ends[1]))]
        x = self.multiply(self.multiply(x, inside[0]), inside[1])
        x = self.reshaped(x, (batch, height, width, channels))
        return Map(self.transposed(x, (0, 3, 1, 2)))

    # --- sums as floats ---------------------------------------------------------------------------

    def sums_as_floats(self, x: Sums) -> Value:
        """See ``FloatOperations``; of a map the cells in a row, [B, H * W, N]."""
        y = (
            self._of_channels(x)
            if is_depthwise(x.layer)
            else self.times(self._as_rows(x), x.layer.unit)
        )
        y = self._ended(x, y)
        # Not as rows: a runtime would not fuse a product whose result goes to a quantizer, too.
        return dataclasses.replace(y, rows=None)

    def _of_channels(self, x: Sums) -> Value:
        """Values of a depthwise convolution: a matrix has no room for one; whole float numbers."""
        layer = self._whole(x.layer)
        y = self.convolved_floats(self._operand(x.source, whole=True), layer)
        return self._cells(self.elementwise("Mul", y, x.layer.unit[:, None, None]))

    def _cells(self, value: Value) -> Value:
        """[B, C, H, W] -> [B, H * W, C]."""
        batch, channels, height, width = value.shape
        cells = self.reshaped(value, (batch, channels, height * width))
        return self.transposed(cells, (0, 2, 1))

    def _as_rows(self, x: Sums) -> Sums:
        """A convolution as a dense layer of every window's cells: floats want no convolution.

        (A convolution whose output stays float is not computed with integers.)
        """
        if not x.source.is_map:
            return x
        batch, channels, height, width = x.shape
        patches = self._patches(x.source, x.layer, (height, width))
        patches = self.transposed(patches, (0, 2, 3, 1))
        rows = self.reshaped(patches, (batch * height * width, -1))
        shape = (batch, height * width, channels)
        source = Coded(
            self.of_rows(rows, (*shape[:2], rows.shape[1])), x.source.grid, x.source.carrier
        )
        return dataclasses.replace(x, source=source, shape=shape)

    def _patches(self, x: Coded, layer: Layer, size: tuple[int, int]) -> Value:
        """[B, C, H, W] -> [B, kh * kw * C, H', W'], what the kernel sees."""
        assert layer.window is not None
        w = layer.window
        (top, bottom), (left, right) = w.padding
        value = x.value
        batch, channels, height, width = value.shape
        if top or bottom or left or right:
            pads = self.graph.constant((0, 0, top, left, 0, 0, bottom, right), np.int64)
            zero = self.graph.constant(x.carrier.zero, x.carrier.dtype)
            shape = (batch, channels, height + top + bottom, width + left + right)
            value = self.graph.add("Pad", [value, pads, zero], shape, value.dtype)
        taps = []
        for u in range(_values(layer).shape[0]):
            for v in range(_values(layer).shape[1]):
                tap = value
                for axis, start in ((2, u * w.dilation[0]), (3, v * w.dilation[1])):
                    step = w.strides[axis - 2]
                    stop = start + step * (size[axis - 2] - 1) + 1
                    tap = self.sliced(tap, axis, start, stop, step)
                taps.append(tap)
        return taps[0] if len(taps) == 1 else self.concatenate(taps, 1)


def signed_weights(layer: Layer) -> bool:
    """Whether pairs of products with signed weights cannot saturate, see the module."""
    assert layer.grid is not None
    assert isinstance(layer.kernel, Codes)
    largest = (1 << layer.grid.bits) - 1
    return 2 * largest * (1 << layer.kernel.bits - 1) <= LARGEST_PAIR


def window(layer: Layer) -> dict[str, Any]:
    """Attributes of a ``Conv``."""
    w = layer.window
    assert w is not None
    (top, bottom), (left, right) = w.padding
    return {
        "kernel_shape": list(_values(layer).shape[:2]),
        "strides": list(w.strides),
        "dilations": list(w.dilation),
        "pads": [top, left, bottom, right],
        **({"group": _values(layer).shape[3]} if w.depthwise else {}),
    }


def is_depthwise(layer: Layer) -> bool:
    """Whether a layer is a convolution of each channel with a kernel of its own."""
    return layer.window is not None and layer.window.depthwise


def convolved_shape(shape: tuple[int, ...], layer: Layer) -> tuple[int, int, int, int]:
    """[B, C, H, W] -> [B, N, H', W']."""
    w, kernel = layer.window, _values(layer).shape
    assert w is not None
    sizes = []
    for i in range(2):
        reach = w.dilation[i] * (kernel[i] - 1) + 1
        sizes.append((shape[2 + i] + sum(w.padding[i]) - reach) // w.strides[i] + 1)
    return shape[0], kernel[3], sizes[0], sizes[1]


def _values(layer: Layer) -> np.ndarray:
    return layer.kernel.values if isinstance(layer.kernel, Codes) else layer.kernel
