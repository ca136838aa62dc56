"""2-d convolution and its two gradients (NHWC, HWIO), each in the form that is fastest.

XLA has a form of its own for every direction, and on accelerators that is what is used. On a CPU
it is as fast as the machine for most shapes, with these exceptions (measured on two cores of an
AVX-512 server, float32; shapes of ResNet-50 and of the small models, batches of 1 to 16):

* 1x1 kernels are matrix products. As convolutions they lose a tenth forward, and the kernel's
  gradient, whose "kernel" is the whole image, three quarters and more.
* The gradient of a larger kernel, too, is a convolution with the cotangent for a kernel; one of
  more than ``LARGE_COTANGENT`` elements leaves the cache and costs up to three times what a matrix
  product a tap does. Below it, and where channels are few (a stem), XLA's form is the faster.

The platform is that which the program is compiled for, not the one that compiles it. Sums are taken
in another order than XLA's: integer-valued ones are exact in any.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

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
    """

    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def convolve(window: Window, x: Array, kernel: Array, dtype: DTypeLike) -> Array:
    """``y[b, i, j, n] = sum_uvc x[b, s i + d u, s j + d v, c] kernel[u, v, c, n]``, x padded.

    Args:
      window: strides, padding and dilation.
      x: ``[B, H, W, C]``.
      kernel: ``[kh, kw, C, N]``.
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
            preferred_element_type=dtype,
        )

    def pointwise(x, kernel):
        return _rows_product(_every(x, window.strides), kernel[0, 0], 0, dtype)

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
            dimension_numbers=("NHWC", "HWOI", "NHWC"),
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
            rows = _rows_product(cotangent, kernel[i, j], 1, total.dtype)
            total += lax.pad(rows, jnp.zeros((), total.dtype), (*gaps, (0, 0, 0)))
        return total.astype(dtype)

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
            preferred_element_type=dtype,
        )

    def taps(x, cotangent):
        parts = [_columns_product(tap, cotangent, dtype) for tap in _taps(window, x, cotangent)]
        return jnp.stack(parts).reshape(*size, x.shape[3], cotangent.shape[3])

    def _taps(window, x, cotangent):
        x = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
        spans = [s * (n - 1) + 1 for s, n in zip(window.strides, cotangent.shape[1:3], strict=True)]
        for i in range(size[0]):
            for j in range(size[1]):
                top, left = window.dilation[0] * i, window.dilation[1] * j
                yield _every(x[:, top : top + spans[0], left : left + spans[1]], window.strides)

    def narrow(x, cotangent):
        # Its library sums in float32 and returns the operands' dtype; asked for another, XLA would
        # widen the operands.
        return general(x, cotangent, x.dtype).astype(dtype)

    forms = {} if x.dtype == dtype else {"cuda": narrow}
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
