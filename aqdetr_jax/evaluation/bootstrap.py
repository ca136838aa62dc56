"""How much of a difference in AP is the choice of the images: a paired bootstrap over them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aqdetr_jax.evaluation.coco import prepared_evaluation

_MAX_DETECTIONS = 100
_CHUNK = 100  # draws at a time, for the memory


def bootstrap_ap(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    draws: np.ndarray,
) -> np.ndarray:
    """COCO AP on images drawn with replacement.

    An image that is drawn twice counts as two images. Give the same draws for two models and
    subtract: what both find easy or hard in an image then cancels.

    Args:
      ground_truth: a COCO instances dictionary of I images.
      results: COCO results.
      draws: int [R, I], each row I positions in the list of images by ascending number (as
        pycocotools orders them).

    Returns:
      float64 [R], AP of each row as a fraction.

    Raises:
      ValueError: see ``evaluate_detections``; draws of another number of images.
    """
    evaluation, _ = prepared_evaluation(ground_truth, results)
    images, categories = len(evaluation.params.imgIds), len(evaluation.params.catIds)
    if draws.ndim != 2 or draws.shape[1] != images:
        raise ValueError(f"draws have shape {draws.shape}, not [R, {images}]")
    # AP needs all areas and 100 detections only.
    evaluation.params.areaRng = evaluation.params.areaRng[:1]
    evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:1]
    evaluation.params.maxDets = [_MAX_DETECTIONS]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    matches = evaluation.evalImgs  # [category, image], flat
    recalls, found = evaluation.params.recThrs, np.zeros((categories, len(draws)))
    for category in range(categories):
        judged = _judged(matches[category * images : (category + 1) * images])
        for start in range(0, len(draws), _CHUNK):
            chunk = draws[start : start + _CHUNK]
            counts = np.stack([np.bincount(draw, minlength=images) for draw in chunk])
            found[category, start : start + _CHUNK] = _average_precision(judged, counts, recalls)
    return np.nanmean(found, axis=0)


@dataclasses.dataclass(frozen=True)
class _Judged:
    """Detections of one category by falling score, and what there is to find.

    Attributes:
      image: int [D], position of each detection's image.
      correct: bool [T, D], whether it found a box that counts, at each threshold of IoU.
      counted: bool [T, D], whether it counts at all (not if it found a crowd).
      positives: int [I], boxes of each image that count.
    """

    image: np.ndarray
    correct: np.ndarray
    counted: np.ndarray
    positives: np.ndarray


def _judged(entries: Sequence[Mapping[str, Any] | None]) -> _Judged:
    positives = np.array(
        [0 if e is None else int((np.asarray(e["gtIgnore"]) == 0).sum()) for e in entries]
    )
    some = [(i, e) for i, e in enumerate(entries) if e is not None]
    scores, image, matched, ignored = (
        np.concatenate(parts, axis=-1) if some else np.zeros((1, 0))
        for parts in (
            [e["dtScores"] for _, e in some],
            [np.full(len(e["dtScores"]), i) for i, e in some],
            [e["dtMatches"] for _, e in some],
            [e["dtIgnore"] for _, e in some],
        )
    )
    order = np.argsort(-scores.ravel(), kind="stable")
    counted = ~ignored[:, order].astype(bool)
    correct = (matched[:, order] != 0) & counted
    return _Judged(image.ravel()[order].astype(int), correct, counted, positives)


def _average_precision(judged: _Judged, counts: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """Mean over thresholds of IoU and of recall, [R]; NaN where no box is drawn.

    An image drawn n times makes n equal detections of each: precision rises over those that are
    correct, so that its envelope, all that AP looks at, is that of their last. Only the correct
    ones have to be looked at.

    Args:
      judged: the category's detections.
      counts: int [R, I], how often each image is drawn.
      recalls: thresholds, rising.
    """
    weights, total = counts[:, judged.image], counts @ judged.positives
    found = np.zeros(len(counts))
    for correct, counted in zip(judged.correct, judged.counted, strict=True):
        right = np.flatnonzero(correct)
        true = np.cumsum(weights[:, right], axis=1)
        made = np.cumsum(weights * counted, axis=1)[:, right]
        precision = true / (made + np.spacing(1))
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # Recall that is never reached is worth nothing.
        envelope = np.concatenate([envelope, np.zeros((len(counts), 1))], axis=1)
        for draw, (recall, curve) in enumerate(
            zip(true / np.maximum(total, 1)[:, None], envelope, strict=True)
        ):
            found[draw] += curve[np.searchsorted(recall, recalls, side="left")].mean()
    return np.where(total > 0, found / len(judged.correct), np.nan)


def image_draws(images: int, count: int, seed: int = 0) -> np.ndarray:
    """Positions of images, int [count, images], drawn with replacement."""
    return np.random.default_rng(seed).integers(0, images, (count, images))
