"""How far a network's outputs are from those of its float model."""

from __future__ import annotations

import math

import numpy as np


class OutputNoise:
    """Compares the last layer's logits and boxes of passes over the same images with the first.

    The signal is what varies: each output's squared distance from its mean over all queries and
    images. The noise is the squared difference. Boxes count by the score that the float model gives
    their query: where it sees nothing, its box says nothing.

    Args:
      kind: the class loss, "softmax" or "focal".
      by_box: queries have no order of their own (proposals): a query is compared with the one whose
        box is nearest.
    """

    def __init__(self, kind: str, *, by_box: bool = False):
        self._kind, self._by_box = kind, by_box
        self._reference: tuple[np.ndarray, np.ndarray] | None = None
        self._pass: list[tuple[np.ndarray, np.ndarray]] = []

    def take(self, index: np.ndarray, logits: np.ndarray, boxes: np.ndarray) -> None:
        """A batch of the pass; rows with index -1 are none."""
        kept = np.asarray(index) >= 0
        self._pass.append((np.asarray(logits, np.float32)[kept], np.asarray(boxes)[kept]))

    def finish(self) -> dict[str, float]:
        """Ends a pass.

        Returns:
          "logits_noise" and "boxes_noise": noise over signal, 0 for the first pass, the reference.
        """
        logits, boxes = (np.concatenate(parts) for parts in zip(*self._pass, strict=True))
        self._pass = []
        if self._reference is None:
            self._reference = logits, boxes
        first_logits, first_boxes = self._reference
        if self._by_box:
            distance = np.abs(first_boxes[:, :, None] - boxes[:, None]).sum(-1)
            nearest = distance.argmin(-1)[..., None]
            logits, boxes = (np.take_along_axis(x, nearest, axis=1) for x in (logits, boxes))
        return {
            "logits_noise": noise_ratio(first_logits, logits),
            "boxes_noise": noise_ratio(first_boxes, boxes, self._scores(first_logits)),
        }

    def _scores(self, logits: np.ndarray) -> np.ndarray:
        """[B, Q] of each query's best class."""
        if self._kind == "focal":
            return 1 / (1 + np.exp(-logits.max(-1)))
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        return (odds / odds.sum(-1, keepdims=True))[..., :-1].max(-1)


def noise_ratio(
    reference: np.ndarray, found: np.ndarray, weight: np.ndarray | None = None
) -> float:
    """``sum w (y' - y)^2 / sum w (y - mean)^2``, the mean of each output over images and queries.

    Args:
      reference: y, [B, Q, C].
      found: y', of the same shape.
      weight: w, [B, Q]; 1 by default.
    """
    reference, found = reference.astype(np.float64), found.astype(np.float64)
    weights = np.ones(reference.shape[:2]) if weight is None else weight.astype(np.float64)
    mean = np.average(reference, axis=(0, 1), weights=weights)
    signal = float((weights[..., None] * (reference - mean) ** 2).sum())
    noise = float((weights[..., None] * (found - reference) ** 2).sum())
    return noise / max(signal, np.finfo(np.float64).tiny) if noise else 0.0


def decibels(noise: float) -> float | None:
    """Signal-to-noise ratio of a noise ratio; None of no noise at all."""
    return -10 * math.log10(noise) if noise > 0 else None
