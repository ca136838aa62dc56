"""Sizes that follow from the training set: buckets, resizes, boxes, queries, classes, steps.

A configuration leaves them open (``data.fit``, and 0 or -1 for the others); here they are filled
in, once the data are known, and the result is what the run keeps as its configuration.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.training.config import ExperimentConfig

UNIT = 32
"""Sides of buckets are multiples of it, pixels: every stride of a backbone divides them."""

SMALLEST_FIT = 224
WANTED_SIDE = 16.0
"""Pixels that three quarters of the boxes should keep of their sides (geometric mean) [ours]."""

BY_DATA = -1
"""Of ``model.num_auxiliary``: twice as many as object queries [ours]."""

_SHARE = 0.1  # of the images that have an orientation, below which it gets no bucket of its own
_TURN = 1.2  # ratio of the sides from which on an image counts as landscape or portrait
_MOST_QUERIES = 300


def with_data(config: ExperimentConfig, dataset: DetectionDataset) -> ExperimentConfig:
    """Fills in what depends on the training set; what is pinned stays.

    ``data.fit`` becomes buckets, resizes and scales; ``data.max_boxes=0``, ``model.num_queries=0``,
    ``model.num_auxiliary=-1`` and ``model.num_classes=0`` their numbers; ``train.epochs`` steps.

    Raises:
      ValueError: the data have more classes than a pinned number, or neither steps nor epochs are
        given.
    """
    data, model, train = config.data, config.model, config.train
    if data.fit:
        data = fitted(data, dataset)
    most = dataset.max_boxes_per_image()
    if data.max_boxes == 0:
        data = dataclasses.replace(data, max_boxes=max(most, 1))
    if model.num_queries == 0:
        # Room for twice the boxes, never less than for all of them.
        wanted = min(10 * math.ceil(max(2 * most, 20) / 10), max(_MOST_QUERIES, most))
        model = dataclasses.replace(model, num_queries=wanted)
    if model.num_auxiliary == BY_DATA:
        model = dataclasses.replace(model, num_auxiliary=2 * model.num_queries)
    if model.num_classes == 0:
        model = dataclasses.replace(model, num_classes=dataset.num_classes)
    elif dataset.num_classes > model.num_classes:
        raise ValueError(
            f"{dataset.name} has {dataset.num_classes} classes, but config.model.num_classes is "
            f"{model.num_classes}; set it to 0 to take the data's"
        )
    if train.epochs:
        steps = max(1, math.ceil(train.epochs * len(dataset) / train.batch_size))
        train = dataclasses.replace(train, steps=min(steps, train.steps) if train.steps else steps)
    if not train.steps:
        raise ValueError("config.train.steps and config.train.epochs are both 0: set one of them")
    return dataclasses.replace(config, data=data, model=model, train=train)


def fitted(data: DataConfig, dataset: DetectionDataset) -> DataConfig:
    """``data.fit`` spelled out: buckets, evaluation resize and training scales of a set.

    Raises:
      ValueError: the set has no images.
    """
    if not len(dataset):
        raise ValueError(f"{dataset.name}: the dataset has no images")
    sizes = np.array([dataset.image_size(i) for i in range(len(dataset))], float)
    side = _side_for_boxes(dataset, sizes, data.fit)
    buckets = _buckets(sizes, side)
    short, longest = max(map(min, buckets)), max(map(max, buckets))
    augment = dataclasses.replace(
        data.augment,
        scales=tuple(sorted({round(short * share) for share in (5 / 6, 11 / 12, 1)})),
        max_size=longest,
        crop_resize=tuple(round(short * share) for share in (1, 7 / 6, 4 / 3)),
        crop_size=(round(short * 3 / 4), short),
    )
    return dataclasses.replace(
        data,
        fit=0,
        buckets=buckets,
        eval_buckets=buckets,
        eval_short_side=short,
        eval_max_size=longest,
        augment=augment,
    )


def _side_for_boxes(dataset: DetectionDataset, sizes: np.ndarray, most: int) -> int:
    """Root of a padded image's area, pixels: enough for the small boxes, at most ``most``."""
    truth = dataset.coco_ground_truth()
    area = {i["id"]: i["height"] * i["width"] for i in truth["images"]}
    shares = [
        math.sqrt(max(a["area"], 0.0) / area[a["image_id"]])
        for a in truth["annotations"]
        if not a["iscrowd"]
    ]
    small = float(np.quantile(shares, 0.25)) if shares else 1.0
    wanted = WANTED_SIDE / small if small > 0 else math.inf
    # Images are not enlarged: a set of small ones has small buckets.
    real = math.sqrt(float(np.median(sizes.prod(1))))
    return int(min(max(wanted, SMALLEST_FIT), max(real, UNIT), most))


def _buckets(sizes: np.ndarray, side: int) -> tuple[tuple[int, int], ...]:
    """One bucket for each orientation that is frequent, (height, width), largest share first."""
    ratio = sizes[:, 1] / sizes[:, 0]
    groups = [ratio > _TURN, ratio < 1 / _TURN]
    groups.append(~(groups[0] | groups[1]))
    groups.sort(key=lambda group: -group.sum())
    frequent = [g for g in groups if g.mean() >= _SHARE]
    found = [_bucket(float(np.median(ratio[group])), side) for group in frequent]
    return tuple(dict.fromkeys(found))


def _bucket(ratio: float, side: int) -> tuple[int, int]:
    """The bucket of at most ``side ** 2`` pixels that images of a ratio (width / height) fill best.

    Very long images get a bucket of one unit's height or width.
    """
    budget = max(side, UNIT) ** 2
    best, height = (UNIT, UNIT), UNIT
    scale = -1.0
    while height * UNIT <= budget:
        width = min(
            max(UNIT, UNIT * math.ceil(height * ratio / UNIT)), UNIT * (budget // (UNIT * height))
        )
        filled = min(height, width / ratio)
        if filled > scale:
            best, scale = (height, width), filled
        height += UNIT
    return best


def describe(config: ExperimentConfig, dataset: DetectionDataset) -> str:
    """One paragraph on a set and on the sizes that a resolved configuration has for it."""
    sizes = np.array([dataset.image_size(i) for i in range(len(dataset))])
    height, width = (int(x) for x in np.median(sizes, axis=0))
    names = ", ".join(dataset.class_names[:8]) + (", ..." if dataset.num_classes > 8 else "")
    buckets = ", ".join(f"{w}x{h}" for h, w in config.data.buckets)
    text = (
        f"{dataset.name}: {len(dataset)} images (median {width}x{height}), up to "
        f"{dataset.max_boxes_per_image()} boxes an image, {dataset.num_classes} "
        f"class{'es' * (dataset.num_classes != 1)} ({names}). Padded to {buckets} (width x height)"
    )
    if config.task == "pretrain":
        return f"{text}; {config.train.steps} steps of {config.train.batch_size} images."
    auxiliary = config.model.num_auxiliary
    return (
        f"{text}; {config.model.num_queries} object queries"
        f"{f' and {auxiliary} auxiliary ones' if auxiliary else ''}; {config.train.steps} steps of "
        f"{config.train.batch_size} images."
    )
