"""Opening data sets: by kind and parameters, or from a data configuration."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pathlib
from typing import Any, NamedTuple

from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.dataset import DatasetError, DetectionDataset
from aqdetr_jax.data.layout import Doubt, Layout, choose_splits, find_layout
from aqdetr_jax.data.remedies import option
from aqdetr_jax.parallel.hosts import say
from aqdetr_jax.paths import as_path

_FACTORIES = {
    "shapes": ("shapes.dataset", "ShapesDataset"),
    "coco": ("coco", "CocoFolder"),
    "voc": ("voc", "VocFolder"),
    "yolo": ("yolo", "YoloFolder"),
    "tfds": ("tfds_builder", "TfdsDataset"),
}


def load_dataset(kind: str, **kwargs: Any) -> DetectionDataset:
    """Builds a dataset by kind.

    Args:
      kind: ``"shapes"`` (generated, :class:`~aqdetr_jax.data.shapes.dataset.ShapesDataset`),
        ``"coco"`` (:class:`~aqdetr_jax.data.coco.CocoFolder`), ``"voc"``
        (:class:`~aqdetr_jax.data.voc.VocFolder`), ``"yolo"``
        (:class:`~aqdetr_jax.data.yolo.YoloFolder`) or ``"tfds"``
        (:class:`~aqdetr_jax.data.tfds_builder.TfdsDataset`).
      **kwargs: parameters of that class.

    Raises:
      DatasetError: unknown kind (the message names the nearest), or unknown or missing parameters.
    """
    if kind not in _FACTORIES:
        nearest = difflib.get_close_matches(str(kind).lower(), _FACTORIES, n=1, cutoff=0.3)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise DatasetError(f"unknown dataset kind {kind!r}{hint} (known: {', '.join(_FACTORIES)})")
    # Imported on demand: TFDS takes most of a second, which only its users should pay.
    module, class_name = _FACTORIES[kind]
    factory = getattr(importlib.import_module(f"aqdetr_jax.data.{module}"), class_name)
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        accepted = ", ".join(inspect.signature(factory).parameters)
        raise DatasetError(f"dataset kind {kind!r}: {error} (parameters: {accepted})") from error
    return factory(**kwargs)


class Place(NamedTuple):
    """Where a split is.

    Attributes:
      kind: of data set.
      split: its name.
      parameters: of the data set's class.
    """

    kind: str
    split: str
    parameters: dict[str, Any]


def open_dataset(data: DataConfig, *, train: bool) -> DetectionDataset:
    """The training or evaluation set of a configuration.

    Raises:
      DatasetError, FileNotFoundError: the set cannot be opened; the message names the culprit.
    """
    place = find_place(data, train=train)
    if place.kind == "shapes":
        count = data.num_train if train else data.num_eval
        return _generated_set(
            place.split, data.image_size, count, data.set_seed, data.cache_dir or None
        )
    parameters = {**place.parameters, "max_pixels": data.max_pixels}
    if place.kind in ("coco", "voc", "yolo"):  # The kinds whose images are files of a folder.
        parameters["follow_links"] = data.follow_links
    return load_dataset(place.kind, **parameters)


def open_both(data: DataConfig) -> dict[str, DetectionDataset]:
    """The training and the evaluation set of a configuration, by the names of their splits.

    Raises:
      DatasetError, FileNotFoundError: see ``open_dataset``.
      ValueError: both are the same split.
    """
    places = find_places(data)
    if len({place.split for place in places}) < 2:
        raise ValueError(
            f"config.data.train_split and eval_split are both {places[0].split!r}: a prepared set "
            "needs two"
        )
    return {
        place.split: open_dataset(data, train=train)
        for train, place in zip((True, False), places, strict=True)
    }


def find_places(data: DataConfig) -> tuple[Place, Place]:
    """Where the training and the evaluation split of a configuration are.

    Raises:
      DatasetError, FileNotFoundError: nowhere, or it cannot be told; the message names the key.
    """
    return find_place(data, train=True), find_place(data, train=False)


def find_place(data: DataConfig, *, train: bool) -> Place:
    """Where a split of a configuration is.

    What was found by looking at a folder is said, once in a process.

    Raises:
      DatasetError, FileNotFoundError: nowhere, or it cannot be told; the message names the key.
    """
    if data.kind == "shapes":
        name = data.train_split or "train" if train else data.eval_split or "validation"
        return Place("shapes", name, {})
    given = {key: getattr(data, key) for key in _FILES if getattr(data, key)}
    if given and data.kind not in ("coco", "auto"):
        raise DatasetError(
            f"config.data.{next(iter(given))} has no effect with data.kind={data.kind!r}: it is "
            "of COCO files"
        )
    keys = _files_of(train)
    root = as_path(data.root) if data.root else None
    # Where a split's files are named, the folder need have no layout of its own.
    if keys.keys() <= given.keys() or (root is None and (given or data.kind == "coco")):
        return _by_files(data, root, train)
    if root is None:
        raise DatasetError(
            "config.data.root is empty: set it to the folder of your data set "
            "(--config.data.root=DIR)"
        )
    layout, name = _told(data, root, train)
    if given and layout.kind != "coco":
        raise DatasetError(
            f"config.data.{next(iter(given))} has no effect: config.data.root={data.root!r} is "
            f"{layout.title}, and the key is of COCO files"
        )
    parameters = dict(layout.splits[name])
    for key, parameter in keys.items() if layout.kind == "coco" else ():
        if key in given:
            parameters[parameter] = _existing(key, given[key], root)
        elif isinstance(doubt := parameters[parameter], Doubt):
            options = " or ".join(option(key, path) for path in doubt.candidates)
            raise DatasetError(
                f"{root}: {' or '.join(map(str, doubt.candidates))} for split {name!r}? Set "
                f"{options}"
            )
    if layout.kind == "coco":
        parameters["split"] = name
    return Place(layout.kind, name, parameters)


def _told(data: DataConfig, root: pathlib.Path, train: bool) -> tuple[Layout, str]:
    """The layout of ``data.root`` and a split of it; what was found is said once in a process."""
    layout = find_layout(root, None if data.kind == "auto" else data.kind)
    asked = {
        which: None if all(getattr(data, key) for key in _files_of(which)) else split
        for which, split in ((True, data.train_split), (False, data.eval_split))
    }
    names = choose_splits(layout, asked[True], asked[False], "train" if train else "eval")
    if data.kind == "auto":
        parts = [
            f"{purpose} {name!r}"
            for purpose, name in zip(("training on", "evaluating on"), names, strict=True)
            if name
        ]
        _say_once(
            f"{data.root} is {layout.title}: {', '.join(parts)} "
            "(config.data.train_split, eval_split)"
        )
    return layout, names[0 if train else 1]


@functools.lru_cache(maxsize=64)
def _say_once(text: str) -> None:
    say(text)


_FILES = ("train_images", "train_annotations", "eval_images", "eval_annotations")
"""The keys that name COCO's files one by one."""


