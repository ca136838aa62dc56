"""YOLO folders: images, beside them one text file of normalised boxes an image, and class names.

The layout of ultralytics and of most labelling tools. ``data.yaml`` names the classes and where
each split lies; without it ``classes.txt`` names the classes and the splits are the folders of
``images/``. The labels of ``.../images/x/a.jpg`` are ``.../labels/x/a.txt``.
"""

from __future__ import annotations

import collections
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from aqdetr_jax.data import exif
from aqdetr_jax.data.class_names import class_name
from aqdetr_jax.data.dataset import (
    BoxCollector,
    DatasetError,
    Record,
    RecordDataset,
    stack_boxes,
)
from aqdetr_jax.data.files import IMAGE_SUFFIXES, check_relative, resolve_inside
from aqdetr_jax.data.images import MAX_PIXELS, read_header, read_image

YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
CLASS_FILES = ("classes.txt", "labels/classes.txt", "obj.names")
_SPLIT_KEYS = ("train", "val", "test")
_MAX_TEXT = 8_000_000
_NOT_NORMALISED = 2.0  # beyond it a number is no share of a side, however far a box sticks out


class YoloFolder(RecordDataset):
    """A dataset in YOLO layout.

    A line of a label file is ``class cx cy width height`` in shares of the image's sides, or
    ``class x1 y1 x2 y2 ...``, an outline that is reduced to its box. Shares are of the upright
    image (turned as its EXIF orientation says), as the tools of this layout show it. An image
    without a label file, or with an empty one, has no objects. Class numbers are the category ids.

    Args:
      root: the folder.
      split: a split of :func:`find_splits`.
      follow_links: images may be links that lead outside ``root``.
      max_pixels: refuse larger images.

    Raises:
      FileNotFoundError: the folder, its list of classes or the split's images are missing.
      DatasetError: a file is malformed; the message names file and line.
      ImageReadError: the size of an image cannot be read.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        follow_links: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.root = pathlib.Path(root)
        self.max_pixels = max_pixels
        self.follow_links = follow_links
        settings = read_settings(self.root)
        splits = find_splits(self.root, settings)
        if split not in splits:
            known = ", ".join(splits) or "none"
            raise FileNotFoundError(f"{self.root}: no split {split!r} (there are: {known})")
        images = _images_of(self.root, splits[split])
        if not images:
            shown = ", ".join(map(str, splits[split]))
            raise FileNotFoundError(f"{self.root}: split {split!r} has no images in {shown}")
        names = _class_names(self.root, settings)
        collector = BoxCollector()
        keypoints = "kpt_shape" in settings
        records = [
            self._record(image, number, len(names), keypoints, collector)
            for number, image in enumerate(images, start=1)
        ]
        super().__init__(
            name=f"yolo/{split}",
            class_names=names,
            category_ids=range(len(names)),
            records=records,
            collector=collector,
        )

    def _record(
        self, image: str, number: int, classes: int, keypoints: bool, collector: BoxCollector
    ) -> Record:
        path = resolve_inside(self.root, image, follow_links=self.follow_links)
        height, width = _upright_size(path)
        file = _label_file(self.root / image)
        boxes, labels, truths = [], [], []
        for line, (label, corners) in _read_labels(file, classes, keypoints):
            x1, y1, x2, y2 = corners * (width, height, width, height)
            where = f"{file.name}, line {line}"
            box = collector.clean((x1, y1, x2, y2), height, width, where)
            if box is None:
                continue
            boxes.append(box)
            labels.append(label)
            w, h = float(x2 - x1), float(y2 - y1)
            truths.append({"bbox": (float(x1), float(y1), w, h), "area": w * h})
        return Record(
            image_id=number,
            file_name=image,
            height=height,
            width=width,
            boxes=stack_boxes(boxes),
            labels=np.asarray(labels, np.int32),
            iscrowd=np.zeros(len(labels), bool),
            annotations=tuple(truths),
        )

    def _load_image(self, index: int) -> np.ndarray:
        return read_image(self.image_path(index), max_pixels=self.max_pixels, upright=True)

    def image_path(self, index: int) -> pathlib.Path:
        """The path of image ``index``, links followed.

        Raises:
          ImageReadError: a link leads outside the folder.
        """
        return resolve_inside(self.root, self.file_name(index), follow_links=self.follow_links)


# --- what the folder says of itself --------------------------------------------------------------


def settings_file(root: pathlib.Path) -> pathlib.Path | None:
    """The YAML file of a folder, or None.

    Raises:
      DatasetError: there are several.
    """
    found = [root / name for name in YAML_NAMES if (root / name).is_file()]
    if not found:  # under another name, such as coco128.yaml
        found = [path for path in sorted(root.glob("*.y*ml")) if _names_a_split(path)]
    if len(found) > 1:
        raise DatasetError(
            f"{root}: {found[0].name} and {found[1].name} both describe a YOLO set; keep one"
        )
    return found[0] if found else None


def _names_a_split(path: pathlib.Path) -> bool:
    try:
        content = _load_yaml(path)
    except DatasetError:
        return False
    return isinstance(content, dict) and "names" in content and "train" in content


def read_settings(root: pathlib.Path) -> Mapping[str, Any]:
    """The content of a folder's YAML file; empty without one.

    Raises:
      DatasetError: it cannot be read.
    """
    path = settings_file(root)
    if path is None:
        return {}
    content = _load_yaml(path)
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: must hold keys such as names and train")
    return content


def _load_yaml(path: pathlib.Path) -> Any:
    text = read_text(path)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{path}: not valid YAML ({reason})") from error


def read_text(path: pathlib.Path) -> str:
    """A UTF-8 text file, with or without a byte-order mark.

    Raises:
      FileNotFoundError: no such file.
      DatasetError: too large, or not UTF-8.
    """
    try:
        if path.stat().st_size > _MAX_TEXT:
            raise DatasetError(f"{path}: larger than {_MAX_TEXT} bytes")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 text ({error})") from error


def _class_names(root: pathlib.Path, settings: Mapping[str, Any]) -> list[str]:
    where, names = _named_classes(root, settings)
    found = [class_name(name, f"{where}: name {n}") for n, name in enumerate(names)]
    for number, name in enumerate(found):
        if name in found[:number]:
            raise DatasetError(
                f"{where}: classes {found.index(name)} and {number} are both named {name!r}"
            )
    return found


def _named_classes(root: pathlib.Path, settings: Mapping[str, Any]) -> tuple[str, list[str]]:
    if "names" in settings:
        where, names = str(settings_file(root)), settings["names"]
        if isinstance(names, dict):
            if sorted(names, key=repr) != sorted(range(len(names)), key=repr):
                raise DatasetError(f"{where}: the keys of names must be 0 to {len(names) - 1}")
            names = [names[number] for number in range(len(names))]
        if not isinstance(names, list) or not names:
            raise DatasetError(f"{where}: names must be a list of class names")
        count = settings.get("nc", len(names))
        if count != len(names):
            raise DatasetError(f"{where}: nc is {count!r}, but there are {len(names)} names")
        # YAML reads a bare 3 or yes as a number or a truth value.
        return where, [str(name) for name in names]
    for name in CLASS_FILES:
        if (root / name).is_file():
            lines = read_text(root / name).splitlines()
            while lines and not lines[-1].strip():
                lines.pop()
            if not lines:
                raise DatasetError(f"{root / name}: has no class names")
            return str(root / name), lines
    raise FileNotFoundError(
        f"{root}: nothing names the classes: a YOLO folder has data.yaml with names, or classes.txt"
    )


def find_splits(
    root: pathlib.Path, settings: Mapping[str, Any] | None = None
) -> dict[str, list[pathlib.Path]]:
    """The folders (or files that list images) of each split, in the order train, val, test.

    Args:
      root: the YOLO folder.
      settings: content of its YAML file; read when None.

    Raises:
      DatasetError: the YAML file names a place that does not exist.
    """
    settings = read_settings(root) if settings is None else settings
    named = {key: settings[key] for key in _SPLIT_KEYS if settings.get(key)}
    if named:
        where = settings_file(root)
        base = _base(root, settings)
        return {key: _places(value, base, root, f"{where}: {key}") for key, value in named.items()}
    images = root / "images"
    if not images.is_dir():
        return {}
    folders = [path for path in sorted(images.iterdir()) if path.is_dir()]
    return {path.name: [path] for path in folders} or {"all": [images]}


def _base(root: pathlib.Path, settings: Mapping[str, Any]) -> pathlib.Path:
    """Where the file's paths start: its ``path``, if that is here, else its own folder."""
    named = settings.get("path")
    if isinstance(named, str) and named:
        path = (root / named).resolve()
        # A path of the machine that wrote it, or of ultralytics' own datasets folder.
        if path.is_dir() and path.is_relative_to(root.resolve()):
            return path
    return root


