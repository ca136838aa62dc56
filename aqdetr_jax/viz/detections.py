"""Pictures of detections: boxes with names on an image, models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from aqdetr_jax.data.images import to_rgb
from aqdetr_jax.viz import palette
from aqdetr_jax.viz.fonts import class_text, drawable, load_font

Panel = tuple[str, Any, Any, Any]
"""(title, boxes_xyxy [N, 4] in pixels, labels [N], scores [N] or None for ground truth)."""

MIN_PANEL = 384
MAX_PANEL = 640
_GAP = 12
_PAPER = (255, 255, 255)
_INK = (27, 34, 48)
_MUTED = (93, 103, 120)
_LEGEND = 16


def to_image(image: Any) -> Image.Image:
    """Converts a picture to an RGB PIL image.

    Args:
      image: PIL image, or an array uint8 [H, W, 3], [H, W, 1] or [H, W]; a float array in [0, 1]
        is scaled to 255.

    Returns:
      A new RGB image.

    Raises:
      ValueError: the array has another shape or dtype, or the image no fixed scale (see
        ``data.images.to_rgb``).
    """
    if isinstance(image, Image.Image):
        return Image.fromarray(to_rgb(image))
    array = np.asarray(image)
    if array.dtype.kind == "f":
        array = np.round(np.clip(np.nan_to_num(array), 0, 1) * 255).astype(np.uint8)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise ValueError(f"want an image uint8 [H, W, 3], got {array.dtype} {array.shape}")
    return Image.fromarray(array).convert("RGB")


def draw_boxes(
    image: Any,
    boxes: Any,
    labels: Any,
    scores: Any = None,
    class_names: Sequence[str] = (),
    *,
    min_score: float = 0.3,
    scale: float | None = None,
) -> Image.Image:
    """Draws boxes with class names and scores on an enlarged copy of an image.

    A name is set where it hides no other name; where there is no such place it is left out, and
    the box's colour speaks.

    Args:
      image: see ``to_image``, size [H, W].
      boxes: float [N, 4] (x1, y1, x2, y2) in pixels of the image as given.
      labels: int [N], contiguous classes.
      scores: float [N], or None for ground truth, which shows no numbers.
      class_names: name of each class; names that are missing, or that no font of this machine can
        draw, show as "class 5" (``fonts.note_of_numbers`` says which).
      min_score: detections below are left out.
      scale: enlargement; by default the long side becomes ``MIN_PANEL`` to ``MAX_PANEL`` pixels.

    Returns:
      An RGB image of size ``scale`` times that of the input.

    Raises:
      ValueError: the arrays do not have N rows each.
    """
    picture = to_image(image)
    boxes, labels, scores = _arrays(boxes, labels, scores)
    scale = _scale(picture) if scale is None else scale
    width, height = (max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    stroke = max(2, round(max(width, height) / 190))
    size = max(13, round(max(width, height) / 34))

    keep = np.isfinite(boxes).all(axis=1)
    if scores is not None:
        keep &= scores >= min_score
    order = np.flatnonzero(keep)
    if scores is not None:
        # The most certain box is drawn last, over the others.
        order = order[np.argsort(scores[order], kind="stable")]
    rectangles = {}
    for i in order:
        x1, y1, x2, y2 = boxes[i] * scale
        x1, x2 = np.clip(sorted((x1, x2)), 0, width - 1)
        y1, y2 = np.clip(sorted((y1, y2)), 0, height - 1)
        rectangles[i] = box = (float(x1), float(y1), float(x2), float(y2))
        # A dark halo keeps a bright line visible on a bright picture.
        draw.rectangle(_grow(box, 1), outline=(0, 0, 0), width=stroke + 2)
        draw.rectangle(box, outline=palette.class_color(int(labels[i])), width=stroke)
    taken: list[tuple[float, float, float, float]] = []
    for i in order[::-1]:
        text = class_text(class_names, int(labels[i]))
        if scores is not None:
            text += f" {scores[i]:.2f}".replace(" 0.", " .")
        _draw_name(draw, rectangles[i], text, palette.class_color(int(labels[i])), size, taken)
    return picture


def side_by_side(
    image: Any,
    panels: Sequence[Panel],
    class_names: Sequence[str],
    *,
    min_score: float = 0.3,
) -> Image.Image:
    """Draws one image once per panel, in a row: ground truth, teacher, student, ...

    Args:
      image: see ``to_image``.
      panels: (title, boxes_xyxy [N, 4] pixels, labels [N], scores [N] or None) each.
      class_names: name of each contiguous class.
      min_score: detections below are left out.

    Returns:
      An RGB picture with titles above and the classes in use below.

    Raises:
      ValueError: no panel, or arrays that do not fit together.
    """
    return detection_grid([(image, panels)], class_names, min_score=min_score)


def detection_grid(
    rows: Sequence[tuple[Any, Sequence[Panel]]],
    class_names: Sequence[str],
    *,
    min_score: float = 0.3,
) -> Image.Image:
    """Draws several images, one a row, with the same panels as columns.

    Args:
      rows: (image, panels) as for ``side_by_side``; every row has the same number of panels,
        and the first row's titles head the columns.
      class_names: name of each contiguous class.
      min_score: detections below are left out.

    Returns:
      An RGB picture.

    Raises:
      ValueError: no row or panel, or rows of different length.
    """
    counts = {len(panels) for _, panels in rows}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"every row wants the same panels, at least one; got counts {counts}")
    pictures, used = [], set()
    for image, panels in rows:
        scale = _scale(to_image(image))
        line = []
        for _, boxes, labels, scores in panels:
            line.append(
                draw_boxes(
                    image, boxes, labels, scores, class_names, min_score=min_score, scale=scale
                )
            )
            _, labels, scores = _arrays(boxes, labels, scores)
            used |= set(labels[slice(None) if scores is None else scores >= min_score].tolist())
        pictures.append(line)
    titles = [str(panel[0]) for panel in rows[0][1]]
    legend = [(class_text(class_names, int(c)), palette.class_color(int(c))) for c in sorted(used)]
    return tile(pictures, titles, legend)


def note(picture: Image.Image, text: str) -> Image.Image:
    """Sets a short note under the picture."""
    text = drawable(text)
    canvas = Image.new("RGB", (picture.width, picture.height + 20), _PAPER)
    canvas.paste(picture, (0, 0))
    ImageDraw.Draw(canvas).text(
        (0, picture.height + 11),
        text,
        font=load_font(13, text),
        fill=_MUTED,
        anchor="lm",
    )
    return canvas


def tile(
    pictures: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    legend: Sequence[tuple[str, palette.RGB]] = (),
) -> Image.Image:
    """Lays pictures out in rows and columns on white, with column titles and a colour legend.

    Args:
      pictures: rows of images; rows have the same length, sizes may differ.
      titles: one per column; "" for none.
      legend: (name, colour) entries written below.

    Returns:
      An RGB picture.
    """
    widths = [max(row[c].width for row in pictures) for c in range(len(pictures[0]))]
    heights = [max(picture.height for picture in row) for row in pictures]
    head = 38 if any(titles) else 0
    total = sum(widths) + _GAP * (len(widths) + 1)
    lines = _wrap(legend, total - 2 * _GAP)
    foot = 26 * len(lines) + (10 if lines else 0)
    canvas = Image.new(
        "RGB", (total, head + _GAP + sum(heights) + _GAP * len(heights) + foot), _PAPER
    )
    draw = ImageDraw.Draw(canvas)
    x = _GAP
    for column, width in enumerate(widths):
        title = drawable(titles[column])
        font = load_font(19, title, bold=True)
        draw.text((x, _GAP + 8), shorten(title, font, width), font=font, fill=_INK, anchor="lt")
        y = head + _GAP
        for row, height in zip(pictures, heights, strict=True):
            canvas.paste(row[column], (x, y))
            y += height + _GAP
        x += width + _GAP
    y = canvas.height - foot + 4
    for line in lines:
        x = _GAP
        for name, color in line:
            draw.rounded_rectangle((x, y + 2, x + 14, y + 16), 3, fill=color)
            font = load_font(_LEGEND, name)
            draw.text((x + 21, y + 9), name, font=font, fill=_MUTED, anchor="lm")
            x += 21 + round(font.getlength(name)) + 22
        y += 26
    return canvas


def _arrays(boxes: Any, labels: Any, scores: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    labels = np.asarray(labels, np.int64).reshape(-1)
    if scores is not None:
        scores = np.asarray(scores, np.float64).reshape(-1)
    if len(labels) != len(boxes) or (scores is not None and len(scores) != len(boxes)):
        raise ValueError(
            f"{len(boxes)} boxes, {len(labels)} labels and "
            f"{'no' if scores is None else len(scores)} scores do not fit together"
        )
    return boxes, labels, scores


def _scale(picture: Image.Image) -> float:
    long_side = max(picture.size)
    if long_side < MIN_PANEL:
        return MIN_PANEL / long_side
    return min(1.0, MAX_PANEL / long_side)


def _grow(box: tuple[float, float, float, float], by: float) -> tuple[float, float, float, float]:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    return max(wide, 0.0) * max(high, 0.0)


def _draw_name(
    draw: ImageDraw.ImageDraw,
    box: tuple[float, float, float, float],
    text: str,
    color: palette.RGB,
    size: int,
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Sets a name chip at the box, in the first of five places that hides no other chip."""
    pad, font = 3, load_font(size, text)
    # Line height from the font, so that chips of "circle" and "square" are equally high.
    ascent, descent = font.getmetrics()
    wide, high = font.getlength(text) + 2 * pad, ascent + descent
    width, height = draw.im.size
    x1, y1, x2, y2 = box
    for x, y in ((x1, y1 - high), (x1, y1), (x1, y2), (x2 - wide, y2 - high), (x2 - wide, y1)):
        x = min(max(x, 0), max(width - wide, 0))
        if y < 0 or y + high > height:
            continue
        spot = (x, y, x + wide, y + high)
        if sum(_overlap(spot, other) for other in taken) < 0.12 * wide * high:
            taken.append(spot)
            draw.rectangle(spot, fill=color)
            draw.text(
                (x + pad, y + ascent),
                text,
                font=font,
                fill=palette.readable_on(color),
                anchor="ls",
            )
            return


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, its end cut off where it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _wrap(
    legend: Sequence[tuple[str, palette.RGB]], width: float
) -> list[list[tuple[str, palette.RGB]]]:
    lines: list[list[tuple[str, palette.RGB]]] = []
    room = 0.0
    for name, color in legend:
        font = load_font(_LEGEND, name)
        name = shorten(name, font, width - 43)
        need = font.getlength(name) + 43
        if not lines or need > room:
            lines.append([])
            room = width
        lines[-1].append((name, color))
        room -= need
    return lines
