"""The one interface every detection dataset offers, and the entry point that builds one by name.

A dataset is a read-only sequence of :class:`Example` plus what training and evaluation must know
without decoding an image: class names, the map from contiguous labels to original category ids,
image sizes, the COCO ground truth, a fingerprint and a count of the boxes that were dropped.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import math
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from aqdetr_jax.data.class_names import class_name

_MAX_DROP_EXAMPLES = 20
_FLOAT32_MAX = float(np.finfo(np.float32).max)
MAX_SIDE = 2**31 - 1
"""Longest side of an image in pixels, as annotated; batches hold it as int32."""


class DatasetError(ValueError):
    """A dataset on disk or its parameters are wrong; the message names the file, key or id."""


class ImageReadError(DatasetError):
    """An image cannot be read: missing, truncated, over the pixel budget or no image at all."""


def to_float(value: float) -> float:
    """A number as a float; a whole number that is too large for one becomes infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def label_name(text: Any, where: str) -> str:
    """A class's name as readers of data sets take it; see :func:`class_names.class_name`.

    Args:
      text: the name as annotated.
      where: file and id, for the message.

    Raises:
      DatasetError: the name is no text, empty, or has control characters inside.
    """
    try:
        return class_name(text, where)
    except ValueError as error:
        raise DatasetError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Example:
    """One image with its annotations.

    Attributes:
      image: uint8 [H, W, 3], RGB.
      boxes: float32 [N, 4], ``(x1, y1, x2, y2)`` in pixels, clipped to the image; (0, 4) if none.
      labels: int32 [N], contiguous class labels ``0 .. num_classes - 1``.
      iscrowd: bool [N]; True for regions that are no training target and are ignored in scoring
        (COCO crowds, Pascal VOC ``difficult`` objects).
      image_id: the id used in results and in the ground truth.
      file_name: for messages; a name, not necessarily an existing path.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    iscrowd: np.ndarray
    image_id: int | str
    file_name: str


class DetectionDataset(abc.ABC):
    """A read-only, random-access detection dataset. ``dataset[i]`` is thread safe.

    Attributes:
      name: short name for logs, for example ``"shapes/train"``.
      class_names: names of the contiguous labels.
      category_ids: original category id of each contiguous label.
      drops: number of boxes left out, by reason.
      drop_examples: the first offenders, each naming its file and annotation id.
      clipped: number of boxes that reached over the image border and were clipped.
      notes: what else the reader decided and its user should know, one sentence each.
      source: where its annotations were looked for, of many files the first; "" if in no file.
      images_dir: folder that the file names start from; None if images are no files.
    """

    name: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    drops: dict[str, int]
    drop_examples: tuple[str, ...]
    clipped: int = 0
    notes: tuple[str, ...] = ()
    source: str = ""
    images_dir: pathlib.Path | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Decodes image ``index`` (0 <= index < len).

        Raises:
          IndexError: the index is out of range.
          ImageReadError: the image cannot be read; the message names the file.
        """

    @abc.abstractmethod
    def image_size(self, index: int) -> tuple[int, int]:
        """``(height, width)`` in pixels as annotated, without decoding the image."""

    @abc.abstractmethod
    def image_id(self, index: int) -> int | str:
        """The id of image ``index`` in results and in the ground truth, without decoding."""

    @abc.abstractmethod
    def file_name(self, index: int) -> str:
        """The name of image ``index`` for messages, without decoding."""

    @abc.abstractmethod
    def max_boxes_per_image(self) -> int:
        """An upper bound on the training boxes (crowd excluded) of any one image."""

    @abc.abstractmethod
    def coco_ground_truth(self) -> dict[str, Any]:
        """The annotations as a COCO JSON dict, without decoding images; crowd regions are kept.

        Annotation ids start at 1: COCOeval takes a match to annotation 0 for "no match".
        """

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the names, the annotations and the parameters of this dataset."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __iter__(self) -> Iterator[Example]:
        """All examples in order."""
        return (self[i] for i in range(len(self)))

    def _check_index(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: image {index} of {len(self)}")
        return int(index)


@dataclasses.dataclass(frozen=True)
class Record:
    """The annotations of one image, as parsed: what a dataset knows before it decodes anything.

    Attributes:
      image_id: int or str.
      file_name: relative path of the image.
      height: pixels, as annotated.
      width: pixels, as annotated.
      boxes: float32 [N, 4] xyxy pixels, clipped to the image.
      labels: int32 [N] contiguous.
      iscrowd: bool [N].
      annotations: one dict per box for the ground truth with ``bbox`` (xywh, as annotated) and
        ``area`` (square pixels).
    """

    image_id: int | str
    file_name: str
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    iscrowd: np.ndarray
    annotations: tuple[Mapping[str, Any], ...]


class BoxCollector:
    """Cleans the raw boxes of one dataset: clips them, drops the unusable ones and keeps count.

    Reasons: ``non_finite`` (NaN, infinity, or too large for float32), ``negative`` (negative width
    or height),
    ``zero_area`` (zero width or height) and ``outside`` (nothing left inside the image).
    """

    def __init__(self) -> None:
        self.drops: Counter[str] = Counter()
        self.examples: list[str] = []
        self.clipped = 0

    def clean(
        self, xyxy: Sequence[float], height: int, width: int, where: str
    ) -> np.ndarray | None:
        """Clips one box to the image, or drops it.

        Args:
          xyxy: four numbers ``(x1, y1, x2, y2)`` in pixels.
          height: image height.
          width: image width.
          where: file and annotation id, for the list of offenders.

        Returns:
          float32 [4], or None when the box was dropped (and counted).
        """
        x1, y1, x2, y2 = corners = tuple(to_float(v) for v in xyxy)
        if not all(abs(v) <= _FLOAT32_MAX for v in corners):  # NaN is not less than anything.
            self._drop("non_finite", where, corners)
            return None
        clipped = (
            min(max(x1, 0.0), width),
            min(max(y1, 0.0), height),
            min(max(x2, 0.0), width),
            min(max(y2, 0.0), height),
        )
        box = np.array(clipped, np.float32)
        if x2 < x1 or y2 < y1:
            self._drop("negative", where, corners)
        elif x2 == x1 or y2 == y1:
            self._drop("zero_area", where, corners)
        elif box[2] <= box[0] or box[3] <= box[1]:
            self._drop("outside", where, corners)
        else:
            self.clipped += clipped != corners
            return box
        return None

    def _drop(self, reason: str, where: str, xyxy: Sequence[float]) -> None:
        self.drops[reason] += 1
        if len(self.examples) < _MAX_DROP_EXAMPLES:
            corners = ", ".join(f"{v:g}" for v in xyxy)
            self.examples.append(f"{reason}: {where}: box ({corners})")


class RecordDataset(DetectionDataset):
    """A dataset whose annotations are held in memory as :class:`Record` and images elsewhere."""

    def __init__(
        self,
        *,
        name: str,
        class_names: Sequence[str],
        category_ids: Sequence[int],
        records: Sequence[Record],
        collector: BoxCollector | None = None,
        notes: Sequence[str] = (),
        source: str = "",
    ) -> None:
        if not class_names:
            raise DatasetError(f"{name}: no classes")
        self.name = name
        self.class_names = tuple(class_names)
        self.category_ids = tuple(int(c) for c in category_ids)
        self.records = tuple(records)
        collector = collector or BoxCollector()
        self.drops = dict(collector.drops)
        self.drop_examples = tuple(collector.examples)
        self.clipped = collector.clipped
        self.notes = tuple(notes)
        self.source = source
        self._fingerprint: str | None = None

    @abc.abstractmethod
    def _load_image(self, index: int) -> np.ndarray:
        """Decodes image ``index``: uint8 [H, W, 3] in the frame of its annotations."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        """Decodes image ``index``; see :meth:`DetectionDataset.__getitem__`."""
        record = self.records[self._check_index(index)]
        image = self._load_image(index)
        if image.shape[:2] != (record.height, record.width):
            raise ImageReadError(
                f"{self.name}: {record.file_name} is {image.shape[1]}x{image.shape[0]} pixels but "
                f"annotated as {record.width}x{record.height}; its boxes cannot be trusted"
            )
        return Example(
            image=image,
            boxes=record.boxes.copy(),
            labels=record.labels.copy(),
            iscrowd=record.iscrowd.copy(),
            image_id=record.image_id,
            file_name=record.file_name,
        )

    def image_size(self, index: int) -> tuple[int, int]:
        """``(height, width)`` as annotated."""
        record = self.records[self._check_index(index)]
        return record.height, record.width

    def image_id(self, index: int) -> int | str:
        """The id of image ``index``."""
        return self.records[self._check_index(index)].image_id

    def file_name(self, index: int) -> str:
        """The relative path of image ``index``."""
        return self.records[self._check_index(index)].file_name

    def max_boxes_per_image(self) -> int:
        """Largest number of non-crowd boxes on one image."""
        return max((int((~r.iscrowd).sum()) for r in self.records), default=0)

    def coco_ground_truth(self) -> dict[str, Any]:
        """The annotations as a COCO JSON dict; see :meth:`DetectionDataset.coco_ground_truth`."""
        return ground_truth_from_records(self.records, self.class_names, self.category_ids)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over class names, category ids and all annotations."""
        if self._fingerprint is None:
            self._fingerprint = json_digest(self.coco_ground_truth())
        return self._fingerprint


def ground_truth_from_records(
    records: Sequence[Record], class_names: Sequence[str], category_ids: Sequence[int]
) -> dict[str, Any]:
    """Builds a COCO ground-truth dict from records.

    Args:
      records: the images in dataset order.
      class_names: names by contiguous label.
      category_ids: original ids by contiguous label.

    Returns:
      ``{"info", "images", "annotations", "categories"}``, plain Python numbers, annotation ids
      from 1.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in records:
        images.append(
            {
                "id": record.image_id,
                "file_name": record.file_name,
                "height": record.height,
                "width": record.width,
            }
        )
        for label, crowd, annotation in zip(
            record.labels, record.iscrowd, record.annotations, strict=True
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record.image_id,
                    "category_id": category_ids[int(label)],
                    "bbox": [float(v) for v in annotation["bbox"]],
                    "area": float(annotation["area"]),
                    "iscrowd": int(crowd),
                    "ignore": int(crowd),
                }
            )
    categories = [{"id": int(c), "name": n} for c, n in zip(category_ids, class_names, strict=True)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def json_digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value, independent of dict order and spacing."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def stack_boxes(boxes: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks boxes to float32 [N, 4]; (0, 4) for none."""
    return np.asarray(boxes, np.float32).reshape(-1, 4)