def _files_of(train: bool) -> dict[str, str]:
    """The keys of one split, and the parameter of the data set that each is."""
    which = "train" if train else "eval"
    return {f"{which}_images": "images_dir", f"{which}_annotations": "annotation_file"}


def _by_files(data: DataConfig, root: pathlib.Path | None, train: bool) -> Place:
    """A split of a COCO set whose folder and file are named."""
    keys = _files_of(train)
    for key in keys:
        if not getattr(data, key):
            raise DatasetError(f"config.data.{key} is empty: set it (or config.data.root)")
    split = (data.train_split or "train") if train else (data.eval_split or "eval")
    parameters: dict[str, Any] = {"split": split}
    for key, parameter in keys.items():
        parameters[parameter] = _existing(key, getattr(data, key), root)
    named = [as_path(value) for key in _FILES if (value := getattr(data, key))]
    if root is not None and len(named) == len(_FILES) and all(path.exists() for path in named):
        raise DatasetError(
            f"config.data.root={str(root)!r} has no effect: {', '.join(_FILES)} all name files "
            "without it; leave it out, or name some of them as seen from there"
        )
    return Place("coco", split, parameters)


def _existing(key: str, value: str, root: pathlib.Path | None) -> pathlib.Path:
    """A file or folder that a key names, as seen from here or from the data set's folder."""
    here = as_path(value)
    inside = root / value if root is not None else here
    found = [path for path in dict.fromkeys((here, inside)) if path.exists()]
    if len(found) == 2 and not here.samefile(inside):
        options = " or ".join(option(key, path.absolute()) for path in found)
        raise DatasetError(
            f"config.data.{key}={value!r} is both here and in {root}, and not the same: set "
            f"{options}"
        )
    if found:
        return found[0]
    beside = f", neither here nor in {root}" if root is not None else ""
    raise FileNotFoundError(f"config.data.{key}={value!r} does not exist{beside}")


@functools.lru_cache(maxsize=2)
def _generated_set(split, size, num_images, seed, cache_dir) -> DetectionDataset:
    """A generated set, drawn once in a process however often it is opened."""
    return load_dataset(
        "shapes",
        split=split,
        size=size,
        num_images=num_images,
        seed=seed,
        cache_dir=cache_dir,
    )


def check_same_classes(train: DetectionDataset, evaluation: DetectionDataset) -> None:
    """Labels are positions in a set's own list of classes: the two lists must be the same.

    Raises:
      ValueError: they differ; the message names the first difference.
    """
    mine = list(zip(train.category_ids, train.class_names, strict=True))
    theirs = list(zip(evaluation.category_ids, evaluation.class_names, strict=True))
    if mine != theirs:
        only = sorted(set(mine) ^ set(theirs))[:3]
        raise ValueError(
            f"{train.name} has {len(mine)} classes and {evaluation.name} {len(theirs)}, and they "
            f"differ in (id, name) {only}: give both annotation files the same categories"
        )
