"""The ledger: every published number, and what became of it here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from results_files import RESULTS, short

from aqdetr_jax.io import read_json

LEDGER = RESULTS.parent / "ledger.yaml"
POINTS = 0.3
"""AP that a run may stay under a published one and still reach it: two runs differ by as much."""

_KEYS = {"what", "metric", "bits", "expected", "source", "command", "note", "ours", "tolerance"}
_OURS = {"file", "row", "value", "per", "spread", "manifest"}


def read_ledger(path: Path = LEDGER) -> list[dict[str, Any]]:
    """The rows.

    Raises:
      ValueError: a row has an unknown key, or lacks one.
    """
    rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    for number, row in enumerate(rows, start=1):
        missing = _KEYS - {"note", "ours", "tolerance"} - row.keys()
        unknown = row.keys() - _KEYS | row.get("ours", {}).keys() - _OURS
        if missing or unknown:
            raise ValueError(
                f"{path}, row {number}: {sorted(missing | unknown)} missing or unknown"
            )
    return rows


def found(row: Mapping[str, Any], results: Path = RESULTS) -> dict[str, Any] | None:
    """Our value of a row with its "commit" and "evidence"; None if it was not run.

    Raises:
      ValueError: the row names a value that its file does not have.
    """
    ours = row.get("ours")
    if ours is None:
        return None
    path = results / ours["file"]
    content = read_json(path) if path.is_file() else None
    if content is None:
        raise ValueError(f"{row['what']}, {row['metric']}: {path} is not there")
    block = _one(content, ours.get("row", {}))

    def at(place: str) -> float:
        value: Any = block
        for key in place.split("/"):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            raise ValueError(f"{path} has no {place} of {ours.get('row', {})}")
        return value

    per = ours.get("per", 1)
    return {
        "value": at(ours["value"]) / (at(per) if isinstance(per, str) else per),
        "spread": ours.get("spread"),
        "commit": short(block["commit"]),
        "evidence": ours.get("manifest", f"experiments/results/{ours['file']}"),
    }


def _one(content: Any, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    rows = content["rows"] if isinstance(content, Mapping) and "rows" in content else content
    if not isinstance(rows, list):
        return rows
    same = [r for r in rows if all((r | r.get("facts", {})).get(k) == v for k, v in wanted.items())]
    return same[0] if len(same) == 1 else None


def status(row: Mapping[str, Any], ours: Mapping[str, Any] | None) -> str:
    """What became of a row: "reached", "not reached" or "not run"."""
    if ours is None:
        return "not run"
    value, expected = ours["value"], row["expected"]
    if "AP" in row["metric"]:
        reached = value >= expected - row.get("tolerance", POINTS)
    else:
        reached = abs(value - expected) <= row["tolerance"] * expected
    return "reached" if reached else "not reached"


def ledger_table(rows: list[dict[str, Any]] | None = None) -> str:
    """One line a row."""
    rows = read_ledger() if rows is None else rows
    lines = [
        "| what | metric | bits W-A-attention | published | source | ours | status | command |",
        "|---|---|---|---|---|---|---|---|",
    ]
    counts: dict[str, int] = {}
    for row in rows:
        ours = found(row)
        state = status(row, ours)
        counts[state] = counts.get(state, 0) + 1
        value = "–" if ours is None else f"{_number(ours['value'])} ({ours['evidence']})"
        published = "–" if row["expected"] is None else _number(row["expected"])
        command = f"`{row['command']}`" if row["command"] else "none"
        note = f" ({row['note']})" if "note" in row else ""
        lines.append(
            f"| {row['what']} | {row['metric']} | {row['bits']} | {published} | {row['source']} | "
            f"{value} | {state} | {command}{note} |"
        )
    total = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    return "\n".join([f"{len(rows)} numbers: {total}.", "", *lines])


def _number(value: float) -> str:
    if value == int(value) and value > 999:
        return f"{value:,.0f}"
    return f"{value:.2f}".rstrip("0").rstrip(".")
