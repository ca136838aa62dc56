"""The evidence in one table: float, LSQ, distillation, AQ-DETR, by set, family and bits."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compared import FAMILIES, Rows, comparison, of, verdict

SHOWN = ("lsq", "distill", "aqdetr")
AGAINST = ("lsq", "lsq_longer", "distill")
"""What AQ-DETR is compared with."""
Study = tuple[str, Mapping[str, Any] | None, Mapping[str, Any]]
"""(what to call it, results or None, facts that its rows have beside family, method and bits)."""


def summary_table(studies: Sequence[Study]) -> str:
    """A line for each set, family and number of bits of which LSQ and AQ-DETR were trained.

    Of which no number of bits was, is said below.
    """
    lines = [
        "| | bits | seeds | float | LSQ | + distillation | AQ-DETR | of float | against LSQ "
        "| against LSQ of 5/3 of the steps | against distillation alone |",
        "|---" * 11 + "|",
    ]
    missing = []
    for label, result, facts in studies:
        rows = result["rows"] if result else []
        found = {
            name: list(_lines(f"{label}, {name}", of(rows, family=family), facts))
            for family, name in FAMILIES.items()
            if of(rows, family=family)
        }
        lines += [line for some in found.values() for line in some]
        lacking = [f"{label}, {name}" for name, some in found.items() if not some]
        missing += lacking if any(found.values()) else [label]
    text = "\n".join(lines) if len(lines) > 2 else ""
    said = f"Not run, or not both of LSQ and AQ-DETR: {'; '.join(missing)}." if missing else ""
    return "\n\n".join(part for part in (text, said) if part)


def _lines(label: str, rows: Rows, facts: Mapping[str, Any]) -> Iterator[str]:
    whole = of(rows, method="float")
    for bits in sorted({r["facts"]["bits"] for r in rows} - {32}, reverse=True):
        found = {
            method: of(rows, bits=bits, method=method, **facts) for method in {*SHOWN, *AGAINST}
        }
        if not (whole and found["lsq"] and found["aqdetr"]):
            continue
        best = whole[0]["AP"]
        on = "".join(
            f"; trained on {r['AP']:.3f}" for r in of(rows, method="float_longer", **facts)
        )
        means = {m: statistics.mean(r["AP"] for r in some) for m, some in found.items() if some}
        cells = [f"{means[m]:.3f}" if m in means else "not run" for m in SHOWN]
        yield (
            f"| {label} | {bits} | {len(found['aqdetr'])} | {best:.3f}{on} | "
            f"{' | '.join(cells)} | {means['aqdetr'] / best:.1%} | "
            f"{' | '.join(verdict(comparison(found['aqdetr'], found[m])) for m in AGAINST)} |"
        )
