"""Pascal VOC folders: ``JPEGImages``, ``Annotations`` and ``ImageSets/Main``."""

from __future__ import annotations

import math
import os
import pathlib
import re
from collections.abc import Sequence
from xml.etree import ElementTree

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

_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
_MAX_XML_BYTES = 8_000_000


class VocFolder(RecordDataset):
    """A dataset in Pascal VOC layout.

    VOC counts pixels from 1 and includes both ends, so a box becomes
    ``(xmin - 1, ymin - 1, xmax, ymax)``. A box with ``xmax <= xmin`` or ``ymax <= ymin`` has no
    area; it is dropped and counted. Objects marked ``difficult`` are no training targets and are
    ignored in scoring (``iscrowd`` in the ground truth).

    Args:
      root: folder with the three folders above.
      split: a list in ``ImageSets/Main``, without ``.txt``.
      class_names: names in label order; None takes all names in ``Annotations`` (of every split,
        so that the splits agree), sorted.
      max_pixels: refuse larger images.

    Raises:
      FileNotFoundError: a folder, list, annotation or image file is missing.
      DatasetError: a file is malformed; the message names the file.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        class_names: Sequence[str] | None = None,
        *,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.root = pathlib.Path(root)
        self.max_pixels = max_pixels
        self._images_dir = self.root / "JPEGImages"
        annotations = self.root / "Annotations"
        for folder in (self._images_dir, annotations):
            if not folder.is_dir():
                raise FileNotFoundError(f"Pascal VOC folder {folder} does not exist")
        stems = _read_split(self.root, split)
        if class_names is None:
            class_names = _all_class_names(annotations)
        labels = {name: label for label, name in enumerate(class_names)}
        if len(labels) != len(class_names):
            raise DatasetError(f"{self.root}: class_names has a name twice: {list(class_names)}")
        collector = BoxCollector()
        records = []
        for number, stem in enumerate(stems, start=1):
            image = _find_image(self._images_dir, stem)
            records.append(_record(annotations / f"{stem}.xml", image, number, labels, collector))
        super().__init__(
            name=f"voc/{split}",
            class_names=class_names,
            category_ids=range(1, len(labels) + 1),
            records=records,
            collector=collector,
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
        return resolve_inside(self._images_dir, self.file_name(index))


def parse_xml(path: pathlib.Path) -> ElementTree.Element:
    """Parses an XML file that must be plain: UTF-8, no DTD, no entity declarations.

    Args:
      path: the file.

    Raises:
      FileNotFoundError: no such file.
      DatasetError: too large, a document type or entity declaration, or malformed XML.
    """
    try:
        if path.stat().st_size > _MAX_XML_BYTES:
            raise DatasetError(f"{path}: larger than {_MAX_XML_BYTES} bytes")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"annotation file {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 text ({error})") from error
    if re.search(r"<!\s*(DOCTYPE|ENTITY)", text, re.IGNORECASE):
        raise DatasetError(f"{path}: document type and entity declarations are refused")
    try:
        # As text, not bytes: an encoding named in the file cannot change what was checked above.
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise DatasetError(f"{path}: malformed XML ({error})") from error


def _read_split(root: pathlib.Path, split: str) -> list[str]:
    lists = root / "ImageSets" / "Main"
    path = lists / f"{check_relative(split, 'split')}.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in lists.glob("*.txt"))) or "none"
        raise FileNotFoundError(f"split list {path} does not exist (there are: {known})") from None
    # Per-class lists of VOC have a second column (-1, 0 or 1).
    stems = [line.split()[0] for line in lines if line.strip()]
    if len(set(stems)) != len(stems):
        twice = next(s for s in stems if stems.count(s) > 1)
        raise DatasetError(f"{path}: {twice!r} is listed twice")
    return [check_relative(stem, str(path)) for stem in stems]


def _find_image(folder: pathlib.Path, stem: str) -> str:
    for suffix in _SUFFIXES:
        if (folder / (stem + suffix)).is_file():
            return stem + suffix
    raise FileNotFoundError(f"no image {folder / stem} with one of {', '.join(_SUFFIXES[:3])}")


def _all_class_names(annotations: pathlib.Path) -> list[str]:
    names: set[str] = set()
    for path in sorted(annotations.glob("*.xml")):
        names.update(_text(entry, "name", path) for entry in parse_xml(path).iter("object"))
    if not names:
        raise DatasetError(f"{annotations}: no annotated object in any file; give class_names")
    return sorted(names)


def _record(
    path: pathlib.Path,
    image: str,
    image_id: int,
    label_of: dict[str, int],
    collector: BoxCollector,
) -> Record:
    tree = parse_xml(path)
    size = tree.find("size")
    if size is None:
        raise DatasetError(f"{path}: no <size>")
    rows, columns = (_number(size, key, path) for key in ("height", "width"))
    if not (1 <= rows < math.inf and 1 <= columns < math.inf):
        raise DatasetError(f"{path}: <size> must be positive, got {columns:g}x{rows:g}")
    height, width = int(rows), int(columns)
    boxes, labels, difficult, truths = [], [], [], []
    for position, entry in enumerate(tree.iter("object"), start=1):
        name = _text(entry, "name", path)
        if name not in label_of:
            raise DatasetError(f"{path}: object {position} is a {name!r}, not one of the classes")
        corners = entry.find("bndbox")
        if corners is None:
            raise DatasetError(f"{path}: object {position} has no <bndbox>")
        xmin, ymin, xmax, ymax = (
            _number(corners, key, path) for key in ("xmin", "ymin", "xmax", "ymax")
        )
        where = f"{path.name}, object {position}"
        if xmax <= xmin or ymax <= ymin:
            # In the file's own numbers, where the box has no area; a shift would give it one.
            collector.clean((xmin, ymin, xmax, ymax), height, width, where)
            continue
        box = collector.clean((xmin - 1, ymin - 1, xmax, ymax), height, width, where)
        if box is None:
            continue
        x1, y1, x2, y2 = box.tolist()
        boxes.append(box)
        labels.append(label_of[name])
        difficult.append(entry.findtext("difficult", "0").strip() == "1")
        truths.append({"bbox": (x1, y1, x2 - x1, y2 - y1), "area": (x2 - x1) * (y2 - y1)})
    return Record(
        image_id=image_id,
        file_name=image,
        height=height,
        width=width,
        boxes=stack_boxes(boxes),
        labels=np.asarray(labels, np.int32),
        iscrowd=np.asarray(difficult, bool),
        annotations=tuple(truths),
    )


def _text(entry: ElementTree.Element, key: str, path: pathlib.Path) -> str:
    value = (entry.findtext(key) or "").strip()
    if not value:
        raise DatasetError(f"{path}: <{entry.tag}> has no <{key}>")
    return value


def _number(entry: ElementTree.Element, key: str, path: pathlib.Path) -> float:
    text = _text(entry, key, path)
    try:
        return float(text)
    except ValueError:
        raise DatasetError(f"{path}: <{key}> is no number: {text!r}") from None
