"""Resizing of uint8 pictures: bilinear with area support (antialiased), as Pillow defines it.

Two implementations of one formula. Evaluation takes Pillow's own, whose pixels published figures
refer to. Training takes SIMD instructions where ``cykooz-resizer`` has a wheel: a quarter of the
time, and Pillow's pixels but for the rounding of weights of 16 bits, which moves less than one in
a hundred by one of 255 steps, the same with every instruction set.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

try:
    import cykooz_resizer as simd
except ImportError:  # no wheel for this platform, see pyproject.toml
    simd = None


def resize_exact(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's bilinear resize.

    Args:
      image: uint8 [H, W, 3].
      size: ``(height, width)`` of the result, pixels.

    Returns:
      uint8 [*size, 3], read-only.
    """
    picture = Image.fromarray(image)
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def resize_fast(
    image: np.ndarray,
    size: tuple[int, int],
    window: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """:func:`resize_exact` within one of 255 steps, by SIMD instructions where they are at hand.

    Rows first, then columns, as Pillow does for all but very flat targets: the bytes between the
    passes are then rounded alike.

    Args:
      image: uint8 [H, W, 3].
      size: ``(height, width)`` of the result, pixels.
      window: ``(top, left, height, width)`` of the part of the result that is wanted, and made.

    Returns:
      uint8 [*size, 3], or the window of it; not to be written to.
    """
    top, left, height, width = window or (0, 0, *size)
    if simd is None or size == image.shape[:2]:
        whole = image if size == image.shape[:2] else resize_exact(image, size)
        return whole[top : top + height, left : left + width]
    scale = image.shape[0] / size[0]
    reach = max(scale, 1.0)  # of the filter, in rows
    first = max(math.floor(top * scale - reach), 0)
    image = image[first : math.ceil((top + height) * scale + reach)]
    source = simd.ImageData(image.shape[1], image.shape[0], _RGB, image.tobytes())
    if (left, width, size[1]) != (0, source.width, source.width):
        start, part = _part(left, width, source.width / size[1], source.width)
        box = simd.CropBox(start, 0, part, source.height)
        source = _resized(source, width, source.height, box)
    if (height, size[0]) != (source.height, source.height):
        start, part = _part(top - first / scale, height, scale, source.height)
        source = _resized(source, width, height, simd.CropBox(0, start, width, part))
    return np.frombuffer(source.get_buffer(), np.uint8).reshape(height, width, 3)


def _part(start: float, length: int, scale: float, limit: int) -> tuple[float, float]:
    """Start and length in pixels of the source, in it whatever the rounding."""
    begin = min(max(start * scale, 0.0), float(limit))
    return begin, min(length * scale, limit - begin)


def _resized(source: simd.ImageData, width: int, height: int, box: simd.CropBox) -> simd.ImageData:
    target = simd.ImageData(width, height, _RGB)
    simd.Resizer().resize(source, target, simd.ResizeOptions(_BILINEAR, crop_box=box))
    return target


def mirrored(image: np.ndarray) -> np.ndarray:
    """An image uint8 [H, W, 3] left to right, read-only; NumPy takes four times as long."""
    return np.asarray(Image.fromarray(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT))


if simd is not None:
    _RGB = simd.PixelType.U8x3
    _BILINEAR = simd.ResizeAlg.convolution(simd.FilterType.bilinear)
