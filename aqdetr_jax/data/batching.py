"""Padding of single examples to static shapes and stacking them to a batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from aqdetr_jax.data.dataset import Example

Batch = dict[str, np.ndarray]


class PipelineStats:
    """Counts of what the pipeline had to leave out; thread safe.

    Attributes:
      truncated_boxes: boxes beyond ``max_boxes``, each time their image came by.
      skipped_images: unreadable images; one that came by several times is one.
      skipped_names: the first of them, with the reason.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._skipped: set[str] = set()
        self.truncated_boxes = 0
        self.skipped_names: list[str] = []

    @property
    def skipped_images(self) -> int:
        """Number of unreadable images."""
        return len(self._skipped)

    def summary(self) -> str:
        """What was left out, for people; "" if nothing was."""
        parts = []
        if self.truncated_boxes:
            parts.append(f"{self.truncated_boxes} boxes beyond config.data.max_boxes")
        if self.skipped_images:
            first = "; ".join(self.skipped_names[:3])
            images = "image" if self.skipped_images == 1 else "images"
            parts.append(f"{self.skipped_images} unreadable {images} ({first})")
        return ", ".join(parts)

    def add_truncated(self, count: int) -> None:
        """Counts ``count`` truncated boxes."""
        with self._lock:
            self.truncated_boxes += count

    def add_skipped(self, file_name: str, reason: str) -> None:
        """Counts an unreadable image, once."""
        with self._lock:
            if file_name not in self._skipped and len(self.skipped_names) < 20:
                self.skipped_names.append(reason)
            self._skipped.add(file_name)


def pad_example(
    example: Example,
    index: int,
    original_size: Sequence[int],
    bucket: tuple[int, int],
    max_boxes: int,
    stats: PipelineStats,
) -> Batch:
    """Pads one example to a bucket and T boxes; the row of a batch (no batch axis).

    Args:
      example: fits the bucket; boxes xyxy in its pixels.
      index: dataset index.
      original_size: (h, w) of the image as stored.
      bucket: (H, W).
      max_boxes: T; the first T boxes are kept.
      stats: counts truncated boxes.

    Raises:
      ValueError: the image exceeds the bucket.
    """
    height, width = example.image.shape[:2]
    if height > bucket[0] or width > bucket[1]:
        raise ValueError(f"{example.file_name}: {height}x{width} exceeds the bucket {bucket}")
    row = filler_row(bucket, max_boxes)
    row["images"][:height, :width] = example.image
    row["mask"][height:] = False
    row["mask"][:, width:] = False
    count = min(len(example.boxes), max_boxes)
    if count < len(example.boxes):
        stats.add_truncated(len(example.boxes) - count)
    x1, y1, x2, y2 = example.boxes[:count].T
    row["boxes"][:count] = np.stack(
        [(x1 + x2) / (2 * width), (y1 + y2) / (2 * height), (x2 - x1) / width, (y2 - y1) / height],
        1,
    )
    row["labels"][:count] = example.labels[:count]
    row["valid"][:count] = True
    row["image_index"][...] = index
    row["size"][:] = height, width
    row["original_size"][:] = original_size
    return row


def filler_row(bucket: tuple[int, int], max_boxes: int) -> Batch:
    """A black row without boxes and with ``image_index`` -1; its mask is all True."""
    return {
        "images": np.zeros((*bucket, 3), np.uint8),
        "mask": np.ones(bucket, bool),
        "boxes": np.zeros((max_boxes, 4), np.float32),
        "labels": np.zeros(max_boxes, np.int32),
        "valid": np.zeros(max_boxes, bool),
        "image_index": np.array(-1, np.int32),
        "size": np.array(bucket, np.int32),
        "original_size": np.array(bucket, np.int32),
    }


def stack(rows: Sequence[Batch]) -> Batch:
    """Stacks rows along a new first axis."""
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
