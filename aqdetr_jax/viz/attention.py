"""Pictures of encoder self-attention: teacher, student and their difference, query by query.

A dense attention has its map at hand (``attention_grid``). A deformable one has sampling points,
whose map over all cells is as large as the number of cells squared: its rows are made for the
chosen positions only (``focused_cells``, ``attention_rows``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from aqdetr_jax.viz import detections, fonts

_HEAT = "inferno"
_SIGNED = "RdBu_r"
_EPSILON = 1e-12


def attention_grid(
    image: Any,
    teacher_map: Any,
    student_map: Any,
    *,
    grid_size: tuple[int, int],
    queries: Sequence[tuple[int, int]] | None = None,
    real: tuple[float, float] = (1.0, 1.0),
    titles: tuple[str, str] = ("teacher", "student"),
) -> Image.Image:
    """Draws where chosen encoder positions look, see ``attention_rows``.

    Args:
      image: the unpadded picture, see ``detections.to_image``.
      teacher_map: float [N, N] or [heads, N, N] with N = height * width of ``grid_size``, rows are
        queries and sum to 1, or to less where a deformable attention samples outside the grid.
        Heads are averaged for the picture.
      student_map: as ``teacher_map``.
      grid_size: (height, width) of the encoder's cells, padding included.
      queries: (row, column) cells; by default three on which the teacher is most focused.
      real: fractions (height, width) of the padded grid that the image covers.
      titles: names of the two models.

    Returns:
      An RGB picture.

    Raises:
      ValueError: maps that do not fit the grid or each other, a value that is not finite, or a
        query outside the real area.
    """
    teacher = _maps(teacher_map, grid_size, titles[0])
    student = _maps(student_map, grid_size, titles[1])
    cells = real_cells(grid_size, real)
    chosen = focused_queries(teacher_map, grid_size, cells) if queries is None else list(queries)
    if not chosen or any(not (0 <= r < cells[0] and 0 <= c < cells[1]) for r, c in chosen):
        raise ValueError(f"queries must be cells of the {cells} real ones, got {chosen}")
    index = [row * grid_size[1] + column for row, column in chosen]
    return attention_rows(
        image,
        teacher[:, index],
        student[:, index],
        chosen,
        grid_size=grid_size,
        real=real,
        titles=titles,
    )


def real_cells(grid_size: tuple[int, int], real: tuple[float, float]) -> tuple[int, int]:
    """(height, width) of the cells that the image covers, if only in part.

    Args:
      grid_size: (height, width) of all cells.
      real: fractions (height, width) of them that are no padding.

    Raises:
      ValueError: fractions outside (0, 1].
    """
    if not (0 < real[0] <= 1 and 0 < real[1] <= 1):
        raise ValueError(f"real must be fractions in (0, 1], got {real}")
    return math.ceil(grid_size[0] * real[0] - 1e-6), math.ceil(grid_size[1] * real[1] - 1e-6)


def attention_rows(
    image: Any,
    teacher: np.ndarray,
    student: np.ndarray,
    queries: Sequence[tuple[int, int]],
    *,
    grid_size: tuple[int, int],
    real: tuple[float, float] = (1.0, 1.0),
    titles: tuple[str, str] = ("teacher", "student"),
) -> Image.Image:
    """Draws where chosen encoder positions look: one row a position, four columns.

    The columns are the image with the position marked, the teacher's map, the student's map, and
    student minus teacher. The maps of a row share one scale, from 0 to their common maximum; the
    difference has its own, whose end is written below it, beside KL(teacher || student) in nats,
    the mean over the heads. What a row lacks to a sum of 1 (a deformable attention samples zeros
    outside the image) counts there as one more cell.

    Args:
      image: the unpadded picture, see ``detections.to_image``.
      teacher: float [heads, Q, N], a row for each position, N = height * width of ``grid_size``;
        sums are at most 1. Heads are averaged for the picture.
      student: as ``teacher``.
      queries: the Q positions, (row, column) cells.
      grid_size: (height, width) of the encoder's cells, padding included.
      real: fractions (height, width) of the padded grid that the image covers.
      titles: names of the two models.

    Returns:
      An RGB picture.

    Raises:
      ValueError: rows that do not fit the positions or the grid, or a value that is not finite.
    """
    cells = grid_size[0] * grid_size[1]
    for who, rows in zip(titles, (teacher, student), strict=True):
        if rows.ndim != 3 or rows.shape[1:] != (len(queries), cells):
            raise ValueError(
                f"{who}: attention rows of {len(queries)} positions over {grid_size} cells are "
                f"[heads, {len(queries)}, {cells}], got {rows.shape}"
            )
        if not np.isfinite(rows).all():
            raise ValueError(f"{who}: the attention rows hold NaN or infinity")
    picture = detections.to_image(image)
    ratio = 320 / max(picture.size)
    size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    lines = []
    for number, (row, column) in enumerate(queries):
        heat_t, heat_s = teacher[:, number].mean(0), student[:, number].mean(0)
        top = max(float(heat_t.max()), float(heat_s.max()), _EPSILON)
        spot = (
            (column + 0.5) / grid_size[1] / real[1] * size[0],
            (row + 0.5) / grid_size[0] / real[0] * size[1],
        )
        marked = _mark(picture.copy(), spot)
        line = [detections.note(marked, f"row {row}, column {column}")]
        grey = np.asarray(picture.convert("L"), np.float32)
        for heat in (heat_t, heat_s):
            values = _enlarge(heat, grid_size, real, size) / top
            # Grey between 40 and 200 leaves room for both ends of the colour map.
            shown = _overlay(40 + grey * (160 / 255), values, _HEAT, np.sqrt(np.maximum(values, 0)))
            shown = _mark(shown, spot)
            line.append(detections.note(shown, f"max {heat.max():.3f}"))
        gap = heat_s - heat_t
        widest = max(float(np.abs(gap).max()), _EPSILON)
        values = _enlarge(gap, grid_size, real, size) / widest
        # On a light ghost of the picture, since the middle of the scale is white.
        shown = _overlay(
            190 + grey * (65 / 255), 0.5 + 0.5 * values, _SIGNED, np.abs(values) ** 0.4
        )
        divergence = _kl(teacher[:, number], student[:, number])
        note = f"max |difference| {np.abs(gap).max():.3f}, KL {divergence:.3f}"
        line.append(detections.note(_mark(shown, spot), note))
        lines.append(line)
    names = ["query position", *titles, f"{titles[1]} − {titles[0]}"]
    return _with_scales(detections.tile(lines, names), titles)


def focused_queries(
    teacher_map: Any, grid_size: tuple[int, int], cells: tuple[int, int], *, count: int = 3
) -> list[tuple[int, int]]:
    """``focused_cells`` of an attention map, float [N, N] or [heads, N, N]."""
    return focused_cells(_maps(teacher_map, grid_size, "teacher"), grid_size, cells, count=count)


def focused_cells(
    weights: np.ndarray, grid_size: tuple[int, int], cells: tuple[int, int], *, count: int = 3
) -> list[tuple[int, int]]:
    """Picks the positions with the lowest attention entropy that lie apart from each other.

    Cells on the rim see half a neighbourhood and would always win, so they are left out where
    there are others.

    Args:
      weights: float [heads, N, K], the weights that each of the N cells gives to K cells or
        sampling points.
      grid_size: (height, width) of the cells, padding included.
      cells: (height, width) of the real cells.
      count: how many positions at most.

    Returns:
      (row, column) cells, the most focused first.
    """
    weights = np.asarray(weights, np.float64)
    entropy = -(weights * np.log(weights + _EPSILON)).sum(-1).mean(0).reshape(grid_size)
    rim = 1 if min(cells) > 4 else 0
    inner = entropy[rim : cells[0] - rim, rim : cells[1] - rim]
    order = np.argsort(inner, axis=None, kind="stable")
    apart = max(cells) / 3
    chosen: list[tuple[int, int]] = []
    for flat in order:
        row, column = (int(v) + rim for v in np.unravel_index(flat, inner.shape))
        if all(math.hypot(row - r, column - c) >= apart for r, c in chosen):
            chosen.append((row, column))
        if len(chosen) == count:
            break
    return chosen


def _maps(value: Any, grid_size: tuple[int, int], who: str) -> np.ndarray:
    """The map as float64 [heads, N, N], checked."""
    maps = np.asarray(value, np.float64)
    cells = grid_size[0] * grid_size[1]
    if maps.ndim == 2:
        maps = maps[None]
    if maps.ndim != 3 or maps.shape[1:] != (cells, cells):
        raise ValueError(
            f"{who}: an attention map over {grid_size} cells is [(heads,) {cells}, {cells}], "
            f"got {np.shape(value)}"
        )
    if not np.isfinite(maps).all():
        raise ValueError(f"{who}: the attention map holds NaN or infinity")
    return maps


def _kl(teacher: np.ndarray, student: np.ndarray) -> float:
    """KL(teacher || student) of [heads, N], what is missing to 1 included, mean over the heads."""
    teacher, student = (
        np.concatenate([x, np.maximum(1 - x.sum(-1, keepdims=True), 0)], -1)
        for x in (teacher, student)
    )
    ratio = np.log(teacher + _EPSILON) - np.log(student + _EPSILON)
    return float((teacher * ratio).sum(-1).mean())


def _enlarge(
    heat: np.ndarray,
    grid_size: tuple[int, int],
    real: tuple[float, float],
    size: tuple[int, int],
) -> np.ndarray:
    """Bilinear enlargement of a padded grid [N] to the real picture's pixels [height, width]."""
    cells = Image.fromarray(heat.reshape(grid_size).astype(np.float32))
    box = (0.0, 0.0, grid_size[1] * real[1], grid_size[0] * real[0])
    return np.asarray(cells.resize(size, Image.Resampling.BILINEAR, box=box))


