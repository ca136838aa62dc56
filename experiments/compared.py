"""Rows of studies compared: means over seeds, and pairs of methods image by image."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from results_files import commits_in

Rows = Sequence[Mapping[str, Any]]
NAMES = {
    "float": "float",
    "ptq_minmax": "calibrated, min-max",
    "ptq_percentile": "calibrated, percentile",
    "ptq_mse": "calibrated, MSE",
    "lsq": "LSQ",
    "lsq_longer": "LSQ, 5/3 of the steps",
    "lsq_plus": "LSQ+",
    "qdetr": "Q-DETR",
    "auxiliary": "LSQ + auxiliary queries",
    "distill": "LSQ + distillation",
    "aqdetr": "AQ-DETR (both)",
    "aqdetr_offset": "AQ-DETR on LSQ+'s grids",
}
FAMILIES = {"detr": "DETR", "deformable": "Deformable DETR"}
SURE = 0.95
"""Share of the draws from which on a difference is called one."""


def of(rows: Rows, **facts: Any) -> list[Mapping[str, Any]]:
    """Rows with these facts, by seed."""
    found = [r for r in rows if all(r["facts"].get(k) == v for k, v in facts.items())]
    return sorted(found, key=lambda row: row["facts"].get("seed", 0))


def ap_over_seeds(rows: Rows) -> str:
    """Mean and standard deviation of the AP, and of how many seeds."""
    return f"{mean_and_spread([r['AP'] for r in rows])} ({len(rows)})"


def mean_and_spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def comparison(rows: Rows, others: Rows) -> dict[str, Any] | None:
    """Two methods on the seeds that both have.

    Returns:
      "difference" of the means; "better", the share of draws of images in which the mean over seeds
      is higher, of equals half; "interval", the differences of nine in ten draws; "wins" and
      "seeds"; "spread", the larger standard deviation over seeds of the two; None if they share no
      seed.
    """
    left, right = ({r["facts"].get("seed", 0): r for r in some} for some in (rows, others))
    seeds = sorted(left.keys() & right.keys())
    if not seeds:
        return None
    both = [[some[s]["AP"] for s in seeds] for some in (left, right)]
    draws = np.mean([np.subtract(left[s]["AP_draws"], right[s]["AP_draws"]) for s in seeds], axis=0)
    return {
        "difference": statistics.mean(both[0]) - statistics.mean(both[1]),
        "interval": tuple(float(x) for x in np.quantile(draws, (0.05, 0.95))),
        "better": float(np.mean(draws > 0) + np.mean(draws == 0) / 2),
        "wins": sum(mine > theirs for mine, theirs in zip(*both, strict=True)),
        "seeds": len(seeds),
        "spread": max(statistics.stdev(some) if len(seeds) > 1 else 0.0 for some in both),
    }


def verdict(found: Mapping[str, Any] | None) -> str:
    """A comparison in words.

    "Better" takes all seeds, at least two, ``SURE`` of the draws, and a difference larger than the
    seeds' spread; what one seed shows is "ahead".
    """
    if found is None:
        return "not run"
    share, wins, seeds = found["better"], found["wins"], found["seeds"]
    words = ("better", "worse") if seeds > 1 else ("ahead", "behind")
    word = "no difference shown"
    if abs(found["difference"]) > found["spread"]:
        if share >= SURE and wins == seeds:
            word = words[0]
        elif share <= 1 - SURE and wins == 0:
            word = words[1]
    of_seeds = f"on {wins} of {seeds} seeds" if seeds > 1 else "one seed"
    return f"{word}: {found['difference']:+.4f}, in {share:.0%} of the draws, {of_seeds}"


def commits_of(rows: Rows) -> str:
    """The commits of some rows, in words."""
    return f"Commits {commits_in(rows)}."
