"""Table and picture of docs/quantization.md from what ``bfloat16.py`` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results_files import commits_in

from aqdetr_jax.viz.curves import save_figure, training_curves

DTYPES = ("float32", "bfloat16")
COMMAND = "`python experiments/bfloat16.py --work=DIR --out=FILE`"


def bfloat16_text(result: Mapping[str, Any] | None) -> str:
    """AP and last losses of both."""
    if result is None:
        return f"{COMMAND}: not run."
    lines = [
        "| between the layers | seed | AP | AP50 | last losses (mean) |",
        "|---|---|---|---|---|",
    ]
    for name, run in result["runs"].items():
        dtype, _, seed = name.partition("_seed")
        lines.append(
            f"| {dtype} | {seed} | {run['AP']:.4f} | {run['AP50']:.4f} | {run['losses'][-1]:.3f} |"
        )
    commits = commits_in(result["runs"].values())
    return "\n".join(
        [
            *lines,
            "",
            "![Losses of both](bfloat16.png)",
            "",
            f"`{result['command']}` on {result['device']}; commits: {commits}.",
        ]
    )


def write_picture(result: Mapping[str, Any] | None, path: Path) -> None:
    """Losses of both, of the first seed, if it was run."""
    if result is None:
        return
    seed = next(iter(result["runs"])).partition("_seed")[2]
    runs = {
        dtype: [
            {"step": step, "loss": loss}
            for step, loss in zip(run["steps"], run["losses"], strict=True)
        ]
        for dtype in DTYPES
        if (run := result["runs"].get(f"{dtype}_seed{seed}"))
    }
    figure = training_curves(runs)
    assert figure is not None  # every run has losses
    save_figure(figure, path)