def _overlay(
    grey: np.ndarray, values: np.ndarray, colormap: str, opacity: np.ndarray
) -> Image.Image:
    """Colours ``values`` in [0, 1] over a grey picture [height, width] of 0..255."""
    base = grey[:, :, None]
    colors = matplotlib.colormaps[colormap](np.clip(values, 0, 1))[:, :, :3] * 255
    alpha = 0.9 * np.clip(opacity, 0, 1)[:, :, None]
    return Image.fromarray(np.round(base * (1 - alpha) + colors * alpha).astype(np.uint8))


def _mark(picture: Image.Image, spot: tuple[float, float]) -> Image.Image:
    draw = ImageDraw.Draw(picture)
    for radius, color, width in ((9, (0, 0, 0), 5), (8, (80, 255, 160), 2)):
        x, y = spot
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=color, width=width)
    return picture


def _with_scales(grid: Image.Image, titles: tuple[str, str]) -> Image.Image:
    """Adds the two colour scales below the grid."""
    canvas = Image.new("RGB", (grid.width, grid.height + 34), (255, 255, 255))
    canvas.paste(grid, (0, 0))
    draw = ImageDraw.Draw(canvas)
    x, y = 12, grid.height + 6
    scales = (
        (_HEAT, "attention: 0", "the row's maximum"),
        (_SIGNED, f"difference: {titles[1]} less", f"{titles[1]} more"),
    )
    for colormap, low, high in scales:
        low, high = fonts.drawable(low), fonts.drawable(high)
        font = fonts.load_font(14, low + high)
        draw.text((x, y + 8), low, font=font, fill=(93, 103, 120), anchor="lm")
        x += round(font.getlength(low)) + 8
        ramp = matplotlib.colormaps[colormap](np.linspace(0, 1, 140))[None, :, :3] * 255
        bar = Image.fromarray(np.repeat(ramp, 16, axis=0).round().astype(np.uint8))
        canvas.paste(bar, (x, y))
        x += 148
        draw.text((x, y + 8), high, font=font, fill=(93, 103, 120), anchor="lm")
        x += round(font.getlength(high)) + 40
    return canvas
