"""What of its data would stop a training run: asked by the run itself, and before by people."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aqdetr_jax.data.dataset import DatasetError, DetectionDataset
from aqdetr_jax.data.open import check_same_classes
from aqdetr_jax.data.pipeline import check_dataset
from aqdetr_jax.data.suspicious import check_pixel_boxes
from aqdetr_jax.parallel.hosts import say
from aqdetr_jax.paths import as_path
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.setup import pipeline_config
from aqdetr_jax.training.sizing import with_data


def check_data(
    config: ExperimentConfig, train_set: DetectionDataset, eval_set: DetectionDataset
) -> ExperimentConfig:
    """Refuses data that a run cannot use, by their annotations alone.

    Says once in a process if it would be judged on images that it was trained on.

    Args:
      config: the experiment.
      train_set: its training set.
      eval_set: its evaluation set.

    Returns:
      The experiment with what depends on the data filled in.

    Raises:
      ValueError: a set is empty, has too many boxes an image or normalised ones, the training set
        has no box at all, or the sets have other classes than each other or than the model; the
        message names the culprit.
    """
    resolved, errors = _judged(config, train_set, eval_set)
    if errors:
        raise errors[0]
    shared = _shared_images(train_set, eval_set)
    if shared:
        _say_once(
            f"trained and judged on the same images: {len(shared)} of the {len(eval_set)} of "
            f"{eval_set.name} are in {train_set.name} too (first: {shared[0]})"
        )
    return resolved


def reasons_to_stop(
    config: ExperimentConfig,
    train_set: DetectionDataset,
    eval_set: DetectionDataset,
    reports: Sequence[Mapping[str, Any]] = (),
) -> list[str]:
    """All reasons for which training would stop; [] if it would not.

    Args:
      config: the experiment.
      train_set: its training set.
      eval_set: its evaluation set.
      reports: of :func:`aqdetr_jax.data.inspect.inspect_dataset`, which has read the images.
    """
    reasons = [str(error) for error in _judged(config, train_set, eval_set)[1]]
    for report in reports:
        counts = {key: report[key]["count"] for key in _UNUSABLE}
        if config.data.on_error == "error":
            reasons += [
                f"{report['name']}: {_UNUSABLE[key]}: {count} (first: {report[key]['first'][0]}); "
                "--config.data.on_error=skip goes on without them"
                for key, count in counts.items()
                if count
            ]
        elif report["images"] and sum(counts.values()) >= report["images"]:
            reasons.append(f"{report['name']}: none of its images can be used")
    return list(dict.fromkeys(reasons))


_UNUSABLE = {"unreadable": "unreadable images", "size_mismatch": "images of another size"}


def _judged(
    config: ExperimentConfig, train_set: DetectionDataset, eval_set: DetectionDataset
) -> tuple[ExperimentConfig, list[ValueError]]:
    """The experiment with its data, and every check's error in order."""
    errors: list[ValueError] = []

    def judge(check: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return check(*arguments, **options)
        except ValueError as error:
            errors.append(error)
            return None

    judge(_check_any_box, train_set)
    resolved = judge(with_data, config, train_set)
    if resolved is None:  # The other checks need some number where the data are to give one.
        most = config.data.max_boxes or max(train_set.max_boxes_per_image(), 1)
        data = dataclasses.replace(config.data, max_boxes=most)
        resolved = dataclasses.replace(config, data=data)
    judge(check_dataset, train_set, pipeline_config(resolved, train=True))
    judge(check_dataset, eval_set, pipeline_config(resolved, train=False), boxes_matter=False)
    judge(check_same_classes, train_set, eval_set)
    judge(check_pixel_boxes, train_set)
    judge(check_pixel_boxes, eval_set)
    return resolved, errors


def _check_any_box(train_set: DetectionDataset) -> None:
    """A set without a box teaches nothing; most often its annotations lie elsewhere."""
    if not len(train_set) or train_set.max_boxes_per_image():
        return
    truth = train_set.coco_ground_truth()["annotations"]
    looked = f"; looked in {train_set.source}" if train_set.source else ""
    if train_set.source and not as_path(train_set.source).exists():
        looked += ", which does not exist"
    dropped = ", ".join(f"{count} {reason}" for reason, count in train_set.drops.items())
    raise DatasetError(
        f"{train_set.name}: not one box to train on in {len(train_set)} images{looked}"
        + (f"; left out: {dropped} (first: {train_set.drop_examples[0]})" if dropped else "")
        + (f"; {len(truth)} are crowds or difficult" if truth else "")
    )


def _shared_images(train_set: DetectionDataset, eval_set: DetectionDataset) -> list[str]:
    """Names of the evaluation images that are in the training set too, by their paths alone."""
    if train_set.images_dir is None or eval_set.images_dir is None:
        same = train_set.fingerprint == eval_set.fingerprint
        return _names(eval_set) if same else []
    trained = set(_paths(train_set, train_set.images_dir))
    judged = _paths(eval_set, eval_set.images_dir)
    return [n for n, path in zip(_names(eval_set), judged, strict=True) if path in trained]


def _names(dataset: DetectionDataset) -> list[str]:
    return [dataset.file_name(index) for index in range(len(dataset))]


def _paths(dataset: DetectionDataset, folder: pathlib.Path) -> list[str]:
    resolved = folder.resolve()
    return [os.path.normpath(resolved / name) for name in _names(dataset)]


@functools.lru_cache(maxsize=64)
def _say_once(text: str) -> None:
    say(text)
