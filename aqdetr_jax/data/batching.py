"""Padding of images to the static shapes of a batch."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from aqdetr_jax.data.dataset import Example

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """What a worker process left out since it last said so: it has counts of its own.

    Attributes:
      truncated: boxes.
      skipped: (file name, reason) of unreadable images.
    """

    truncated: int
    skipped: tuple[tuple[str, str], ...]


class PipelineStats:
    """Counts of what the pipeline had to leave out; thread safe. A copy for a process starts anew.

    Attributes:
      truncated_boxes: boxes beyond ``max_boxes``, each time their image came by.
      skipped_images: unreadable images; one that came by several times is one.
      skipped_names: the first of them, with the reason.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._skipped: set[str] = set()
        self._reading: dict[int, tuple[str, float]] = {}
        self.truncated_boxes = 0
        self.skipped_names: list[str] = []
        self._untold: list[tuple[str, str]] = []
        self._told = 0

    def __reduce__(self) -> tuple[type[PipelineStats], tuple[()]]:
        return type(self), ()

    def take(self) -> LeftOut:
        """What came since the last call, for the counts of another process."""
        with self._lock:
            found = LeftOut(self.truncated_boxes - self._told, tuple(self._untold))
            self._told, self._untold = self.truncated_boxes, []
            return found

    def add(self, other: LeftOut) -> None:
        """Adds what another process left out."""
        self.add_truncated(other.truncated)
        for name, reason in other.skipped:
            self.add_skipped(name, reason)

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

    @contextlib.contextmanager
    def reading(self, file_name: str) -> Iterator[None]:
        """This thread reads an image: should it never come back, its name is known."""
        thread = threading.get_ident()
        self._reading[thread] = file_name, time.monotonic()
        try:
            yield
        finally:
            self._reading.pop(thread, None)

    def slowest(self) -> str:
        """The image that has been read for the longest time, in words; "" if none is."""
        found = sorted(self._reading.copy().values(), key=lambda item: item[1])
        if not found:
            return ""
        name, since = found[0]
        return f"{name} for {time.monotonic() - since:.0f} s"

    def add_truncated(self, count: int) -> None:
        """Counts ``count`` truncated boxes."""
        with self._lock:
            self.truncated_boxes += count

    def add_skipped(self, file_name: str, reason: str) -> None:
        """Counts an unreadable image, once."""
        with self._lock:
            if file_name not in self._skipped and len(self.skipped_names) < 20:
                self.skipped_names.append(reason)
            if file_name not in self._skipped:
                self._untold.append((file_name, reason))
            self._skipped.add(file_name)


@dataclasses.dataclass(frozen=True)
class Row:
    """One image of a batch before it is padded.

    Attributes:
      example: the image as it enters, at most as large as the bucket; boxes xyxy in its pixels.
      index: dataset index.
      original_size: (h, w) of the image as stored.
    """

    example: Example
    index: int
    original_size: tuple[int, int]


def assemble(
    rows: Sequence[Row | None], bucket: tuple[int, int], max_boxes: int, stats: PipelineStats
) -> Batch:
    """A batch of images padded to a bucket and T boxes; every pixel is written once.

    Args:
      rows: the images; None makes a black row without boxes, of ``image_index`` -1, whose mask is
        all True.
      bucket: (H, W).
      max_boxes: T; the first T boxes of an image are kept.
      stats: counts truncated boxes.

    Raises:
      ValueError: an image exceeds the bucket.
    """
    count = len(rows)
    batch = {
        "images": np.empty((count, *bucket, 3), np.uint8),
        "mask": np.zeros((count, *bucket), bool),
        "boxes": np.zeros((count, max_boxes, 4), np.float32),
        "labels": np.zeros((count, max_boxes), np.int32),
        "valid": np.zeros((count, max_boxes), bool),
        "image_index": np.full(count, -1, np.int32),
        "size": np.full((count, 2), bucket, np.int32),
        "original_size": np.full((count, 2), bucket, np.int32),
    }
    for i, row in enumerate(rows):
        part = {key: value[i : i + 1] for key, value in batch.items()}
        if row is None:
            part["images"][:] = 0
            part["mask"][:] = True
        else:
            _fill(part, row, stats)
    return batch


def _fill(part: Batch, row: Row, stats: PipelineStats) -> None:
    """Writes one image into its part of a batch, of which only the pixels are undefined."""
    example = row.example
    height, width = example.image.shape[:2]
    images, mask = part["images"][0], part["mask"][0]
    if height > images.shape[0] or width > images.shape[1]:
        raise ValueError(
            f"{example.file_name}: {height}x{width} exceeds the bucket {images.shape[:2]}"
        )
    images[:height, :width] = example.image
    images[height:] = 0
    images[:height, width:] = 0
    mask[:height, :width] = True
    count = min(len(example.boxes), part["boxes"].shape[1])
    if count < len(example.boxes):
        stats.add_truncated(len(example.boxes) - count)
    x1, y1, x2, y2 = example.boxes[:count].T
    part["boxes"][0, :count] = np.stack(
        [(x1 + x2) / (2 * width), (y1 + y2) / (2 * height), (x2 - x1) / width, (y2 - y1) / height],
        1,
    )
    part["labels"][0, :count] = example.labels[:count]
    part["valid"][0, :count] = True
    part["image_index"][0] = row.index
    part["size"][0] = height, width
    part["original_size"][0] = row.original_size
