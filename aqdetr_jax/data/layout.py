"""What kind of data set a folder is, told from its files, and where its splits lie.

Every reading that fits is found, so that a folder with two of them is an error that names both, and
never a guess.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from aqdetr_jax.data import yolo
from aqdetr_jax.data.dataset import DatasetError

ROBOFLOW_FILE = "_annotations.coco.json"

_TRAIN = (r"train(ing)?\d*", r"trainval\d*")
_EVAL = (r"val\d*|valid(ation)?\d*|minival\d*|dev", r"test\d*")


@dataclasses.dataclass(frozen=True)
class Layout:
    """One reading of a folder.

    Attributes:
      kind: of data set, a name that ``open.load_dataset`` takes.
      title: what it is, in words.
      root: where this reading starts; ``root`` itself or a folder in it.
      splits: name -> parameters of the data set's class.
    """

    kind: str
    title: str
    root: pathlib.Path
    splits: Mapping[str, Mapping[str, Any]]


def find_layout(root: pathlib.Path, kind: str | None = None) -> Layout:
    """The one way to read a folder.

    Args:
      root: folder.
      kind: only readings of this kind; None: of any.

    Raises:
      FileNotFoundError: no such folder, or nothing in it looks like a data set.
      DatasetError: there are several ways to read it; the message names them.
    """
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise FileNotFoundError(f"config.data.root={str(root)!r} {what}")
    found = [reading for name, read in _READERS if kind in (None, name) for reading in read(root)]
    if len(found) > 1:
        first, second = found[:2]
        raise DatasetError(
            f"{root} can be read as {_shown(first, root)}, and as {_shown(second, root)}: say "
            f"which, by --config.data.kind={first.kind} or {second.kind}"
            if first.kind != second.kind
            else f"{root} holds {_shown(first, root)}, and {_shown(second, root)}: set "
            f"--config.data.root to one of the two"
        )
    if not found:
        raise FileNotFoundError(_nothing(root, kind))
    return found[0]


def choose_splits(layout: Layout, train: str = "", evaluation: str = "") -> tuple[str, str]:
    """The splits to train on and to evaluate on.

    Args:
      layout: of the folder.
      train: asked for by the user; "" = found by its name.
      evaluation: likewise.

    Raises:
      FileNotFoundError: the layout has no such split.
      DatasetError: names do not tell; the message says which keys to set.
    """
    names = list(layout.splits)
    for key, name in (("train_split", train), ("eval_split", evaluation)):
        if name and name not in names:
            raise FileNotFoundError(
                f"{layout.root}: no split {name!r} for config.data.{key} "
                f"(there are: {_some(names)})"
            )
    # What is trained on must not be judged on: "trainval" holds "val".
    evals = _EVAL[1:] if re.fullmatch(_TRAIN[1], train) else _EVAL
    if not train and not any(re.fullmatch(_TRAIN[0], name) for name in names):
        evals = _EVAL[1:]
    train = train or _by_name(layout, _TRAIN, "train_split", {evaluation})
    return train, evaluation or _by_name(layout, evals, "eval_split", {train})


def _by_name(layout: Layout, patterns: Sequence[str], key: str, taken: set[str]) -> str:
    names = [name for name in layout.splits if name not in taken]
    for pattern in patterns:
        fitting = [name for name in names if re.fullmatch(pattern, name.lower())]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise DatasetError(
                f"{layout.root}: {' or '.join(fitting)}? Set --config.data.{key} to one of them"
            )
    raise DatasetError(
        f"{layout.root}, {layout.title}, has {_some(layout.splits)}, "
        f"and their names do not tell which is meant by config.data.{key}: set it"
    )


# --- the readings --------------------------------------------------------------------------------


def _coco(root: pathlib.Path) -> Iterator[Layout]:
    """``annotations/*.json`` beside image folders, or Roboflow's export."""
    splits: dict[str, dict[str, Any]] = {}
    for file in sorted((root / "annotations").glob("*.json")):
        name = file.stem.removeprefix("instances_")
        folders = [f for f in (root / name, root / "images" / name) if f.is_dir()]
        if len(folders) > 1:
            raise DatasetError(
                f"{root}: {folders[0]} and {folders[1]} are both named for {file.name}; set "
                "config.data.train_images and eval_images"
            )
        if not folders and file.stem.startswith(("instances_", "train", "val", "test", "dev")):
            folders = [f for f in (root / "images",) if f.is_dir()]
        if folders and name in splits:
            raise DatasetError(
                f"{root}: {splits[name]['annotation_file'].name} or {file.name}? Name yours by "
                "config.data.train_annotations and eval_annotations"
            )
        if folders:
            splits[name] = {"images_dir": folders[0], "annotation_file": file}
    if splits:
        yield Layout("coco", "COCO's own layout", root, splits)
    exported = {
        file.parent.name: {"images_dir": file.parent, "annotation_file": file}
        for file in sorted(root.glob(f"*/{ROBOFLOW_FILE}"))
    }
    if exported:
        yield Layout("coco", "Roboflow's COCO export", root, exported)


