"""COCO-format folders: one image folder and one instances JSON file."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from aqdetr_jax.data.dataset import (
    MAX_SIDE,
    BoxCollector,
    DatasetError,
    Record,
    RecordDataset,
    label_name,
    stack_boxes,
    to_float,
)
from aqdetr_jax.data.files import check_relative, resolve_inside
from aqdetr_jax.data.images import MAX_PIXELS, read_image
from aqdetr_jax.paths import as_path

_LONGEST_NUMBER = 300
"""Digits of a whole number, which then has a float; what is longer is read as one, infinite."""


class CocoFolder(RecordDataset):
    """A dataset in COCO format.

    Boxes of zero or negative size, not finite, or wholly outside the image are dropped
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
      follow_links: read images through links that leave the image folder.

    Raises:
      FileNotFoundError: the folder or the file is missing.
      DatasetError: the file is malformed; the message names the file and the offending id.
    """

    images_dir: pathlib.Path

    def __init__(
        self,
        images_dir: str | os.PathLike[str] | None = None,
        annotation_file: str | os.PathLike[str] | None = None,
        *,
        root: str | os.PathLike[str] | None = None,
        split: str | None = None,
        max_pixels: int = MAX_PIXELS,
        follow_links: bool = False,
    ) -> None:
        if root is not None:
            if images_dir is not None or annotation_file is not None or split is None:
                raise DatasetError(
                    "coco: give root and split (config.data.root, train_split, eval_split), or "
                    "images_dir and annotation_file (config.data.train_images, train_annotations, "
                    "eval_images, eval_annotations), not both"
                )
            images_dir = as_path(root) / split
            annotation_file = as_path(root) / "annotations" / f"instances_{split}.json"
        if images_dir is None or annotation_file is None:
            raise DatasetError(
                "coco: needs images_dir and annotation_file (config.data.train_images, "
                "train_annotations, eval_images, eval_annotations), or root and split "
                "(config.data.root, train_split, eval_split)"
            )
        self.images_dir = as_path(images_dir)
        self.annotation_file = as_path(annotation_file)
        self.max_pixels = max_pixels
        self.follow_links = follow_links
        hint = ""
        if root is not None:
            found = sorted(p.stem for p in as_path(root).glob("annotations/*.json"))
            splits = [name.removeprefix("instances_") for name in found]
            hint = (
                f" (annotated splits there: {', '.join(splits) or 'none'}; "
                "config.data.train_split and eval_split name them)"
            )
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
            notes=parsed.notes,
            source=str(self.annotation_file),
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
          ImageReadError: a link leads outside the image folder and may not.
        """
        return resolve_inside(
            self.images_dir, self.file_name(index), follow_links=self.follow_links
        )


class _NoNumber(ValueError):
    """``NaN``, ``Infinity`` or ``-Infinity``, which Python writes and JSON has not."""


def _refuse_constant(text: str) -> NoReturn:
    raise _NoNumber(text)


def _whole_number(text: str) -> int | float:
    return int(text) if len(text) <= _LONGEST_NUMBER else float(text)


