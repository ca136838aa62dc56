"""``data.fit`` spelled out: buckets, resizes and scales from the images and boxes of a set."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.dataset import DetectionDataset

UNIT = 32
"""Sides of buckets are multiples of it, pixels: every stride of a backbone divides them."""

SMALLEST = 14
"""Strides of the backbone that the root of a bucket's area has at least [ours]."""

MOST_ENLARGED = 2.0
"""Factor by which small images are enlarged at most [ours]."""

_SHARE = 0.1  # of the images that have an orientation, below which it gets no bucket of its own
_TURN = 1.2  # ratio of the sides from which on an image counts as landscape or portrait


def fitted(data: DataConfig, dataset: DetectionDataset, stride: int) -> DataConfig:
    """``data.fit`` spelled out: buckets, evaluation resize and training scales of a set.

    As many pixels as give three quarters of the boxes sides of a stride [ours], within ``data.fit``
    and what the images themselves have.

    Args:
      data: with a positive ``fit``.
      dataset: its images' sizes and boxes are read.
      stride: of the backbone's last level, pixels.

    Raises:
      ValueError: the set has no images.
    """
    if not len(dataset):
        raise ValueError(f"{dataset.name}: the dataset has no images")
    sizes = np.array([dataset.image_size(i) for i in range(len(dataset))], float)
    side = _side_for_boxes(dataset, sizes, data.fit, stride)
    buckets = _buckets(sizes, side)
    short, longest = max(map(min, buckets)), max(map(max, buckets))
    augment = dataclasses.replace(
        data.augment,
        scales=tuple(sorted({round(short * share) for share in (5 / 6, 11 / 12, 1)})),
        max_size=longest,
    )
    if augment.crop_probability:
        augment = dataclasses.replace(
            augment,
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


def small_share(dataset: DetectionDataset) -> float:
    """Side of the boxes (root of their area) in shares of the image's, of which a quarter is less.

    1.0 where there are no boxes.
    """
    truth = dataset.coco_ground_truth()
    area = {i["id"]: i["height"] * i["width"] for i in truth["images"]}
    shares = [
        math.sqrt(max(a["bbox"][2] * a["bbox"][3], 0.0) / area[a["image_id"]])
        for a in truth["annotations"]
        if not a["iscrowd"]
    ]
    return float(np.quantile(shares, 0.25)) if shares else 1.0


def _side_for_boxes(dataset: DetectionDataset, sizes: np.ndarray, most: int, stride: int) -> int:
    """Root of a padded image's area, pixels: enough for the small boxes, at most ``most``."""
    small = small_share(dataset)
    wanted = stride / small if small > 0 else math.inf
    real = math.sqrt(float(np.median(sizes.prod(1))))
    return int(min(max(wanted, SMALLEST * stride), max(MOST_ENLARGED * real, UNIT), most))


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
