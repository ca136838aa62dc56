"""The augmentation of DETR, in NumPy and Pillow on :class:`Example`.

Rules follow ``datasets/transforms.py`` of facebookresearch/detr: flip; then with equal chance
either one random resize, or a resize, a crop of random size and another resize. Boxes are
``(x1, y1, x2, y2)`` in pixels throughout. Random functions take a ``numpy.random.Generator``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance

from aqdetr_jax.data import resampling
from aqdetr_jax.data.dataset import Example
from aqdetr_jax.data.images import MAX_PIXELS


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Training augmentation; the defaults change nothing but flip.

    DETR on COCO uses ``scales=range(480, 801, 32)``, ``max_size=1333``,
    ``crop_resize=(400, 500, 600)``, ``crop_size=(384, 600)`` and ``crop_probability=0.5``.

    Attributes:
      flip_probability: chance of a horizontal flip.
      scales: short sides (pixels) to draw from; () keeps the size.
      max_size: longest side after resizing (pixels); None sets no limit.
      crop_probability: chance of the crop branch.
      crop_resize: short sides to draw from before the crop; () crops the image as it is.
      crop_size: (smallest, largest) side of the crop in pixels.
      colour_jitter: largest relative change of brightness, contrast and saturation; 0 is off.
    """

    flip_probability: float = 0.5
    scales: tuple[int, ...] = ()
    max_size: int | None = None
    crop_probability: float = 0.0
    crop_resize: tuple[int, ...] = ()
    crop_size: tuple[int, int] = (384, 600)
    colour_jitter: float = 0.0

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
          ValueError: a value is out of range; the message names the field.
        """
        for field in ("flip_probability", "crop_probability"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"AugmentConfig.{field} must be in [0, 1]")
        if any(s < 1 for s in (*self.scales, *self.crop_resize)):
            raise ValueError("AugmentConfig.scales and crop_resize must be positive")
        if not 1 <= self.crop_size[0] <= self.crop_size[1]:
            raise ValueError(f"AugmentConfig.crop_size must be (min, max): {self.crop_size}")
        if not 0 <= self.colour_jitter < 1:
            raise ValueError("AugmentConfig.colour_jitter must be in [0, 1)")


DETR_COCO = AugmentConfig(
    scales=tuple(range(480, 801, 32)),
    max_size=1333,
    crop_probability=0.5,
    crop_resize=(400, 500, 600),
    crop_size=(384, 600),
)


def resized_size(
    height: int, width: int, short_side: int, max_size: int | None = None
) -> tuple[int, int]:
    """The resize rule of DETR: short side to ``short_side`` unless the long side gets too long.

    The long side is cut off to an integer, as in ``get_size_with_aspect_ratio`` of
    facebookresearch/detr; when ``max_size`` binds, the short side is first rounded.

    Args:
      height: pixels.
      width: pixels.
      short_side: wanted length of the shorter side.
      max_size: limit on the longer side, or None.

    Returns:
      ``(height, width)`` of the result, both at least 1.
    """
    if max_size is not None:
        shorter, longer = float(min(height, width)), float(max(height, width))
        if longer / shorter * short_side > max_size:
            short_side = round(max_size * shorter / longer)
    if min(height, width) == short_side:
        return height, width
    if width < height:
        return max(int(short_side * height / width), 1), max(short_side, 1)
    return max(short_side, 1), max(int(short_side * width / height), 1)


def fitted_size(height: int, width: int, bucket: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same aspect ratio, at most the given one, that fits a bucket.

    Args:
      height: pixels.
      width: pixels.
      bucket: ``(height, width)`` of the bucket.

    Returns:
      ``(height, width)``; unchanged when it fits already.
    """
    factor = min(bucket[0] / height, bucket[1] / width)
    if factor >= 1:
        return height, width
    # The binding side fills the bucket exactly; rounding must not push the other one over it.
    return (
        min(max(round(height * factor), 1), bucket[0]),
        min(max(round(width * factor), 1), bucket[1]),
    )


def resize(
    example: Example,
    size: tuple[int, int],
    resample: Callable[[np.ndarray, tuple[int, int]], np.ndarray] = resampling.resize_exact,
) -> Example:
    """Resizes image (bilinear with area support, i.e. antialiased) and boxes.

    Args:
      example: the image with boxes.
      size: ``(height, width)`` in pixels.
      resample: of the pixels.
    """
    height, width = example.image.shape[:2]
    if (height, width) == tuple(size):
        return example
    boxes = _scaled(example, size)
    return dataclasses.replace(example, image=resample(example.image, size), boxes=boxes)


def _scaled(example: Example, size: tuple[int, int]) -> np.ndarray:
    """The boxes of an example that is resized."""
    height, width = example.image.shape[:2]
    factor = np.array([size[1] / width, size[0] / height] * 2, np.float32)
    return (example.boxes * factor).astype(np.float32)