def _places(
    value: object, base: pathlib.Path, root: pathlib.Path, where: str
) -> list[pathlib.Path]:
    items = value if isinstance(value, list) else [value]
    return [_place(item, base, root, where) for item in items]


def _place(item: object, base: pathlib.Path, root: pathlib.Path, where: str) -> pathlib.Path:
    if not isinstance(item, str) or not item:
        raise DatasetError(f"{where}: must be a path or a list of paths, got {item!r}")
    # Roboflow writes ../train/images and means train/images; an absolute path was another
    # machine's, but its end may be here.
    parts = pathlib.PurePosixPath(item.replace("\\", "/")).parts
    inner = [part for part in parts if part not in ("..", ".", "/")]
    for start in range(len(inner)):
        tail = pathlib.PurePosixPath(*inner[start:])
        for folder in (base, root):
            if (folder / tail).exists():
                return folder / tail
        if not item.startswith(("/", "..")):
            break  # a relative path says where it is
    raise DatasetError(f"{where}: {item!r} does not exist in {root}")


# --- images and labels ---------------------------------------------------------------------------


def _images_of(root: pathlib.Path, places: Sequence[pathlib.Path]) -> list[str]:
    """Images by their path in ``root``, in the order of the places, sorted inside each."""
    found: list[str] = []
    for place in places:
        if place.is_file():
            found += _listed(root, place)
        else:
            files = (
                p for p in place.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()
            )
            found += sorted(path.relative_to(root).as_posix() for path in files)
    for name, count in collections.Counter(found).items():
        if count > 1:
            raise DatasetError(f"{root}: {name!r} is in a split twice")
    labels: dict[pathlib.Path, str] = {}
    for name in found:
        other = labels.setdefault(_label_file(root / name), name)
        if other != name:
            raise DatasetError(
                f"{root}: {other!r} and {name!r} would have the same label file; rename one"
            )
    return found


