"""Pascal VOC folders: ``JPEGImages``, ``Annotations`` and ``ImageSets/Main``."""

from __future__ import annotations

import codecs
import os
import pathlib
import re
import reprlib
from collections.abc import Sequence
from xml.etree import ElementTree

import numpy as np

from aqdetr_jax.data.dataset import (
    MAX_SIDE,
    BoxCollector,
    DatasetError,
    Record,
    RecordDataset,
    label_name,
    stack_boxes,
)
from aqdetr_jax.data.files import IMAGE_SUFFIXES, resolve_inside
from aqdetr_jax.data.images import MAX_PIXELS, read_image
from aqdetr_jax.data.voc_lists import Entry, ImageFolder, read_list
from aqdetr_jax.paths import as_path, each, files_of, snapshot

_MAX_XML_BYTES = 8_000_000
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    ("<".encode("utf-16-le"), "utf-16-le"),
    ("<".encode("utf-16-be"), "utf-16-be"),
)
# As declared -> as decoded. Each of them decodes ASCII as ASCII.
_ENCODINGS = {
    **dict.fromkeys(("utf-8", "utf8", "us-ascii", "ascii"), "utf-8"),
    **dict.fromkeys(("iso-8859-1", "latin-1", "latin1"), "latin-1"),
    **dict.fromkeys(("windows-1252", "cp1252"), "cp1252"),
    **dict.fromkeys(("gbk", "gb2312", "gb18030", "cp936"), "gb18030"),  # Each within the next.
    **dict.fromkeys(("shift-jis", "sjis", "cp932", "windows-31j"), "cp932"),
    "iso-8859-15": "iso-8859-15",
    "euc-jp": "euc-jp",
    **dict.fromkeys(("euc-kr", "cp949", "ks-c-5601-1987"), "cp949"),
    **dict.fromkeys(("big5", "cp950"), "cp950"),
}


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
      follow_links: read images through links that leave the image folder.

    Raises:
      FileNotFoundError: a folder, list, annotation or image file is missing.
      DatasetError: a file is malformed; the message names the file.
    """

    images_dir: pathlib.Path

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        class_names: Sequence[str] | None = None,
        *,
        max_pixels: int = MAX_PIXELS,
        follow_links: bool = False,
    ) -> None:
        self.root = as_path(root)
        self.max_pixels = max_pixels
        self.follow_links = follow_links
        self.images_dir = self.root / "JPEGImages"
        annotations = self.root / "Annotations"
        for folder in (self.images_dir, annotations):
            if not folder.is_dir():
                raise FileNotFoundError(f"Pascal VOC folder {folder} does not exist")
        with snapshot(self.root):
            self._open(split, class_names)

    def _open(self, split: str, class_names: Sequence[str] | None) -> None:
        annotations = self.root / "Annotations"
        images = ImageFolder(self.images_dir)
        entries = read_list(self.root, split, images)
        if class_names is None:
            class_names = _all_class_names(annotations)
        class_names = [label_name(name, f"{self.root}: class_names") for name in class_names]
        labels = {name: label for label, name in enumerate(class_names)}
        if len(labels) != len(class_names):
            raise DatasetError(f"{self.root}: class_names has a name twice: {list(class_names)}")
        collector = BoxCollector()
        records: list[Record] = []
        owners: dict[str, str] = {}
        paths = [annotations / f"{entry.stem}.xml" for entry in entries]
        trees = each(parse_xml, paths)
        for number, (entry, path, tree) in enumerate(
            zip(entries, paths, trees, strict=True), start=1
        ):
            image = _image_of(entry, images, path, (tree.findtext("filename") or "").strip())
            if image in owners:
                raise DatasetError(
                    f"{path}: its image is {image!r}, which is also that of {owners[image]}.xml"
                )
            owners[image] = entry.stem
            records.append(_record(tree, path, image, number, labels, collector))
        super().__init__(
            name=f"voc/{split}",
            class_names=class_names,
            category_ids=range(1, len(labels) + 1),
            records=records,
            collector=collector,
            source=str(annotations),
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


def parse_xml(path: pathlib.Path) -> ElementTree.Element:
    """Parses an XML file that must be plain: no DTD, no entity declarations.

    Its encoding is that of its byte-order mark, else the one it declares, else UTF-8.

    Args:
      path: the file.

    Raises:
      FileNotFoundError: no such file.
      DatasetError: too large, a document type or entity declaration, an encoding that is not
        among the known ones, or malformed XML.
    """
    try:
        if path.stat().st_size > _MAX_XML_BYTES:
            raise DatasetError(f"{path}: larger than {_MAX_XML_BYTES} bytes")
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"annotation file {path} does not exist") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from error
    encoding = _encoding(data, path)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: is no {encoding} text, save it as UTF-8 or declare its encoding "
            f'(<?xml version="1.0" encoding="..."?>): {error.reason} at byte {error.start}'
        ) from error
    if re.search(r"<!\s*(DOCTYPE|ENTITY)", text, re.IGNORECASE):
        raise DatasetError(f"{path}: document type and entity declarations are refused")
    try:
        # As text, not bytes: an encoding named in the file cannot change what was checked above.
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise DatasetError(f"{path}: malformed XML ({error})") from error


def _encoding(data: bytes, path: pathlib.Path) -> str:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return encoding
    declared = re.match(rb"""\s*<\?xml[^>]{0,100}?\sencoding\s*=\s*["']([^"'>]{1,40})["']""", data)
    if not declared:
        return "utf-8"
    name = declared[1].decode("latin-1")
    encoding = _ENCODINGS.get(name.lower().replace("_", "-"), "")
    if not encoding:
        raise DatasetError(
            f"{path}: declares the encoding {name!r}, which is not read; save it as UTF-8"
        )
    return encoding


def _image_of(entry: Entry, images: ImageFolder, annotation: pathlib.Path, named: str) -> str:
    """The image that an annotation file belongs to.

    Args:
      entry: the line of the list.
      images: ``JPEGImages``.
      annotation: the XML file, for messages.
      named: its ``<filename>``; "" if it has none.

    Raises:
      FileNotFoundError: there is no such image.
      DatasetError: two files may be meant.
    """
    if entry.image:
        return entry.image
    candidates = images.with_stem(entry.stem)
    folder = entry.stem.rpartition("/")[0]
    # <filename> counts from JPEGImages or from the sub-folder of the annotation file.
    beside = [str(pathlib.PurePosixPath(at, named)) for at in (folder, "") if named]
    meant = next((name for name in beside if images.has(name)), None)
    if meant is not None and (meant in candidates or not candidates):
        return meant
    if meant is not None:
        raise DatasetError(
            f"{annotation}: its <filename> is {meant!r}, but {candidates[0]!r} is named as it is, "
            f"and both are in {images.path}: correct <filename>, or remove one of the images"
        )
    if len(candidates) > 1:
        raise DatasetError(
            f"{annotation}: {' and '.join(map(repr, candidates))} have its name, and its "
            f"<filename> names neither: write one there, or remove one from {images.path}"
        )
    if not candidates:
        raise FileNotFoundError(
            f"no image {images.path / entry.stem} with one of {', '.join(IMAGE_SUFFIXES)}"
        )
    return candidates[0]


def _all_class_names(annotations: pathlib.Path) -> list[str]:
    names: set[str] = set()
    # Hidden files are no annotations: macOS leaves "._a.xml" beside "a.xml".
    files = (path for path in files_of(annotations) if path.suffix == ".xml")
    paths = [path for path in files if not path.name.startswith(".")]
    for path, tree in zip(paths, each(parse_xml, paths), strict=True):
        names.update(_class_of(entry, path) for entry in tree.iter("object"))
    if not names:
        raise DatasetError(
            f"{annotations}: no annotated object in any file, so that there are no classes to learn"
        )
    return sorted(names)


def _class_of(entry: ElementTree.Element, path: pathlib.Path) -> str:
    return label_name(_text(entry, "name", path), f"{path}: <object>")


def _record(
    tree: ElementTree.Element,
    path: pathlib.Path,
    image: str,
    image_id: int,
    label_of: dict[str, int],
    collector: BoxCollector,
) -> Record:
    size = tree.find("size")
    if size is None:
        raise DatasetError(f"{path}: no <size>")
    rows, columns = (_number(size, key, path) for key in ("height", "width"))
    if not (1 <= rows <= MAX_SIDE and 1 <= columns <= MAX_SIDE):
        raise DatasetError(
            f"{path}: <size> must be 1 to {MAX_SIDE} pixels each way, got {columns:g}x{rows:g}"
        )
    height, width = int(rows), int(columns)
    boxes, labels, difficult, truths = [], [], [], []
    for position, entry in enumerate(tree.iter("object"), start=1):
        name = _class_of(entry, path)
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
        boxes.append(box)
        labels.append(label_of[name])
        difficult.append(entry.findtext("difficult", "0").strip() == "1")
        x, y, w, h = xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1
        truths.append({"bbox": (x, y, w, h), "area": w * h})
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
        raise DatasetError(f"{path}: <{key}> is no number: {reprlib.repr(text)}") from None
