"""Drawing of one generated scene: background, clutter, objects with occlusion, light and noise.

Pure functions of a ``numpy.random.Generator``. An object's box is the tight box of its drawn mask,
amodal: parts hidden by later objects count, parts outside the image do not.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from aqdetr_jax.data.shapes.objects import CLASS_NAMES, fill, object_mask, pattern, rgb

if TYPE_CHECKING:
    from aqdetr_jax.data.shapes.spec import ShapesSpec

GENERATOR_VERSION = "3"
# Box areas: square roots of the bounds in pixels. A margin keeps rasterisation from moving an
# object over COCO's bounds (32 and 96).
_SMALL, _MEDIUM, _LARGE = (13.0, 31.0), (33.0, 92.0), (98.0, 126.0)
_MAX_EXTRA_IN_LARGE_SCENE = 5
_PLACEMENTS = 6


@dataclasses.dataclass(frozen=True)
class Scene:
    """One drawn scene.

    Attributes:
      image: uint8 [S, S, 3] RGB.
      boxes: float32 [N, 4] xyxy pixels.
      labels: int32 [N].
      visible: float32 [N], share of each object's in-image pixels that stays uncovered.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    visible: np.ndarray


def render_scene(rng: np.random.Generator, spec: ShapesSpec, size: int) -> Scene:
    """Draws one scene of ``size`` x ``size`` pixels.

    Args:
      rng: all randomness comes from it.
      spec: difficulty.
      size: image side in pixels.

    Returns:
      The scene; boxes are in drawing order (later ones lie in front).
    """
    canvas = _background(rng, spec, size)
    owner = np.full((size, size), -1, np.int16)
    boxes: list[tuple[float, float, float, float]] = []
    labels: list[int] = []
    totals: list[int] = []
    for target in _object_sizes(rng, spec, size):
        label = int(rng.integers(len(CLASS_NAMES)))
        alpha = object_mask(rng, label, target, spec.min_side)
        placed = _place(rng, spec, alpha, owner, totals, size, target)
        if placed is None:
            continue
        top, left, crop, solid = placed
        window = (slice(top, top + crop.shape[0]), slice(left, left + crop.shape[1]))
        colours = fill(rng, spec, label, crop.shape, canvas[window])
        canvas[window] += crop[..., None] * (colours - canvas[window])
        owner[window][solid] = len(labels)
        boxes.append(_tight_box(solid, top, left))
        labels.append(label)
        totals.append(int(solid.sum()))
    if spec.clutter > 0 and rng.random() < 0.5:
        _front_strokes(rng, canvas, size)
    left_over = np.bincount(owner[owner >= 0].ravel(), minlength=len(labels))
    visible = left_over / np.maximum(np.array(totals, np.float64), 1) if labels else np.zeros(0)
    return Scene(
        image=_camera(rng, spec, canvas, size),
        boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
        labels=np.asarray(labels, np.int32),
        visible=visible.astype(np.float32),
    )


def _object_sizes(rng: np.random.Generator, spec: ShapesSpec, size: int) -> list[float]:
    """Square roots of the wanted box areas, large objects first (they lie behind)."""
    small, medium, large = (share / sum(spec.size_mix) for share in spec.size_mix)
    largest = min(_LARGE[1], 0.97 * size)
    if largest <= _LARGE[0]:  # No large object fits: its share goes to the medium ones.
        medium, large = medium + large, 0.0
    if rng.random() < spec.empty:
        return []
    # A large object comes at most once an image, so its share of boxes fixes its share of images.
    large_images = min(large * spec.mean_objects, 0.95)
    extra = min(_MAX_EXTRA_IN_LARGE_SCENE, spec.max_objects - 1)
    sizes = []
    if rng.random() < large_images / (1 - spec.empty):
        sizes.append(rng.uniform(_LARGE[0], largest))
        count = int(rng.integers(0, extra + 1))
    else:
        # What mean is left for the scenes with no large object; a triangular draw around it.
        rest = max(1 - spec.empty - large_images, 1e-3)
        mean = (spec.mean_objects - large_images * (1 + extra / 2)) / rest
        mean = min(max(mean, 1.0), float(spec.max_objects))
        low = max(1.0, 2 * mean - spec.max_objects)
        count = int(min(round(rng.uniform(low, 2 * mean - low)), spec.max_objects))
    for _ in range(count):
        is_small = rng.random() * (small + medium) < small
        low, high = _SMALL if is_small else (_MEDIUM[0], min(_MEDIUM[1], 0.7 * size))
        sizes.append(math.exp(rng.uniform(math.log(low), math.log(high))))
    return sizes


def _place(
    rng: np.random.Generator,
    spec: ShapesSpec,
    alpha: np.ndarray,
    owner: np.ndarray,
    totals: list[int],
    size: int,
    target: float,
) -> tuple[int, int, np.ndarray, np.ndarray] | None:
    """Looks for a place where no earlier object is covered too much.

    Returns:
      ``(top, left, coverage, solid)`` clipped to the image, or None when no place was found; the
      object is then left out of the scene altogether.
    """
    height, width = alpha.shape
    # A sixth of a small or medium object may reach over the border, and little of a large one.
    over = 1 / 6 if target < _LARGE[0] else 1 / 40
    for _ in range(_PLACEMENTS):
        y = _offset(rng, height, size, over)
        x = _offset(rng, width, size, over)
        top, left = max(y, 0), max(x, 0)
        crop = alpha[top - y : min(height, size - y), left - x : min(width, size - x)]
        solid = crop >= 0.5
        rows, columns = solid.any(1).sum(), solid.any(0).sum()
        if min(rows, columns) < spec.min_side:
            continue
        under = owner[top : top + crop.shape[0], left : left + crop.shape[1]][solid]
        if totals and not _leaves_visible(owner, under, totals, spec.min_visible):
            continue
        return top, left, crop, solid
    return None


