"""2-d convolution and its two gradients (NHWC, HWIO), each in the form that is fastest.

XLA has a form of its own for every direction, and on accelerators that is what is used. On a CPU
it is as fast as the machine for most shapes, with these exceptions (measured on two cores of an
AVX-512 server, float32; shapes of ResNet-50 and of the small models, batches of 1 to 16):

* 1x1 kernels are matrix products. As convolutions they lose a tenth forward, and the kernel's
  gradient, whose "kernel" is the whole image, three quarters and more.
* The gradient of a larger kernel, too, is a convolution with the cotangent for a kernel; one of
  more than ``LARGE_COTANGENT`` elements leaves the cache and costs up to three times what a matrix
  product a tap does. Below it, and where channels are few (a stem), XLA's form is the faster.
* XLA has no depthwise form there: its grouped convolution takes a channel at a time. A sum over the
  kernel's taps, each a product of arrays, is 10 to 35 times as fast forward and 4 to 350 times for
  the input; for the kernel, row by row, 2 to 100 times.

The platform is that which the program is compiled for, not the one that compiles it. Sums are taken
in another order than XLA's: integer-valued ones are exact in any.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

LARGE_COTANGENT = 1 << 21
"""Elements of a cotangent from which on a CPU takes a kernel's gradient tap by tap."""

FEW_CHANNELS = 64
"""A matrix product of fewer input channels a tap does not fill a CPU's vector units."""

_LAYOUT = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass(frozen=True)
class Window:
    """How a kernel moves over its input.

    Attributes:
      strides: (vertical, horizontal).
      padding: zeros added, ((top, bottom), (left, right)).
      dilation: distance of a kernel's taps.
      depthwise: every channel has a kernel of its own, ``[kh, kw, 1, C]``.
    """

    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    depthwise: bool = False


