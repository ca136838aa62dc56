"""YOLO folders: images, beside them one text file of normalised boxes an image, and class names.

The layout of ultralytics and of most labelling tools. ``data.yaml`` names the classes and where
each split lies; without it ``classes.txt`` names the classes and the splits are the folders of
``images/``. The labels of ``.../images/x/a.jpg`` are ``.../labels/x/a.txt``.
"""

from __future__ import annotations

import collections
import functools
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from aqdetr_jax.data import exif
from aqdetr_jax.data.dataset import (
    BoxCollector,
    DatasetError,
    ImageReadError,
    Record,
    RecordDataset,
    stack_boxes,
)
from aqdetr_jax.data.files import resolve_inside
from aqdetr_jax.data.images import MAX_PIXELS, read_header, read_image
from aqdetr_jax.data.yolo_files import class_list, read_settings, read_text, split_images
from aqdetr_jax.paths import as_path, each, snapshot

_NOT_NORMALISED = 2.0  # beyond it a number is no share of a side, however far a box sticks out


class YoloFolder(RecordDataset):
    """A dataset in YOLO layout.

    A line of a label file is ``class cx cy width height`` in shares of the image's sides, or
    ``class x1 y1 x2 y2 ...``, an outline that is reduced to its box. Shares are of the upright
    image (turned as its EXIF orientation says), as the tools of this layout show it. An image
    without a label file, or with an empty one, has no objects. Class numbers are the category ids.
    An image whose size cannot be read counts as of the size that most have, until it is read.

    Args:
      root: the folder.
      split: a split of :func:`~aqdetr_jax.data.yolo_files.find_splits`.
      follow_links: images may be links that lead outside ``root``.
      max_pixels: refuse larger images.

    Raises:
      FileNotFoundError: the folder, its list of classes or the split's images are missing.
      DatasetError: a file is malformed; the message names file and line.
      ImageReadError: the size of no image can be read.
    """

    images_dir: pathlib.Path

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        follow_links: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.root = self.images_dir = as_path(root)
        self.max_pixels = max_pixels
        self.follow_links = follow_links
        with snapshot(self.root):
            self._open(split)

    def _open(self, split: str) -> None:
        settings = read_settings(self.root)
        images = split_images(self.root, split, settings)
        names = class_list(self.root, settings)
        files = self._label_files(images)
        sizes, unreadable = self._sizes(images)
        if len(unreadable) == len(images):
            raise ImageReadError(f"none of the {len(images)} images can be read: {unreadable[0]}")
        collector = BoxCollector()
        keypoints = "kpt_shape" in settings
        labels = each(lambda file: _read_labels(file, len(names), keypoints), files)
        records = [
            _record(image, number, size, objects, file, collector)
            for number, (image, size, file, objects) in enumerate(
                zip(images, sizes, files, labels, strict=True), start=1
            )
        ]
        super().__init__(
            name=f"yolo/{split}",
            class_names=names,
            category_ids=range(len(names)),
            records=records,
            collector=collector,
            notes=_notes(images, files, unreadable),
            source=str(files[0]),
        )

    def _label_files(self, images: Sequence[str]) -> list[pathlib.Path]:
        owners: dict[str, str] = {}
        for image in images:
            other = owners.setdefault(label_file(image), image)
            if other != image:
                raise DatasetError(
                    f"{self.root}: {other!r} and {image!r} would have the same label file; "
                    "rename one"
                )
        return [self.root / name for name in owners]

    def _sizes(self, images: Sequence[str]) -> tuple[list[tuple[int, int]], list[str]]:
        """(height, width) of every image, and why some could not be read."""
        found: list[tuple[int, int] | None] = []
        unreadable: list[str] = []

        def size_of(path: pathlib.Path) -> tuple[int, int] | ImageReadError:
            try:
                name = path.relative_to(self.root).as_posix()
                inside = resolve_inside(self.root, name, follow_links=self.follow_links)
                return _upright_size(inside)
            except ImageReadError as error:
                return error

        for size in each(size_of, [self.root / image for image in images]):
            if isinstance(size, ImageReadError):
                unreadable.append(str(size))
                found.append(None)
            else:
                found.append(size)
        readable = collections.Counter(size for size in found if size is not None)
        usual = readable.most_common(1)[0][0] if readable else (1, 1)
        return [usual if size is None else size for size in found], unreadable

    def _load_image(self, index: int) -> np.ndarray:
        return read_image(self.image_path(index), max_pixels=self.max_pixels, upright=True)

    def image_path(self, index: int) -> pathlib.Path:
        """The path of image ``index``, links followed.

        Raises:
          ImageReadError: a link leads outside the folder.
        """
        return resolve_inside(self.root, self.file_name(index), follow_links=self.follow_links)


def _record(
    image: str,
    number: int,
    size: tuple[int, int],
    objects: Sequence[tuple[int, tuple[int, np.ndarray]]],
    file: pathlib.Path,
    collector: BoxCollector,
) -> Record:
    height, width = size
    boxes, labels, truths = [], [], []
    for line, (label, corners) in objects:
        x1, y1, x2, y2 = corners * (width, height, width, height)
        box = collector.clean((x1, y1, x2, y2), height, width, f"{file.name}, line {line}")
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


def _notes(
    images: Sequence[str], files: Sequence[pathlib.Path], unreadable: Sequence[str]
) -> list[str]:
    notes = []
    bare = [pair for pair in zip(images, files, strict=True) if not pair[1].is_file()]
    if bare:
        image, file = bare[0]
        notes.append(
            f"{len(bare)} of {len(images)} images have no label file and count as without objects "
            f"(first: {image}, for which {file} was looked for)"
        )
    if unreadable:
        notes.append(
            f"{len(unreadable)} of {len(images)} images cannot be read (first: {unreadable[0]})"
        )
    return notes


# --- labels --------------------------------------------------------------------------------------


def label_file(image: str) -> str:
    """``.../labels/x/a.txt`` of ``.../images/x/a.jpg``; beside the image without such a folder.

    Both are paths in the YOLO folder: what it is called, or lies in, does not matter.
    """
    path = pathlib.PurePosixPath(image)
    parts = list(path.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return pathlib.PurePosixPath(*parts).with_suffix(".txt").as_posix()


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
        raise DatasetError(f"{where}: class {label:g}, but classes are 0 to {classes - 1}")
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
    """(height, width) of an image as its EXIF orientation turns it."""
    try:
        state = path.stat()
    except OSError as error:
        raise ImageReadError(f"{path}: cannot be read ({error.strerror})") from error
    return _size_of_file(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=1 << 18)
def _size_of_file(path: pathlib.Path, _changed: int, _bytes: int) -> tuple[int, int]:
    """A run opens its sets several times; a header is read again when its file has changed."""
    header = read_header(path)
    stored = header.height, header.width
    return stored[::-1] if header.orientation in exif.SIDEWAYS else stored
