"""What kind of data set a folder is, told from its files, and where its splits lie.

Every reading that fits is found, so that a folder with two of them is an error that names both, and
never a guess.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from aqdetr_jax.data import yolo_files
from aqdetr_jax.data.dataset import DatasetError
from aqdetr_jax.data.remedies import both_splits, option

ROBOFLOW_FILE = "_annotations.coco.json"
_COCO_KEYS = "config.data.train_images, train_annotations, eval_images and eval_annotations"
_MOST_NAMES = 6  # in a message

# Names of splits in lower case.
_TRAIN, _TRAINVAL = r"train(ing)?\d*", r"trainval\d*"
_VAL, _TEST = r"val\d*|valid(ation)?\d*|minival\d*|dev", r"test\d*"


@dataclasses.dataclass(frozen=True)
class Doubt:
    """Several files or folders that one part of a split may be: an error once it is needed."""

    candidates: tuple[pathlib.Path, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One reading of a folder.

    Attributes:
      kind: of data set, a name that ``open.load_dataset`` takes.
      title: what it is, in words.
      root: where this reading starts; ``root`` itself or a folder in it.
      splits: name -> parameters of the data set's class, or a :class:`Doubt` in place of one.
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
        raise DatasetError(_two_readings(root, *found[:2]))
    if not found:
        raise FileNotFoundError(_nothing(root, kind))
    return found[0]


def _two_readings(root: pathlib.Path, first: Layout, second: Layout) -> str:
    if first.kind != second.kind:
        return (
            f"{root} can be read as {_shown(first, root)}, and as {_shown(second, root)}: say "
            f"which, by --config.data.kind={first.kind} or {second.kind}"
        )
    both = f"{root} holds {_shown(first, root)}, and {_shown(second, root)}: "
    if first.root == second.root:
        return f"{both}name the files, by {_COCO_KEYS}"
    if first.root == root:
        return f"{both}set {option('root', second.root)}, or move that one elsewhere"
    return (
        f"{both}set --config.data.root to one of the two, {option('root', first.root)} or "
        f"{option('root', second.root)}"
    )


def choose_splits(
    layout: Layout, train: str | None = "", evaluation: str | None = "", needed: str = ""
) -> tuple[str, str]:
    """The splits to train on and to evaluate on.

    Args:
      layout: of the folder.
      train: asked for by the user; "" = found by its name; None = is no split of this folder.
      evaluation: likewise.
      needed: "train" or "eval": the other one may stay open.

    Returns:
      Their names; "" for None, and for what stays open.

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
    # What is trained on must not be judged on: "trainval" holds "val", and maybe a file's images.
    if train == "":
        apart = evaluation is None or _is(evaluation, f"{_VAL}|{_TRAIN}")
        patterns = (_TRAIN,) if apart else (_TRAIN, _TRAINVAL)
        train = _by_name(layout, patterns, "train_split", evaluation, needed == "eval")
    if evaluation == "":
        patterns = (_TEST,) if _is(train or "", _TRAINVAL) else (_VAL, _TEST)
        evaluation = _by_name(layout, patterns, "eval_split", train, needed == "train")
    return train or "", evaluation or ""


def _is(name: str, pattern: str) -> bool:
    return re.fullmatch(pattern, name.lower()) is not None


