"""The tables and the picture of docs/sensitivity.md, from what ``aqdetr sensitivity`` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results_files import short

from aqdetr_jax.deploy import ranking
from aqdetr_jax.viz.curves import save_figure
from aqdetr_jax.viz.sensitivity import sensitivity_figure


def sensitivity_text(results: Mapping[str, tuple[str, dict[str, Any] | None]]) -> str:
    """The studies one after the other.

    Args:
      results: title -> (command, content of its ``sensitivity.json`` or None).
    """
    return "\n\n".join(
        _study(title, command, result) for title, (command, result) in results.items()
    )


def _study(title: str, command: str, result: dict[str, Any] | None) -> str:
    if result is None:
        return f"**{title}** (`{command}`): not run."
    headings, cells = ranking.table(result)
    lines = [f"**{title}.** {' '.join(ranking.summary(result))}"]
    agreement = result["ranking"]["agreement"]
    if agreement is not None:
        lines[0] += f" Rank correlation of AP loss and noise: {agreement:.2f}."
    lines += ["", f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in cells]
    seconds = sum(row["seconds"] for row in result["rows"])
    lines += [
        "",
        f"`{command}`, commit `{short(result['commit'])}`, {len(result['rows'])} measurements in "
        f"{seconds / 60:.0f} minutes.",
    ]
    return "\n".join(lines)


def write_picture(result: dict[str, Any] | None, path: Path) -> None:
    """The picture of a study, if it was run."""
    if result is not None:
        save_figure(sensitivity_figure(result), path)