def _listed(root: pathlib.Path, file: pathlib.Path) -> list[str]:
    """Images listed in a text file, one a line, relative to its folder or to ``root``."""
    names = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        name = check_relative(line.strip().replace("\\", "/").removeprefix("./"), where)
        paths = [folder / name for folder in (file.parent, root) if (folder / name).is_file()]
        if not paths:
            raise FileNotFoundError(f"{where}: no image {name!r} in {file.parent} or {root}")
        names.append(paths[0].relative_to(root).as_posix())
    return names


def _label_file(image: pathlib.Path) -> pathlib.Path:
    """``.../labels/x/a.txt`` of ``.../images/x/a.jpg``; beside the image without such a folder."""
    parts = list(image.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return pathlib.Path(*parts).with_suffix(".txt")


def _read_labels(
    file: pathlib.Path, classes: int, keypoints: bool
) -> list[tuple[int, tuple[int, np.ndarray]]]:
    """(line number, (class, corners float64 [4] in shares of the sides)) of every object."""
    if not file.is_file():
        return []
    found = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if line.strip():
            found.append(
                (number, _parse(line.split(), classes, keypoints, f"{file}, line {number}"))
            )
    return found


def _parse(
    words: Sequence[str], classes: int, keypoints: bool, where: str
) -> tuple[int, np.ndarray]:
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise DatasetError(f"{where}: must be numbers only") from None
    label, numbers = values[0], np.array(values[1:])
    if not label.is_integer() or not 0 <= label < classes:
        raise DatasetError(f"{where}: class {words[0]}, but classes are 0 to {classes - 1}")
    if keypoints and len(numbers) > 4:
        numbers = numbers[:4]  # what follows the box are its key points
    if np.any(np.isfinite(numbers) & (np.abs(numbers) > _NOT_NORMALISED)):
        worst = max((n for n in numbers if math.isfinite(n)), key=abs)
        raise DatasetError(
            f"{where}: {worst:g} is no share of a side: YOLO boxes are normalised to the image"
        )
    if len(numbers) == 4:
        centre, size = numbers[:2], numbers[2:]
        return int(label), np.concatenate([centre - size / 2, centre + size / 2])
    if len(numbers) >= 6 and len(numbers) % 2 == 0:
        points = numbers.reshape(-1, 2)
        # NaN in an outline must not become a whole box.
        return int(label), np.concatenate([points.min(0), points.max(0)])
    raise DatasetError(
        f"{where}: {len(words)} numbers; an object is 'class cx cy width height' or "
        "'class x1 y1 x2 y2 x3 y3 ...'"
    )


def _upright_size(path: pathlib.Path) -> tuple[int, int]:
    header = read_header(path)
    stored = header.height, header.width
    return stored[::-1] if header.orientation in exif.SIDEWAYS else stored