def _by_name(
    layout: Layout, patterns: Sequence[str], key: str, other: str | None, open_: bool
) -> str:
    """The one split whose name fits the first pattern that any fits.

    Args:
      layout: of the folder.
      patterns: of lower-case names, the best first.
      key: that names the split.
      other: the split for the other purpose, which is not taken.
      open_: "" where names do not tell, and no error.
    """
    names = [name for name in layout.splits if name != other]
    for pattern in patterns:
        fitting = [name for name in names if _is(name, pattern)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting and not open_:
            options = " or ".join(option(key, name) for name in fitting)
            raise DatasetError(f"{layout.root}: {' or '.join(fitting)}? Set {options}")
        if fitting:
            return ""
    if open_:
        return ""
    has = f"{layout.root}, {layout.title}, has {_some(layout.splits)}"
    if not layout.splits:
        raise DatasetError(f"{has}; wanted is {_WANTED[layout.kind]}")
    if other is not None and len(layout.splits) == 1:
        alone = next(iter(layout.splits))
        raise DatasetError(f"{has} alone: {both_splits(alone, alone)}")
    training = key == "train_split"
    holding = [name for name in names if _is(name, _TRAINVAL if training else _VAL)]
    if other and len(holding) == 1:  # left out above: one holds the other's images
        pair = (holding[0], other) if training else (other, holding[0])
        raise DatasetError(
            f"{has}, but {pair[0]!r} holds the images of {pair[1]!r}: {both_splits(*pair)}"
        )
    options = " or ".join(option(key, name) for name in names[:_MOST_NAMES])
    if other:
        options += f" or {option(key, other)} (the same images for both)"
    raise DatasetError(f"{has}, and their names do not tell which is meant: set {options}")


# --- the readings --------------------------------------------------------------------------------


def _coco(root: pathlib.Path) -> Iterator[Layout]:
    """``annotations/*.json`` beside image folders, or Roboflow's export."""
    found: dict[str, tuple[list[pathlib.Path], list[pathlib.Path]]] = {}
    for file in _visible((root / "annotations").glob("*.json")):
        name = file.stem.removeprefix("instances_")
        folders = [f for f in (root / name, root / "images" / name) if f.is_dir()]
        known = file.stem.lower().startswith(("instances_", "train", "val", "test", "dev"))
        if not folders and known:
            folders = [f for f in (root / "images",) if f.is_dir()]
        if folders:
            found.setdefault(name, (folders, []))[1].append(file)
    splits = {
        name: {"images_dir": _one(folders), "annotation_file": _one(files)}
        for name, (folders, files) in found.items()
    }
    if splits:
        yield Layout("coco", "COCO's own layout", root, splits)
    exported = {
        file.parent.name: {"images_dir": file.parent, "annotation_file": file}
        for file in sorted(root.glob(f"*/{ROBOFLOW_FILE}"))
        if not file.parent.name.startswith(".")
    }
    if exported:
        yield Layout("coco", "Roboflow's COCO export", root, exported)


def _one(candidates: Sequence[pathlib.Path]) -> pathlib.Path | Doubt:
    return candidates[0] if len(candidates) == 1 else Doubt(tuple(candidates))


def _visible(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """Without hidden files, such as those that macOS leaves beside others."""
    return sorted(path for path in paths if not path.name.startswith("."))


def _voc(root: pathlib.Path) -> Iterator[Layout]:
    """``JPEGImages``, ``Annotations``, ``ImageSets/Main``; also inside ``VOCdevkit/VOC2007``."""
    for folder in (root, *sorted(root.glob("VOC*")), *sorted(root.glob("VOCdevkit/VOC*"))):
        if (folder / "JPEGImages").is_dir() and (folder / "Annotations").is_dir():
            # Shortest names first: "aeroplane_train" is the list of one class.
            files = _visible((folder / "ImageSets" / "Main").glob("*.txt"))
            lists = (path.stem for path in files)
            names = sorted(lists, key=lambda name: (len(name), name))
            splits = {name: {"root": folder, "split": name} for name in names}
            yield Layout("voc", "a Pascal VOC folder", folder, splits)


def _yolo(root: pathlib.Path) -> Iterator[Layout]:
    """``data.yaml``, or ``classes.txt`` with ``images/`` and ``labels/``."""
    named = yolo_files.settings_file(root) is not None
    classes = any((root / name).is_file() for name in yolo_files.CLASS_FILES)
    if named or (classes and (root / "images").is_dir()):
        splits = {name: {"root": root, "split": name} for name in yolo_files.find_splits(root)}
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
    return (
        ", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")
        or "no splits"
    )


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
        f"file anywhere is named by {_COCO_KEYS}{_archives(root)}"
    )


def _archives(root: pathlib.Path) -> str:
    """What makes a set of published archives that lie in a folder."""
    from aqdetr_jax.data.official import SETS

    for name, published in SETS.items():
        if any((root / archive.name).is_file() for archive in published.archives):
            return (
                f". These are archives of {published.title}: aqdetr prepare-data --set={name} "
                f"--manual={shlex.quote(str(root))} --out=DIR makes a set of them"
            )
    return ""
