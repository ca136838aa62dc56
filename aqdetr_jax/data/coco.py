"""COCO-format folders: one image folder and one instances JSON file."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from aqdetr_jax.data.dataset import (
    BoxCollector,
    DatasetError,
    Record,
    RecordDataset,
    stack_boxes,
)
from aqdetr_jax.data.files import check_relative, resolve_inside
from aqdetr_jax.data.images import MAX_PIXELS, read_image


class CocoFolder(RecordDataset):
    """A dataset in COCO format.

    Boxes of zero or negative size, with NaN or infinity, or wholly outside the image are dropped
    and counted in ``drops``; boxes over the border are clipped for training and stay as annotated
    in the ground truth. Images without boxes are kept. Crowd regions are flagged in the examples
    (the pipeline trains on none of them) and stay in the ground truth.

    Args:
      images_dir: folder of the images.
      annotation_file: instances JSON file.
      root: instead of the two above, a folder laid out as COCO's own: ``root/{split}/`` and
        ``root/annotations/instances_{split}.json``.
      split: name of the split; only a label when the two paths are given.
      max_pixels: refuse larger images.

    Raises:
      FileNotFoundError: the folder or the file is missing.
      DatasetError: the file is malformed; the message names the file and the offending id.
    """

    def __init__(
        self,
        images_dir: str | os.PathLike[str] | None = None,
        annotation_file: str | os.PathLike[str] | None = None,
        *,
        root: str | os.PathLike[str] | None = None,
        split: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if root is not None:
            if images_dir is not None or annotation_file is not None or split is None:
                raise DatasetError(
                    "coco: give either root and split, or images_dir and annotation_file"
                )
            images_dir = pathlib.Path(root) / split
            annotation_file = pathlib.Path(root) / "annotations" / f"instances_{split}.json"
        if images_dir is None or annotation_file is None:
            raise DatasetError("coco: images_dir and annotation_file (or root and split) needed")
        self.images_dir = pathlib.Path(images_dir)
        self.annotation_file = pathlib.Path(annotation_file)
        self.max_pixels = max_pixels
        hint = ""
        if root is not None:
            found = sorted(p.stem for p in pathlib.Path(root).glob("annotations/*.json"))
            splits = [name.removeprefix("instances_") for name in found]
            hint = f" (annotated splits there: {', '.join(splits) or 'none'})"
        if not self.images_dir.is_dir():
            raise FileNotFoundError(f"COCO image folder {self.images_dir} does not exist{hint}")
        if not self.annotation_file.exists():
            raise FileNotFoundError(f"annotation file {self.annotation_file} does not exist{hint}")
        parsed = CocoParser(read_json(self.annotation_file), str(self.annotation_file))
        super().__init__(
            name=f"coco/{split or self.annotation_file.stem}",
            class_names=parsed.class_names,
            category_ids=parsed.category_ids,
            records=parsed.records(),
            collector=parsed.collector,
        )

    def _load_image(self, index: int) -> np.ndarray:
        record = self.records[index]
        return read_image(
            self.image_path(index),
            expected_size=(record.height, record.width),
            max_pixels=self.max_pixels,
        )

    def image_path(self, index: int) -> pathlib.Path:
        """The path of image ``index``, links followed.

        Raises:
          ImageReadError: a link leads outside the image folder.
        """
        return resolve_inside(self.images_dir, self.file_name(index))


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def read_json(path: pathlib.Path) -> Any:
    """Reads strict JSON (no NaN or Infinity literals).

    Args:
      path: the file.

    Raises:
      FileNotFoundError: no such file.
      DatasetError: not valid JSON; the message names the file and the place.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"annotation file {path} does not exist") from None
    except (UnicodeDecodeError, OSError) as error:
        raise DatasetError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: not valid JSON ({error})") from error


