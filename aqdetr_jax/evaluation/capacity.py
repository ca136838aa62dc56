"""How much a set of queries can say: what quantization is said to take from them, as numbers.

AQ-DETR's explanation is that low bits cost queries their capacity; it gives no measure of it. These
are ours, of the queries after each decoder layer and of what they predict.
"""

from __future__ import annotations

import math

import numpy as np

DISTINCT_IOU = 0.9
_LEAST = 1e-12


def gaussian_entropy(queries: np.ndarray) -> float:
    """Differential entropy ``1/2 log 2 pi e sigma^2``, in nats, mean over channels (Q-DETR, eq. 8).

    Args:
      queries: [..., d]; each channel's variance is over all other axes.
    """
    variance = np.asarray(queries, np.float64).reshape(-1, np.shape(queries)[-1]).var(axis=0)
    return float(np.mean(0.5 * np.log(2 * math.pi * math.e * np.maximum(variance, _LEAST))))


def effective_rank(queries: np.ndarray) -> float:
    """``exp`` of the entropy of the normalised singular values (Roy and Vetterli, 2007).

    Args:
      queries: [..., N, d]; the mean over leading axes.

    Returns:
      Between 1 and min(N, d).
    """
    values = np.linalg.svd(np.asarray(queries, np.float64), compute_uv=False)
    shares = values / np.maximum(values.sum(axis=-1, keepdims=True), _LEAST)
    logs = np.log(np.maximum(shares, _LEAST))
    return float(np.exp(-(shares * logs).sum(axis=-1)).mean())


def mean_cosine(queries: np.ndarray) -> float:
    """Mean cosine of two different queries of an image.

    Args:
      queries: [..., N, d], N at least 2; the mean over leading axes.
    """
    x = np.asarray(queries, np.float64)
    unit = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), _LEAST)
    count = x.shape[-2]
    # All pairs and each with itself, of which the latter count 1.
    total = (unit.sum(axis=-2) ** 2).sum(axis=-1) - (unit**2).sum(axis=(-2, -1))
    return float((total / (count * (count - 1))).mean())


def distinct_predictions(
    boxes: np.ndarray, scores: np.ndarray, iou: float = DISTINCT_IOU
) -> np.ndarray:
    """How many boxes of each image overlap no box of a higher score by ``iou`` or more.

    Args:
      boxes: [B, N, 4] (cx, cy, w, h).
      scores: [B, N].
      iou: from which on two boxes say the same.

    Returns:
      int [B].
    """
    boxes = np.asarray(boxes, np.float64)
    order = np.argsort(-scores, axis=-1, kind="stable")
    boxes = np.take_along_axis(boxes, order[..., None], axis=1)
    low, high = (boxes[..., :2] + sign * boxes[..., 2:] / 2 for sign in (-1, 1))
    sides = np.minimum(high[:, :, None], high[:, None]) - np.maximum(low[:, :, None], low[:, None])
    shared = np.clip(sides, 0, None).prod(axis=-1)
    area = boxes[..., 2:].prod(axis=-1)
    overlap = shared / np.maximum(area[:, :, None] + area[:, None] - shared, _LEAST)
    better = np.tril(np.ones(overlap.shape[1:], bool), k=-1)
    return (~((overlap >= iou) & better).any(axis=-1)).sum(axis=-1)