def _voc(root: pathlib.Path) -> Iterator[Layout]:
    """``JPEGImages``, ``Annotations``, ``ImageSets/Main``; also inside ``VOCdevkit/VOC2007``."""
    for folder in (root, *sorted(root.glob("VOC*")), *sorted(root.glob("VOCdevkit/VOC*"))):
        if (folder / "JPEGImages").is_dir() and (folder / "Annotations").is_dir():
            # Shortest names first: "aeroplane_train" is the list of one class.
            lists = (path.stem for path in (folder / "ImageSets" / "Main").glob("*.txt"))
            names = sorted(lists, key=lambda name: (len(name), name))
            splits = {name: {"root": folder, "split": name} for name in names}
            yield Layout("voc", "a Pascal VOC folder", folder, splits)


def _yolo(root: pathlib.Path) -> Iterator[Layout]:
    """``data.yaml``, or ``classes.txt`` with ``images/`` and ``labels/``."""
    named = yolo.settings_file(root) is not None
    classes = any((root / name).is_file() for name in yolo.CLASS_FILES)
    if named or (classes and (root / "images").is_dir()):
        splits = {name: {"root": root, "split": name} for name in yolo.find_splits(root)}
        yield Layout("yolo", "a YOLO folder", root, splits)


def _tfds(root: pathlib.Path) -> Iterator[Layout]:
    """What ``aqdetr prepare-data`` wrote."""
    from aqdetr_jax.data.tfds_builder import prepared_splits

    if (root / "aqdetr_detection").is_dir():
        splits = {name: {"data_dir": root, "split": name} for name in prepared_splits(root)}
        yield Layout("tfds", "a folder of aqdetr prepare-data", root, splits)


_READERS: tuple[tuple[str, Callable[[pathlib.Path], Iterator[Layout]]], ...] = (
    ("coco", _coco),
    ("voc", _voc),
    ("yolo", _yolo),
    ("tfds", _tfds),
)
KINDS = tuple(name for name, _ in _READERS)


def _shown(layout: Layout, root: pathlib.Path) -> str:
    inside = "" if layout.root == root else f" in {layout.root.relative_to(root)}"
    return f"{layout.title}{inside} ({_some(layout.splits)})"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") or "no splits"


_WANTED = {
    "coco": (
        "COCO's layout: annotations/instances_SPLIT.json with SPLIT/ or images/SPLIT/ beside it, "
        f"or SPLIT/{ROBOFLOW_FILE} among the images (Roboflow)"
    ),
    "voc": "Pascal VOC's: JPEGImages/, Annotations/ and ImageSets/Main/SPLIT.txt",
    "yolo": "YOLO's: data.yaml, or classes.txt with images/ and labels/",
    "tfds": "that of aqdetr prepare-data: aqdetr_detection/",
}


def _nothing(root: pathlib.Path, kind: str | None) -> str:
    inside = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    shown = ", ".join(inside[:6]) + (", ..." if len(inside) > 6 else "")
    wanted = "; or ".join(_WANTED[name] for name in KINDS if kind in (None, name))
    return (
        f"config.data.root={str(root)!r} holds {shown or 'nothing'}, which is no layout of "
        f"{'a data set' if kind is None else f'data.kind={kind!r}'}: wanted is {wanted}. A COCO "
        "file anywhere is named by config.data.train_images, train_annotations, eval_images and "
        "eval_annotations"
    )
