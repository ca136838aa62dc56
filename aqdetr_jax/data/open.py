"""Opening data sets: by kind and parameters, or from a data configuration."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from typing import Any

from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.dataset import DatasetError, DetectionDataset

_FACTORIES = {
    "shapes": ("shapes.dataset", "ShapesDataset"),
    "coco": ("coco", "CocoFolder"),
    "voc": ("voc", "VocFolder"),
    "tfds": ("tfds_builder", "TfdsDataset"),
}


DATASET_KINDS = tuple(_FACTORIES)


def load_dataset(kind: str, **kwargs: Any) -> DetectionDataset:
    """Builds a dataset by kind.

    Args:
      kind: ``"shapes"`` (generated, :class:`~aqdetr_jax.data.shapes.dataset.ShapesDataset`),
        ``"coco"`` (:class:`~aqdetr_jax.data.coco.CocoFolder`), ``"voc"``
        (:class:`~aqdetr_jax.data.voc.VocFolder`) or ``"tfds"``
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


def open_dataset(data: DataConfig, *, train: bool) -> DetectionDataset:
    """The training or evaluation set of a configuration.

    Raises:
      DatasetError, FileNotFoundError: the set cannot be opened; the message names the culprit.
    """
    split = data.train_split if train else data.eval_split
    if data.kind == "shapes":
        count = data.num_train if train else data.num_eval
        return _generated_set(split, data.image_size, count, data.set_seed, data.cache_dir or None)
    if data.kind == "coco":
        if data.root:
            return load_dataset("coco", root=data.root, split=split)
        images = data.train_images if train else data.eval_images
        annotations = data.train_annotations if train else data.eval_annotations
        which = "train" if train else "eval"
        for name, value in ((f"{which}_images", images), (f"{which}_annotations", annotations)):
            if not value:
                raise ValueError(f"config.data.{name} is empty: set it (or config.data.root)")
        return load_dataset("coco", images_dir=images, annotation_file=annotations, split=split)
    if not data.root:
        raise ValueError(f"config.data.root is empty: set it to the folder of the {data.kind} set")
    if data.kind == "voc":
        return load_dataset("voc", root=data.root, split=split)
    return load_dataset("tfds", data_dir=data.root, split=split)


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