def read_json(path: pathlib.Path) -> Any:
    """Reads strict JSON (no NaN or Infinity literals).

    Whole numbers of hundreds of digits, which no float holds and Python itself refuses from 4300
    digits on, become infinite.

    Args:
      path: the file.

    Raises:
      FileNotFoundError: no such file.
      DatasetError: not valid JSON; the message names the file and the place.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"annotation file {path} does not exist") from None
    except (UnicodeDecodeError, OSError) as error:
        raise DatasetError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_int=_whole_number)
    except _NoNumber as error:
        raise DatasetError(
            f"{path}: not valid JSON ({error} is no JSON number{_place_of(str(error), text)})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: not valid JSON ({error})") from error


def _place_of(constant: str, text: str) -> str:
    """Where a constant is first and the id of what has it; the parser itself tells neither."""
    mark = object()

    def places(value: Any, path: str, owner: str) -> Iterator[str]:
        if value is mark:
            yield f": {path.removeprefix('.')}{owner}"
        elif isinstance(value, dict):
            name = value.get("id")
            owner = f", id {reprlib.repr(name)}" if isinstance(name, int | str) else owner
            for key, inner in value.items():
                yield from places(inner, f"{path}.{key}", owner)
        elif isinstance(value, list):
            for position, inner in enumerate(value):
                yield from places(inner, f"{path}[{position}]", owner)

    try:
        content = json.loads(text, parse_constant=lambda c: mark if c == constant else None)
        return next(places(content, "", ""), "")
    except (ValueError, RecursionError):  # behind it the file has worse
        return ""


class CocoParser:
    """Turns the content of an instances file into records, with errors that name the offender.

    Args:
      content: the parsed JSON.
      path: where it is from, for messages.

    Attributes:
      class_names: by ascending category id.
      category_ids: ascending.
      collector: counts of dropped boxes, complete after :meth:`records`.
      notes: sentences on the root category of a Roboflow export, and on what was made up for in
        the annotations (complete after :meth:`records`).

    Raises:
      DatasetError: the content is malformed (also from :meth:`records`).
    """

    def __init__(self, content: Any, path: str) -> None:
        self.path = path
        self.collector = BoxCollector()
        self.notes: tuple[str, ...] = ()
        self._areas = 0
        self._without_area: list[Mapping[str, Any]] = []
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
        self._read_categories(self._without_root(content["categories"]))

    def _without_root(self, categories: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Leaves out the root that Roboflow writes: id 0, parent of all others, on no box."""
        root = next((c for c in categories if type(c.get("id")) is int and c["id"] == 0), None)
        others = [c for c in categories if c is not root]
        if (
            root is None
            or not others
            or not isinstance(root.get("name"), str)
            or root.get("supercategory") not in (None, "", "none")
            or any(c.get("supercategory") != root["name"] for c in others)
            or any(a.get("category_id") == 0 for a in self._annotations)
        ):
            return categories
        self.notes = (
            f"category 0 ({reprlib.repr(root['name'])}) is left out: it is on no box, and the "
            "parent of all others, as Roboflow's exports have it",
        )
        return others

    def _read_categories(self, categories: list[Mapping[str, Any]]) -> None:
        names: dict[int, str] = {}
        ids: dict[str, int] = {}
        for position, entry in enumerate(categories):
            where = f"{self.path}: categories[{position}]"
            number = _integer(entry, "id", where)
            if number in names:
                raise DatasetError(f"{where}: category id {number} is there twice")
            name = label_name(entry.get("name"), f"{self.path}: category {number}")
            if name in ids:
                raise DatasetError(
                    f"{self.path}: categories {ids[name]} and {number} have the same name, {name!r}"
                )
            names[number], ids[name] = name, number
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
                raise DatasetError(
                    f"{self.path}: annotation {number}: image_id must be a whole number or text, "
                    f"got {reprlib.repr(image_id)}"
                )
            if image_id not in by_image:
                other = str(image_id) if isinstance(image_id, int) else None
                if isinstance(image_id, str) and re.fullmatch(r"-?[0-9]{1,18}", image_id):
                    other = int(image_id)  # type: ignore[assignment]
                hint = "; numbers and strings are mixed" if other in by_image else ""
                raise DatasetError(
                    f"{self.path}: annotation {number} names image id {reprlib.repr(image_id)}, "
                    f"which is not among the images{hint}"
                )
            by_image[image_id].append(entry)
        labels = {category: label for label, category in enumerate(self.category_ids)}
        records = [self._record(image, by_image[key], labels) for key, image in images.items()]
        if 0 in seen:
            self.notes += (
                "annotation id 0 gets another number in evaluation, where a match with 0 would "
                "count as none",
            )
        # A file without any area is none that lost some.
        if self._without_area and (self._areas or any("area" in a for a in self._without_area)):
            self.notes += (
                f"{len(self._without_area)} annotations have no area above 0 (first: annotation "
                f"{self._without_area[0]['id']}): that of the box counts",
            )
        return records

    def _read_images(self) -> dict[int | str, Mapping[str, Any]]:
        images: dict[int | str, Mapping[str, Any]] = {}
        for position, entry in enumerate(self._images):
            image_id = entry.get("id")
            if not isinstance(image_id, str):
                image_id = _integer(entry, "id", f"{self.path}: images[{position}]", "or text")
            where = f"{self.path}: image {reprlib.repr(image_id)}"
            if image_id in images:
                raise DatasetError(f"{where}: the id is there twice")
            check_relative(entry.get("file_name"), where)
            for key in ("height", "width"):
                if not 1 <= _integer(entry, key, where) <= MAX_SIDE:
                    raise DatasetError(
                        f"{where}: {key} must be 1 to {MAX_SIDE} pixels, got {entry[key]}"
                    )
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
                raise DatasetError(
                    f"{where}: bbox must be [x, y, width, height], got {reprlib.repr(bbox)}"
                )
            iscrowd = entry.get("iscrowd", 0)
            if iscrowd not in (0, 1):
                raise DatasetError(f"{where}: iscrowd must be 0 or 1, got {reprlib.repr(iscrowd)}")
            x, y, w, h = (to_float(v) for v in bbox)
            offender = f"{image['file_name']}, annotation {entry['id']}"
            box = self.collector.clean((x, y, x + w, y + h), height, width, offender)
            if box is None:
                continue
            area = to_float(entry["area"]) if _is_number(entry.get("area")) else 0.0
            if 0 < area < math.inf:
                self._areas += 1
            else:  # A placeholder, or NaN.
                self._without_area.append(entry)
                area = w * h
            boxes.append(box)
            labels.append(label_of[category])
            crowd.append(bool(iscrowd))
            truths.append({"bbox": (x, y, w, h), "area": area})
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


def _integer(entry: Mapping[str, Any], key: str, where: str, alternative: str = "") -> int:
    """A whole number of 64 bits: arrays and pycocotools hold no longer one."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        kinds = " ".join(filter(None, ("a whole number of up to 64 bits", alternative)))
        raise DatasetError(f"{where}: {key} must be {kinds}, got {reprlib.repr(value)}")
    return value