def _offset(rng: np.random.Generator, length: int, size: int, over: float) -> int:
    margin = int(length * over)
    low, high = -margin, size - length + margin
    if high <= low:
        return (low + high) // 2
    return int(rng.integers(low, high + 1))


def _leaves_visible(
    owner: np.ndarray, under: np.ndarray, totals: list[int], min_visible: float
) -> bool:
    covered = np.bincount(under[under >= 0], minlength=len(totals))
    if not covered.any():
        return True
    before = np.bincount(owner[owner >= 0], minlength=len(totals))
    return bool(
        np.all((before - covered)[covered > 0] >= min_visible * np.array(totals)[covered > 0])
    )


def _tight_box(solid: np.ndarray, top: int, left: int) -> tuple[float, float, float, float]:
    rows, columns = np.nonzero(solid.any(1))[0], np.nonzero(solid.any(0))[0]
    return (left + columns[0], top + rows[0], left + columns[-1] + 1.0, top + rows[-1] + 1.0)


def _background(rng: np.random.Generator, spec: ShapesSpec, size: int) -> np.ndarray:
    """Textured ground with clutter behind the objects, float32 [S, S, 3]."""
    first = rgb(rng.random(), rng.uniform(0.05, 0.6), rng.uniform(0.25, 0.95))
    second = rgb(rng.random(), rng.uniform(0.05, 0.6), rng.uniform(0.25, 0.95))
    second = first + rng.uniform(0.3, 1.0) * (second - first)
    kind = int(rng.integers(4))
    if kind == 0:  # Low-frequency noise.
        cells = int(rng.integers(3, 9))
        blend = np.asarray(
            Image.fromarray(rng.random((cells, cells), dtype=np.float32)).resize(
                (size, size), Image.Resampling.BICUBIC
            )
        )
    elif kind == 1:
        blend = pattern(rng, "gradient", (size, size))
    else:
        texture = "stripes" if kind == 2 else "checks"
        blend = 0.5 * pattern(rng, texture, (size, size))
    canvas = blend[..., None] * (second - first)
    canvas += first
    # A second octave of coloured low-frequency noise, so that no ground is ever plain.
    small = rng.standard_normal((int(rng.integers(4, 14)),) * 2, dtype=np.float32)
    mottle = np.asarray(Image.fromarray(small).resize((size, size), Image.Resampling.BILINEAR))
    canvas += rng.uniform(3, 16) * mottle[..., None]
    np.clip(canvas, 0, 255, out=canvas)
    count = int(rng.poisson(spec.clutter))
    if not count:
        return canvas
    picture = Image.fromarray(canvas.astype(np.uint8))
    draw = ImageDraw.Draw(picture, "RGBA")
    for _ in range(count):
        tone = canvas[tuple(rng.integers(0, size, 2))] + rng.uniform(-70, 70, 3)
        ink = (*np.clip(tone, 0, 255).astype(int).tolist(), int(rng.integers(90, 255)))
        if rng.random() < 0.55:
            _stroke(rng, draw, size, ink)
        else:
            _blob(rng, draw, size, ink)
    return np.array(picture, np.float32)


def _stroke(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: int, ink: tuple[int, ...]
) -> None:
    """An open, bent stroke: never a closed outline, so it cannot pass for an object."""
    heading = rng.uniform(0, 2 * np.pi)
    turns = rng.normal(0, 0.5, 5).cumsum() + heading
    step = rng.uniform(0.04, 0.14) * size
    points = np.stack([np.cos(turns), np.sin(turns)], 1).cumsum(0) * step
    points += rng.uniform(0, size, 2)
    draw.line(points.ravel().tolist(), fill=ink, width=int(rng.integers(1, 4)), joint="curve")


def _blob(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: int, ink: tuple[int, ...]
) -> None:
    """An irregular patch with a ragged outline, unlike any class."""
    corners = int(rng.integers(7, 12))
    angle = 2 * np.pi * (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) / corners
    radius = rng.uniform(0.03, 0.13) * size * rng.uniform(0.35, 1.0, corners)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1) + rng.uniform(0, size, 2)
    draw.polygon(points.ravel().tolist(), fill=ink)


def _front_strokes(rng: np.random.Generator, canvas: np.ndarray, size: int) -> None:
    """Up to two thin strokes in front of everything, as a twig or a wire would be."""
    picture = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(1, 3))):
        shade = int(rng.integers(0, 256))
        ends = rng.uniform(0, size, 4)
        draw.line(ends.tolist(), fill=(shade, shade, shade), width=1)
    canvas[...] = np.asarray(picture, np.float32)


def _camera(
    rng: np.random.Generator, spec: ShapesSpec, canvas: np.ndarray, size: int
) -> np.ndarray:
    """Uneven light, slight blur and sensor noise; uint8 [S, S, 3]."""
    slope = rng.uniform(-0.2, 0.2, 2).astype(np.float32) / size
    ramp = np.arange(size, dtype=np.float32) - size / 2
    light = rng.uniform(0.8, 1.1) * (1 + slope[0] * ramp[:, None] + slope[1] * ramp[None, :])
    canvas *= light[..., None]
    if rng.random() < spec.blur:
        picture = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
        radius = rng.uniform(0.4, 0.9)
        canvas = np.array(picture.filter(ImageFilter.GaussianBlur(radius)), np.float32)
    if spec.noise > 0:
        noise = rng.standard_normal(canvas.shape, dtype=np.float32)
        noise *= np.float32(rng.uniform(0, spec.noise))
        canvas += noise
    canvas += 0.5
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)