class CocoParser:
    """Turns the content of an instances file into records, with errors that name the offender.

    Args:
      content: the parsed JSON.
      path: where it is from, for messages.

    Attributes:
      class_names: by ascending category id.
      category_ids: ascending.
      collector: counts of dropped boxes, complete after :meth:`records`.

    Raises:
      DatasetError: the content is malformed (also from :meth:`records`).
    """

    def __init__(self, content: Any, path: str) -> None:
        self.path = path
        self.collector = BoxCollector()
        if not isinstance(content, dict):
            raise DatasetError(f"{path}: the top level must be an object, not a list or a value")
        for key in ("images", "annotations", "categories"):
            if not isinstance(content.get(key), list):
                raise DatasetError(f"{path}: needs a list {key!r} at the top level")
            for position, entry in enumerate(content[key]):
                if not isinstance(entry, dict):
                    raise DatasetError(f"{path}: {key}[{position}] must be an object")
        self._images = content["images"]
        self._annotations = content["annotations"]
        self._read_categories(content["categories"])

    def _read_categories(self, categories: list[Mapping[str, Any]]) -> None:
        names: dict[int, str] = {}
        for position, entry in enumerate(categories):
            where = f"{self.path}: categories[{position}]"
            number = _integer(entry, "id", where)
            name = entry.get("name")
            if not isinstance(name, str) or not name:
                raise DatasetError(f"{where}: needs a name")
            if number in names:
                raise DatasetError(f"{where}: category id {number} is there twice")
            if name in names.values():
                raise DatasetError(f"{where}: category name {name!r} is there twice")
            names[number] = name
        if not names:
            raise DatasetError(f"{self.path}: no categories")
        self.category_ids = tuple(sorted(names))
        self.class_names = tuple(names[c] for c in self.category_ids)

    def records(self) -> list[Record]:
        """One record per image, in the order of the file."""
        images = self._read_images()
        by_image: dict[int | str, list[Mapping[str, Any]]] = {key: [] for key in images}
        seen: set[int] = set()
        for position, entry in enumerate(self._annotations):
            number = _integer(entry, "id", f"{self.path}: annotations[{position}]")
            if number in seen:
                raise DatasetError(f"{self.path}: annotation id {number} is there twice")
            seen.add(number)
            image_id = entry.get("image_id")
            if isinstance(image_id, bool) or not isinstance(image_id, int | str):
                raise DatasetError(f"{self.path}: annotation {number}: image_id {image_id!r}")
            if image_id not in by_image:
                other = str(image_id) if isinstance(image_id, int) else None
                if isinstance(image_id, str) and image_id.lstrip("-").isdecimal():
                    other = int(image_id)  # type: ignore[assignment]
                hint = "; numbers and strings are mixed" if other in by_image else ""
                raise DatasetError(
                    f"{self.path}: annotation {number} names image id {image_id!r}, "
                    f"which is not among the images{hint}"
                )
            by_image[image_id].append(entry)
        labels = {category: label for label, category in enumerate(self.category_ids)}
        return [self._record(image, by_image[key], labels) for key, image in images.items()]

    def _read_images(self) -> dict[int | str, Mapping[str, Any]]:
        images: dict[int | str, Mapping[str, Any]] = {}
        for position, entry in enumerate(self._images):
            image_id = entry.get("id")
            if isinstance(image_id, bool) or not isinstance(image_id, int | str):
                raise DatasetError(f"{self.path}: images[{position}]: id {image_id!r}")
            where = f"{self.path}: image {image_id!r}"
            if image_id in images:
                raise DatasetError(f"{where}: the id is there twice")
            check_relative(entry.get("file_name"), where)
            for key in ("height", "width"):
                if _integer(entry, key, where) < 1:
                    raise DatasetError(f"{where}: {key} must be positive, got {entry[key]}")
            images[image_id] = entry
        return images

    def _record(
        self,
        image: Mapping[str, Any],
        annotations: list[Mapping[str, Any]],
        label_of: Mapping[int, int],
    ) -> Record:
        height, width = int(image["height"]), int(image["width"])
        boxes, labels, crowd, truths = [], [], [], []
        for entry in annotations:
            where = f"{self.path}: annotation {entry['id']}"
            category = _integer(entry, "category_id", where)
            if category not in label_of:
                raise DatasetError(
                    f"{where} has category id {category}, which is not among the categories"
                )
            bbox = entry.get("bbox")
            if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
                raise DatasetError(f"{where}: bbox must be [x, y, width, height], got {bbox!r}")
            iscrowd = entry.get("iscrowd", 0)
            if iscrowd not in (0, 1):
                raise DatasetError(f"{where}: iscrowd must be 0 or 1, got {iscrowd!r}")
            x, y, w, h = (_float(v) for v in bbox)
            offender = f"{image['file_name']}, annotation {entry['id']}"
            box = self.collector.clean((x, y, x + w, y + h), height, width, offender)
            if box is None:
                continue
            area = entry.get("area", -1.0)
            if not _is_number(area) or not math.isfinite(_float(area)) or area < 0:
                area = w * h
            boxes.append(box)
            labels.append(label_of[category])
            crowd.append(bool(iscrowd))
            truths.append({"bbox": (x, y, w, h), "area": float(area)})
        return Record(
            image_id=image["id"],
            file_name=image["file_name"],
            height=height,
            width=width,
            boxes=stack_boxes(boxes),
            labels=np.asarray(labels, np.int32),
            iscrowd=np.asarray(crowd, bool),
            annotations=tuple(truths),
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer literal too large for a float: dropped as infinite is
        return math.copysign(math.inf, value)


def _integer(entry: Mapping[str, Any], key: str, where: str) -> int:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DatasetError(f"{where}: {key} must be a whole number, got {value!r}")
    return value