def horizontal_flip(example: Example) -> Example:
    """Mirrors image and boxes left to right."""
    width = example.image.shape[1]
    x1, y1, x2, y2 = example.boxes.T
    boxes = np.stack([width - x2, y1, width - x1, y2], 1).astype(np.float32)
    return dataclasses.replace(example, image=resampling.mirrored(example.image), boxes=boxes)


def crop(example: Example, top: int, left: int, height: int, width: int) -> Example:
    """Cuts out a window; boxes are clipped to it, and dropped when nothing of them is left.

    Args:
      example: the image with boxes.
      top: first row of the window.
      left: first column of the window.
      height: rows; the window must lie in the image.
      width: columns.

    Raises:
      ValueError: the window does not lie in the image.
    """
    full_height, full_width = example.image.shape[:2]
    if top < 0 or left < 0 or top + height > full_height or left + width > full_width:
        raise ValueError(
            f"crop window {top, left, height, width} leaves the image {full_height}x{full_width}"
        )
    image = example.image[top : top + height, left : left + width]
    return _cut(example, image, example.boxes, (top, left, height, width))


def _cut(
    example: Example, image: np.ndarray, boxes: np.ndarray, window: tuple[int, int, int, int]
) -> Example:
    """An example that became ``image``, a window of what ``boxes`` lie in."""
    top, left, height, width = window
    limit = np.array([width, height] * 2, np.float32)
    boxes = np.clip(boxes - np.array([left, top] * 2, np.float32), 0, limit)
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return select(dataclasses.replace(example, image=image, boxes=boxes), keep)


def select(example: Example, keep: np.ndarray) -> Example:
    """Keeps the boxes where ``keep`` (bool [N]) is True."""
    return dataclasses.replace(
        example,
        boxes=example.boxes[keep],
        labels=example.labels[keep],
        iscrowd=example.iscrowd[keep],
    )


def random_window(
    rng: np.random.Generator, size: tuple[int, int], min_size: int, max_size: int
) -> tuple[int, int, int, int]:
    """A window ``(top, left, height, width)``, each side from ``[min_size, min(side, max_size)]``.

    A side shorter than ``min_size`` is kept whole.

    Args:
      rng: all randomness comes from it.
      size: ``(height, width)`` of the image.
      min_size: pixels.
      max_size: pixels.
    """
    width = _draw_side(rng, min_size, min(size[1], max_size))
    height = _draw_side(rng, min_size, min(size[0], max_size))
    top = int(rng.integers(0, size[0] - height + 1))
    left = int(rng.integers(0, size[1] - width + 1))
    return top, left, height, width


def _draw_side(rng: np.random.Generator, low: int, high: int) -> int:
    return high if high <= low else int(rng.integers(low, high + 1))


def colour_jitter(example: Example, rng: np.random.Generator, strength: float) -> Example:
    """Scales brightness, contrast and saturation, each by a factor in ``1 +- strength``."""
    picture = Image.fromarray(example.image)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhance(picture).enhance(1 + rng.uniform(-strength, strength))
    return dataclasses.replace(example, image=np.asarray(picture))


def augment(
    example: Example,
    rng: np.random.Generator,
    config: AugmentConfig,
    bucket: tuple[int, int] | None = None,
) -> Example:
    """Applies the training augmentation of DETR and fits the result into a bucket.

    The last resize goes straight to the size that fits, so no pixel is interpolated once more
    than the official rule does.

    Args:
      example: the image with boxes.
      rng: all randomness comes from it.
      config: what to do.
      bucket: ``(height, width)`` the result must not exceed, or None.
    """
    if rng.random() < config.flip_probability:
        example = horizontal_flip(example)
    if rng.random() < config.crop_probability:
        size = _random_size(example, rng, config.crop_resize, None, None)
        window = random_window(rng, size, *config.crop_size)
        image = resampling.resize_fast(example.image, size, window)
        example = _cut(example, image, _scaled(example, size), window)
    if config.colour_jitter > 0:
        example = colour_jitter(example, rng, config.colour_jitter)
    size = _random_size(example, rng, config.scales, config.max_size, bucket)
    return resize(example, size, resampling.resize_fast)


def _random_size(
    example: Example,
    rng: np.random.Generator,
    scales: Sequence[int],
    max_size: int | None,
    bucket: tuple[int, int] | None,
) -> tuple[int, int]:
    size = example.image.shape[0], example.image.shape[1]
    if scales:
        size = resized_size(*size, int(scales[int(rng.integers(len(scales)))]), max_size)
        excess = size[0] * size[1] / MAX_PIXELS
        if excess > 1:  # a sliver of an image, blown up by its short side
            height, width = (max(1, int(side / math.sqrt(excess))) for side in size)
            size = height, width
    if bucket is not None:
        size = fitted_size(*size, bucket)
    return size
