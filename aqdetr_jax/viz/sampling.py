"""Pictures of deformable attention: where chosen queries sample, two models side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from aqdetr_jax.viz import detections, palette

LEVEL_COLORS: tuple[palette.RGB, ...] = (
    (255, 209, 71),
    (80, 220, 170),
    (96, 165, 255),
    (240, 110, 200),
    (255, 140, 66),
)


class Samples(NamedTuple):
    """Where one query of one model samples.

    Attributes:
      locations: float [heads, levels, points, 2], (x, y) in [0, 1] of the image without padding.
      weights: float [heads, levels, points] >= 0, summing to 1 in every head.
      box: float [4] (cx, cy, w, h) in [0, 1], the box that the query predicts.
    """

    locations: np.ndarray
    weights: np.ndarray
    box: np.ndarray


def sampling_grid(
    image: Any,
    rows: Sequence[Sequence[Samples]],
    *,
    titles: Sequence[str] = ("teacher", "student"),
    labels: Sequence[str] = (),
) -> Image.Image:
    """Draws the sampling points of chosen queries: one row a query, one column a model.

    The colour of a point is its level, its area its weight (a head's largest weights are the
    largest dots); the box that the query predicts is drawn in white. Points outside the picture
    sample zeros and are not drawn; their share of the weight is written below.

    Args:
      image: the unpadded picture, see ``detections.to_image``.
      rows: for every query, its samples in every model.
      titles: names of the models.
      labels: a text for every query, e.g. "circle 0.93".

    Returns:
      An RGB picture.

    Raises:
      ValueError: no query, or rows that do not fit the titles.
    """
    if not rows or any(len(row) != len(titles) for row in rows):
        raise ValueError(f"every query needs samples of {tuple(titles)}")
    picture = detections.to_image(image)
    ratio = 360 / max(picture.size)
    size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    dimmed = picture.resize(size, Image.Resampling.BICUBIC).point(lambda v: int(0.55 * v))
    lines = []
    for number, row in enumerate(rows):
        line = []
        for samples in row:
            drawn, outside = _draw(dimmed, samples)
            words = [labels[number]] if number < len(labels) else []
            if outside > 0.0005:
                words.append(f"{outside:.1%} of the weight outside")
            line.append(detections.note(drawn, ", ".join(words)))
        lines.append(line)
    levels = rows[0][0].weights.shape[1]
    legend = [(f"level {i}", LEVEL_COLORS[i % len(LEVEL_COLORS)]) for i in range(levels)]
    return detections.tile(lines, list(titles), legend)


def _draw(picture: Image.Image, samples: Samples) -> tuple[Image.Image, float]:
    """The picture with a query's points, and the share of their weight that lies outside."""
    canvas = picture.copy()
    draw = ImageDraw.Draw(canvas)
    width, height = canvas.size
    cx, cy, w, h = (float(v) for v in samples.box)
    left, top, right, bottom = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    corners = (left * width, top * height, right * width, bottom * height)
    draw.rectangle(corners, outline=(255, 255, 255), width=2)
    outside = 0.0
    order = np.argsort(-samples.weights, axis=None, kind="stable")
    for flat in order:  # small dots last, on top
        head, level, point = np.unravel_index(flat, samples.weights.shape)
        weight = float(samples.weights[head, level, point])
        x, y = (float(v) for v in samples.locations[head, level, point])
        if not (0 <= x <= 1 and 0 <= y <= 1):
            outside += weight / len(samples.weights)
            continue
        radius = 1.0 + 9.0 * math.sqrt(weight)
        spot = (x * width - radius, y * height - radius, x * width + radius, y * height + radius)
        draw.ellipse(spot, fill=LEVEL_COLORS[level % len(LEVEL_COLORS)], outline=(0, 0, 0))
    return canvas, outside


def splat(locations: Any, weights: Any, grid_size: tuple[int, int]) -> np.ndarray:
    """Dense maps of deformable attention on one grid, for ``attention.attention_rows``.

    Args:
      locations: float [Q, heads, levels, points, 2], (x, y) in units of the padded image.
      weights: float [heads, Q, levels * points].
      grid_size: (height, width) of the grid; points of all levels are splat on it bilinearly.

    Returns:
      float64 [heads, Q, height * width]; sums are 1 less what falls outside.
    """
    locations = np.asarray(locations, np.float64)
    queries, heads = locations.shape[:2]
    points = locations.transpose(1, 0, 2, 3, 4).reshape(heads, queries, -1, 2)
    weights = np.asarray(weights, np.float64).reshape(heads, queries, -1)
    height, width = grid_size
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    columns = np.maximum(0, 1 - np.abs(x[..., None] - np.arange(width)))
    rows = np.maximum(0, 1 - np.abs(y[..., None] - np.arange(height)))
    maps = np.einsum("hqp,hqpr,hqpc->hqrc", weights, rows, columns, optimize=True)
    return maps.reshape(heads, queries, -1)
