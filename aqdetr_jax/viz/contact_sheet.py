"""Contact sheets of data sets: annotated images side by side, those with problems first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from aqdetr_jax.data.dataset import DetectionDataset, ImageReadError
from aqdetr_jax.viz import palette
from aqdetr_jax.viz.detections import draw_boxes, shorten, tile
from aqdetr_jax.viz.fonts import drawable, load_font
from aqdetr_jax.viz.png import save_png

_IMAGES = 24
_COLUMNS = 6
_WIDTH = 320
_LINE = 18
_PAPER, _INK, _PROBLEM, _BLANK = (255, 255, 255), (93, 103, 120), (190, 40, 40), (225, 228, 233)


def choose_images(problems: Sequence[int], total: int, count: int, seed: int) -> list[int]:
    """The images of a sheet: those with problems first, then others at random.

    Args:
      problems: indices of images with problems, the worst first.
      total: images of the set.
      count: images of the sheet, at most.
      seed: of the others.

    Returns:
      Indices without repetition, the others in the order of the set.
    """
    chosen = list(dict.fromkeys(problems))[:count]
    others = np.setdiff1d(np.arange(total), chosen)
    size = min(count - len(chosen), len(others))
    drawn = np.random.default_rng(seed).choice(others, size, replace=False) if size else others[:0]
    return chosen + sorted(drawn.tolist())


def contact_sheet(
    dataset: DetectionDataset,
    problems: Sequence[tuple[int, Sequence[str]]] = (),
    *,
    count: int = _IMAGES,
    seed: int = 0,
) -> Image.Image:
    """Draws images of a set with their boxes, names and problems.

    Args:
      dataset: the set; an image that cannot be read is a blank with the reason.
      problems: (index, problems) of images that come first.
      count: images, at most.
      seed: of the images without problems.

    Returns:
      An RGB picture.
    """
    known = dict(problems)
    indices = choose_images(list(known), len(dataset), count, seed)
    used: set[int] = set()
    cells = [_cell(dataset, index, known.get(index, ()), used) for index in indices]
    columns = max(1, min(_COLUMNS, len(cells)))
    cells += [Image.new("RGB", (1, 1), _PAPER)] * (-len(cells) % columns or not cells)
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    title = f"{dataset.name}: {len(indices)} of {len(dataset)} images"
    legend = [(dataset.class_names[c], palette.class_color(c)) for c in sorted(used)]
    return _headed(title, tile(rows, [""] * columns, legend))


def write_contact_sheets(
    target: Path, sets: Sequence[tuple[DetectionDataset, Mapping[str, Any]]], *, seed: int = 0
) -> list[Path]:
    """Writes one sheet of all sets (``FILE.png``) or one of each (a folder).

    Args:
      target: a file whose name ends in ``.png``, or a folder, made where it is missing.
      sets: each with its report of :func:`aqdetr_jax.data.inspect.inspect_dataset`.
      seed: of the images without problems.

    Returns:
      The files written.

    Raises:
      OSError: they cannot be written.
    """
    single = target.suffix.lower() == ".png"
    count = _IMAGES // len(sets) if single else _IMAGES
    sheets = [contact_sheet(d, r["problem_images"], count=count, seed=seed) for d, r in sets]
    folder = target.parent if single else target
    if single:
        pictures = {target: _stacked(sheets)}
    else:
        names = [f"{i}_{d.name.replace('/', '_')}.png" for i, (d, _) in enumerate(sets, 1)]
        pictures = {folder / name: sheet for name, sheet in zip(names, sheets, strict=True)}
    for path, picture in pictures.items():
        save_png(picture, path)
    return list(pictures)


def _cell(
    dataset: DetectionDataset, index: int, problems: Sequence[str], used: set[int]
) -> Image.Image:
    """One image of a sheet with its name and problems below."""
    lines = [(dataset.file_name(index), _INK), *((text, _PROBLEM) for text in problems)]
    try:
        example = dataset[index]
    except ImageReadError as error:
        height, width = dataset.image_size(index)
        # As annotated, within the shapes that leave something to see.
        picture = Image.new(
            "RGB", (_WIDTH, round(_WIDTH * min(max(height / width, 0.3), 1))), _BLANK
        )
        if not problems:
            lines.append((str(error), _PROBLEM))
    else:
        scale = _WIDTH / max(example.image.shape[:2])
        picture = draw_boxes(
            example.image, example.boxes, example.labels, None, dataset.class_names, scale=scale
        )
        used |= set(example.labels.tolist())
    cell = Image.new("RGB", (_WIDTH, picture.height + _LINE * len(lines) + 4), _PAPER)
    cell.paste(picture, ((_WIDTH - picture.width) // 2, 0))
    draw = ImageDraw.Draw(cell)
    for number, (text, colour) in enumerate(lines):
        y, text = picture.height + 4 + _LINE * number, drawable(text)
        font = load_font(13, text)
        draw.text((0, y), shorten(text, font, _WIDTH), font=font, fill=colour, anchor="lt")
    return cell


def _headed(title: str, picture: Image.Image) -> Image.Image:
    font = load_font(19, bold=True)
    canvas = Image.new("RGB", (max(picture.width, _WIDTH), picture.height + 38), _PAPER)
    canvas.paste(picture, (0, 38))
    text = shorten(title, font, canvas.width - 24)
    ImageDraw.Draw(canvas).text((12, 14), text, font=font, fill=(27, 34, 48), anchor="lt")
    return canvas


def _stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    size = max(s.width for s in sheets), sum(s.height for s in sheets)
    canvas = Image.new("RGB", size, _PAPER)
    y = 0
    for sheet in sheets:
        canvas.paste(sheet, (0, y))
        y += sheet.height
    return canvas
