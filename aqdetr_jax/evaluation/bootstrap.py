"""How much of a difference in AP is the choice of the images: a paired bootstrap over them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aqdetr_jax.evaluation.coco import prepared_evaluation

_MAX_DETECTIONS = 100


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
    found = []
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        matches = evaluation.evalImgs  # [category, image], flat
        for draw in draws:
            evaluation.evalImgs = [
                matches[c * images + int(i)] for c in range(categories) for i in draw
            ]
            evaluation.accumulate()
            precision = evaluation.eval["precision"]
            found.append(precision[precision > -1].mean())
    return np.array(found)


def image_draws(images: int, count: int, seed: int = 0) -> np.ndarray:
    """Positions of images, int [count, images], drawn with replacement."""
    return np.random.default_rng(seed).integers(0, images, (count, images))
