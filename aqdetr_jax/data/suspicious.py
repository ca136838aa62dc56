"""Boxes that look as if they were written in another notation than their file's format has."""

from __future__ import annotations

import dataclasses

import numpy as np

from aqdetr_jax.data.dataset import DatasetError, DetectionDataset, Record, RecordDataset

_SMALLEST_SIDE = 8
_TOLERANCE = 1e-3
_CORNERS_FIT = 0.95
_CORNERS_NEEDED = 0.3


@dataclasses.dataclass(frozen=True)
class Suspicion:
    """Boxes of one set that look wrong in the same way.

    Attributes:
      offenders: (index of the image, description) of each.
      boxes: boxes looked at, of which the offenders are some.
    """

    offenders: tuple[tuple[int, str], ...]
    boxes: int


def normalised_boxes(dataset: DetectionDataset) -> Suspicion:
    """Boxes whose four numbers lie within [0, 1] on images with sides of 8 pixels or more."""
    offenders, total = [], 0
    for index, record, boxes in _annotated(dataset):
        if min(record.height, record.width) < _SMALLEST_SIDE:
            continue
        total += len(boxes)
        found = (boxes >= 0).all(1) & (boxes <= 1 + _TOLERANCE).all(1)
        offenders += [(index, _describe(record, box)) for box in boxes[found]]
    return Suspicion(tuple(offenders), total)


def corner_boxes(dataset: DetectionDataset) -> Suspicion:
    """Boxes that reach far over the border as (x, y, width, height), and not as (x1, y1, x2, y2).

    None, unless nearly all boxes of the set can be read as corners and many must be.
    """
    offenders, total, fitting = [], 0, 0
    for index, record, boxes in _annotated(dataset):
        x, y, w, h = boxes.T
        limit_x, limit_y = record.width * 1.02 + 1, record.height * 1.02 + 1
        fits = (w > x) & (h > y) & (w <= limit_x) & (h <= limit_y)
        over = fits & ((x + w > limit_x) | (y + h > limit_y))
        total += len(boxes)
        fitting += int(fits.sum())
        offenders += [(index, _describe(record, box)) for box in boxes[over]]
    if fitting < _CORNERS_FIT * total or len(offenders) < _CORNERS_NEEDED * total:
        offenders = []
    return Suspicion(tuple(offenders), total)


def check_pixel_boxes(dataset: DetectionDataset) -> None:
    """Refuses a set whose boxes are all normalised: as pixels they are specks in a corner.

    Raises:
      DatasetError: they are; the message names the first.
    """
    found = normalised_boxes(dataset)
    if found.offenders and len(found.offenders) == found.boxes:
        raise DatasetError(
            f"{dataset.name}: all {found.boxes} boxes lie within [0, 1] (first: "
            f"{found.offenders[0][1]}), so they are fractions of the image: write them in pixels"
        )


def _annotated(dataset: DetectionDataset) -> list[tuple[int, Record, np.ndarray]]:
    """(index, record, boxes float64 [N, 4] as annotated: x, y, width, height) of images with boxes.

    Nothing for sets that are not annotated by anyone.
    """
    if not isinstance(dataset, RecordDataset):
        return []
    return [
        (index, record, np.array([a["bbox"] for a in record.annotations], np.float64))
        for index, record in enumerate(dataset.records)
        if record.annotations
    ]


def _describe(record: Record, box: np.ndarray) -> str:
    numbers = ", ".join(f"{value:g}" for value in box)
    return f"{record.file_name}: box [{numbers}] on {record.width}x{record.height} pixels"
