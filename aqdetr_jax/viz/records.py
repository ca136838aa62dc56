"""What a run logged: reading ``metrics.jsonl`` and taking single curves from it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aqdetr_jax.paths import as_path

Records = Sequence[Mapping[str, Any]]
"""One dict per logged line, each with an integer "step"."""


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a ``metrics.jsonl`` file: one JSON object a line, each with an integer "step".

    A last line cut short by a killed run is left out. NaN values are kept: a curve shows a gap.

    Args:
      path: the file.

    Returns:
      The records in file order; empty for an empty file.

    Raises:
      FileNotFoundError: no file at ``path``.
      ValueError: a line before the last is not an object with a step; the message gives its number.
    """
    source = as_path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no metrics file; was this folder trained in?")
    lines = source.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("not an object with an integer step")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{source}, line {number}: {error}") from error
        records.append(record)
    return records


def series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Extracts one curve.

    A run that was resumed may log a step twice; the later value counts.

    Args:
      records: from ``read_metrics``.
      key: the metric.

    Returns:
      steps int64 [N], rising, and values float64 [N], NaN where the value is not a finite number.
    """
    points: dict[int, float] = {}
    for record in records:
        if key in record:
            value = record[key]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            points[int(record["step"])] = (
                float(value) if number and math.isfinite(value) else math.nan
            )
    steps = sorted(points)
    return np.array(steps, np.int64), np.array([points[s] for s in steps], np.float64)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean over the last ``window`` points, float64 [N]; NaN is skipped and stays NaN."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - window, 0)
    mean = (sums[last] - sums[first]) / np.maximum(counts[last] - counts[first], 1)
    return np.where(finite, mean, np.nan)
