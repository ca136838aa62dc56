"""Tables of studies: means over seeds, and pairs of methods compared image by image."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NAMES = {
    "float": "float",
    "ptq_minmax": "calibrated, min-max",
    "ptq_percentile": "calibrated, percentile",
    "ptq_mse": "calibrated, MSE",
    "lsq": "LSQ",
    "lsq_plus": "LSQ+",
    "qdetr": "Q-DETR",
    "auxiliary": "LSQ + auxiliary queries",
    "distill": "LSQ + distillation",
    "aqdetr": "AQ-DETR (both)",
}
FAMILIES = {"detr": "DETR", "deformable": "Deformable DETR"}
SURE = 0.95
"""Share of the draws from which on a difference is called one."""


def of(rows: Sequence[Mapping[str, Any]], **facts: Any) -> list[Mapping[str, Any]]:
    """Rows with these facts, by seed."""
    found = [r for r in rows if all(r["facts"].get(k) == v for k, v in facts.items())]
    return sorted(found, key=lambda row: row["facts"].get("seed", 0))


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {statistics.stdev(values):.4f}"


def comparison(
    rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Two methods on the seeds that both have.

    Returns:
      "difference" of the means; "better", the share of draws of images in which the mean over seeds
      is higher; "wins" and "seeds"; None if they share no seed.
    """
    left, right = ({r["facts"].get("seed", 0): r for r in some} for some in (rows, others))
    seeds = sorted(left.keys() & right.keys())
    if not seeds:
        return None
    draws = np.mean([np.subtract(left[s]["AP_draws"], right[s]["AP_draws"]) for s in seeds], axis=0)
    return {
        "difference": statistics.mean(left[s]["AP"] - right[s]["AP"] for s in seeds),
        "better": float(np.mean(draws > 0)),
        "wins": sum(left[s]["AP"] > right[s]["AP"] for s in seeds),
        "seeds": len(seeds),
    }


def verdict(found: Mapping[str, Any] | None) -> str:
    """A comparison in words."""
    if found is None:
        return "not run"
    share, wins, seeds = found["better"], found["wins"], found["seeds"]
    if share >= SURE and wins == seeds:
        word = "better"
    elif share <= 1 - SURE and wins == 0:
        word = "worse"
    else:
        word = "no difference shown"
    return (
        f"{word}: {found['difference']:+.4f}, in {share:.0%} of the draws, on {wins} of {seeds} "
        f"seed{'s' if seeds > 1 else ''}"
    )


def main_table(title: str, result: Mapping[str, Any] | None, reference: str = "lsq") -> str:
    """Methods by bits for each family, and each method against ``reference``."""
    if result is None:
        return f"**{title}**: not run."
    rows, parts = result["rows"], []
    for family, name in FAMILIES.items():
        mine = of(rows, family=family)
        bits = sorted({r["facts"]["bits"] for r in mine} - {32}, reverse=True)
        whole = of(mine, method="float")
        if not whole:
            parts.append(f"**{title}, {name}**: not run.")
            continue
        best = whole[0]["AP"]
        heads = [x for b in bits for x in (f"{b} bits", "of float", f"against {NAMES[reference]}")]
        lines = [
            f"**{title}, {name}**: AP, mean ± standard deviation over seeds; float {best:.4f}.",
            "",
            f"| method | seeds | {' | '.join(heads)} |",
            "|---" * (len(heads) + 2) + "|",
        ]
        for method, label in NAMES.items():
            if method == "float" or not of(mine, method=method):
                continue
            cells, count = [], 0
            for b in bits:
                found = of(mine, method=method, bits=b)
                if not found:
                    cells += ["not run", "", ""]
                    continue
                values = [r["AP"] for r in found]
                count = max(count, len(values))
                pair = comparison(found, of(mine, method=reference, bits=b))
                cells += [
                    mean_and_spread(values),
                    f"{statistics.mean(values) / best:.1%}",
                    "–" if method == reference else verdict(pair),
                ]
            lines.append(f"| {label} | {count} | {' | '.join(cells)} |")
        commits = sorted({r["commit"][:12] + r["commit"][40:] for r in mine})
        lines += ["", f"Commits {', '.join(commits)}."]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