def same_padding(
    shape: tuple[int, ...], size: int, stride: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """TensorFlow's "SAME" zeros, of an odd number one more at the bottom and at the right.

    Args:
      shape: (height, width) of the input.
      size: of the kernel.
      stride: of the result, which has ``ceil(n / stride)`` rows and columns.
    """
    found = []
    for n in shape:
        total = max((-(-n // stride) - 1) * stride + size - n, 0)
        found.append((total // 2, total - total // 2))
    return found[0], found[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def convolve(window: Window, x: Array, kernel: Array, dtype: DTypeLike) -> Array:
    """``y[b, i, j, n] = sum_uvc x[b, s i + d u, s j + d v, c] kernel[u, v, c, n]``, x padded.

    Args:
      window: strides, padding and dilation.
      x: ``[B, H, W, C]``.
      kernel: ``[kh, kw, C, N]``; of a depthwise window ``[kh, kw, 1, C]``, and n is c.
      dtype: of the sums and of the result.

    Returns:
      ``[B, H', W', N]``. Its derivatives are the two functions below.
    """

    def general(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            window.strides,
            window.padding,
            rhs_dilation=window.dilation,
            dimension_numbers=_LAYOUT,
            feature_group_count=x.shape[3] if window.depthwise else 1,
            preferred_element_type=dtype,
        )

    def pointwise(x, kernel):
        return _rows_product(_every(x, window.strides), kernel[0, 0], 0, dtype)

    if window.depthwise:
        by_taps = functools.partial(depthwise_taps, window, dtype=dtype)
        return lax.platform_dependent(x, kernel, cpu=by_taps, default=general)
    if not _is_pointwise(window, kernel.shape):
        return general(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=pointwise, default=general)


def input_gradient(
    window: Window, cotangent: Array, kernel: Array, shape: tuple[int, ...], dtype: DTypeLike
) -> Array:
    """``convolve``'s cotangent of ``x``.

    Args:
      window: as given to ``convolve``.
      cotangent: of its result, ``[B, H', W', N]``.
      kernel: ``[kh, kw, C, N]``.
      shape: of ``x``.
      dtype: of the sums and of the result.

    Returns:
      ``[B, H, W, C]``.
    """

    def general(cotangent, kernel):
        # The flipped kernel over the cotangent, whose strides have become gaps.
        padding = []
        for i, (low, _) in enumerate(window.padding):
            taps = window.dilation[i] * (kernel.shape[i] - 1) + 1
            reach = window.strides[i] * (cotangent.shape[1 + i] - 1) + 1
            before = taps - 1 - low
            padding.append((before, shape[1 + i] + taps - 1 - reach - before))
        return lax.conv_general_dilated(
            cotangent,
            lax.rev(kernel, (0, 1)),
            (1, 1),
            padding,
            lhs_dilation=window.strides,
            rhs_dilation=window.dilation,
            dimension_numbers=_LAYOUT if window.depthwise else ("NHWC", "HWOI", "NHWC"),
            feature_group_count=shape[3] if window.depthwise else 1,
            preferred_element_type=dtype,
        )

    def pointwise(cotangent, kernel):
        rows = _rows_product(cotangent, kernel[0, 0], 1, dtype)
        gaps = [(0, 0, 0)]
        for i, stride in enumerate(window.strides):
            reach = stride * (cotangent.shape[1 + i] - 1) + 1
            gaps.append((0, shape[1 + i] - reach, stride - 1))
        return lax.pad(rows, jnp.zeros((), dtype), (*gaps, (0, 0, 0)))

    def scattered(cotangent, kernel):
        total = jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))
        for i, j in itertools.product(*(range(n) for n in kernel.shape[:2])):
            gaps = [(0, 0, 0)]
            for axis, tap in enumerate((i, j)):
                stride = window.strides[axis]
                first = window.dilation[axis] * tap - window.padding[axis][0]
                reach = stride * (cotangent.shape[1 + axis] - 1) + 1
                gaps.append((first, shape[1 + axis] - reach - first, stride - 1))
            if window.depthwise:
                rows = cotangent.astype(total.dtype) * kernel[i, j, 0].astype(total.dtype)
            else:
                rows = _rows_product(cotangent, kernel[i, j], 1, total.dtype)
            total += lax.pad(rows, jnp.zeros((), total.dtype), (*gaps, (0, 0, 0)))
        return total.astype(dtype)

    if window.depthwise:
        return lax.platform_dependent(cotangent, kernel, cpu=scattered, default=general)
    if not _is_pointwise(window, kernel.shape):
        small = math.prod(cotangent.shape[1:3]) <= math.prod(kernel.shape[:2])
        return (scattered if small else general)(cotangent, kernel)
    return lax.platform_dependent(cotangent, kernel, cpu=pointwise, default=general)


def kernel_gradient(
    window: Window, x: Array, cotangent: Array, size: tuple[int, ...], dtype: DTypeLike
) -> Array:
    """``convolve``'s cotangent of ``kernel``.

    Args:
      window: as given to ``convolve``.
      x: ``[B, H, W, C]``.
      cotangent: of its result, ``[B, H', W', N]``.
      size: (kh, kw) of the kernel.
      dtype: of the sums and of the result.

    Returns:
      ``[kh, kw, C, N]``.
    """

    def general(x, cotangent, dtype=dtype):
        # Batch and channels change places, and so do strides and dilation; every tap is a position.
        padding = []
        for i, (low, _) in enumerate(window.padding):
            reach = window.strides[i] * (cotangent.shape[1 + i] - 1) + 1
            taps = window.dilation[i] * (size[i] - 1) + 1
            padding.append((low, reach + taps - 1 - x.shape[1 + i] - low))
        return lax.conv_general_dilated(
            x,
            cotangent,
            window.dilation,
            padding,
            rhs_dilation=window.strides,
            dimension_numbers=("CHWN", "IHWO", "HWNC"),
            batch_group_count=x.shape[3] if window.depthwise else 1,
            preferred_element_type=dtype,
        )

    def taps(x, cotangent):
        x = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
        cuts = _taps(window, x, size, cotangent.shape[1:3])
        parts = [_columns_product(tap, cotangent, dtype) for tap in cuts]
        return jnp.stack(parts).reshape(*size, x.shape[3], cotangent.shape[3])

    def row_by_row(x, cotangent):
        # What is read and summed at a time fits a cache, where a reduction a tap would read all of
        # both operands. Images stay apart until the end: they may be other devices'.
        x = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
        batch, height, width, channels = cotangent.shape
        reach = window.dilation[0] * (size[0] - 1) + 1

        def add(row, total):
            g = lax.dynamic_slice_in_dim(cotangent, row, 1, 1).astype(total.dtype)
            rows = lax.dynamic_slice_in_dim(x, row * window.strides[0], reach, 1)
            rows = rows.astype(total.dtype)
            return total + jnp.stack([tap * g for tap in _taps(window, rows, size, (1, width))])

        start = jnp.zeros(
            (math.prod(size), batch, 1, width, channels), jnp.promote_types(dtype, jnp.float32)
        )
        total = lax.fori_loop(0, height, add, start).sum((1, 2, 3))
        return total.reshape(*size, 1, channels).astype(dtype)

    def narrow(x, cotangent):
        # Its library sums in float32 and returns the operands' dtype; asked for another, XLA would
        # widen the operands.
        return general(x, cotangent, x.dtype).astype(dtype)

    forms = {} if x.dtype == dtype else {"cuda": narrow}
    if window.depthwise:
        forms["cpu"] = row_by_row
        return lax.platform_dependent(x, cotangent, **forms, default=general)
    few = x.shape[3] < FEW_CHANNELS or cotangent.size < LARGE_COTANGENT
    if not few or _is_pointwise(window, size):
        forms["cpu"] = taps
    if not forms:
        return general(x, cotangent)
    return lax.platform_dependent(x, cotangent, **forms, default=general)


def _convolve_fwd(window, x, kernel, dtype):
    return convolve(window, x, kernel, dtype), (x, kernel)


def _convolve_bwd(window, dtype, residuals, cotangent):
    del dtype
    x, kernel = residuals
    return (
        input_gradient(window, cotangent, kernel, x.shape, x.dtype),
        kernel_gradient(window, x, cotangent, kernel.shape[:2], kernel.dtype),
    )


convolve.defvjp(_convolve_fwd, _convolve_bwd)


def depthwise_taps(window: Window, x: Array, kernel: Array, dtype: DTypeLike) -> Array:
    """``convolve`` of a depthwise window as a sum of arrays, of whole numbers or floats."""
    wide = jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype
    size = kernel.shape[:2]
    result = []
    for i, (low, high) in enumerate(window.padding):
        reach = window.dilation[i] * (size[i] - 1) + 1
        result.append((x.shape[1 + i] + low + high - reach) // window.strides[i] + 1)
    total = jnp.zeros((x.shape[0], *result, x.shape[3]), wide)
    x = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
    weights = kernel.astype(wide).reshape(-1, x.shape[3])
    for tap, weight in zip(_taps(window, x, size, result), weights, strict=True):
        total += tap.astype(wide) * weight
    return total.astype(dtype)


def _taps(window: Window, x: Array, size: Sequence[int], result: Sequence[int]) -> Iterator[Array]:
    """What every tap of a kernel reads of a padded input, ``[B, *result, C]`` each."""
    spans = [s * (n - 1) + 1 for s, n in zip(window.strides, result, strict=True)]
    for i, j in itertools.product(*(range(n) for n in size)):
        top, left = window.dilation[0] * i, window.dilation[1] * j
        yield _every(x[:, top : top + spans[0], left : left + spans[1]], window.strides)


def _is_pointwise(window: Window, size: tuple[int, ...]) -> bool:
    return size[:2] == (1, 1) and window.padding == ((0, 0), (0, 0))


def _every(x: Array, strides: tuple[int, int]) -> Array:
    """Every n-th row and column of ``[B, H, W, C]``."""
    return x if strides == (1, 1) else x[:, :: strides[0], :: strides[1]]


def _rows_product(x: Array, matrix: Array, axis: int, dtype: DTypeLike) -> Array:
    """``[B, H, W, K]`` times a matrix along its ``axis``."""
    return lax.dot_general(x, matrix, (((3,), (axis,)), ((), ())), preferred_element_type=dtype)


def _columns_product(a: Array, b: Array, dtype: DTypeLike) -> Array:
    """``sum_bhw a[b, h, w, i] b[b, h, w, j]`` -> ``[i, j]``.

    XLA's CPU product wants its left operand's rows last and copies it for that. Here the smaller of
    the operands is copied, if the result, then the wrong way round, is not larger than the gain.
    """
    rows, (i, j) = math.prod(a.shape[:3]), (a.shape[3], b.shape[3])
    a, b = a.reshape(rows, i), b.reshape(rows, j)
    dims = (((0,), (0,)), ((), ()))
    if rows * i <= rows * j + i * j:
        return lax.dot_general(a, b, dims, preferred_element_type=dtype)
    return lax.dot_general(b, a, dims, preferred_element_type=dtype).T
