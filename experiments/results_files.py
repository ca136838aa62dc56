"""Where results are, and how commits are shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aqdetr_jax.io import read_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"


def load(name: str) -> dict[str, Any] | None:
    """A results file, or None."""
    path = RESULTS / name
    return read_json(path) if path.is_file() else None


def short(commit: str) -> str:
    """A commit in twelve digits; that it was dirty stays said."""
    return commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")


def commits_in(rows: Iterable[Mapping[str, Any]]) -> str:
    """The commits of some rows, each once."""
    return ", ".join(sorted({short(row["commit"]) for row in rows}))
