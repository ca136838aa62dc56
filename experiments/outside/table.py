"""The rows of ``compare`` as a table in Markdown."""

from __future__ import annotations

from typing import Any


def outside_table(outside: dict[str, Any] | None) -> list[str]:
    """Lines, from what ``step_time.json`` holds under "outside"."""
    if outside is None:
        return ["**Beside PyTorch and ONNX Runtime**: not run."]
    if "skipped" in outside:
        return [f"**Beside PyTorch and ONNX Runtime**: not run ({outside['skipped']})."]
    rows = outside["rows"]
    versions = {k: v for row in rows for k, v in row["theirs"]["versions"].items()}
    named = ", ".join(f"{name} {versions[name]}" for name in sorted(versions))
    lines = [
        f"**Beside PyTorch and ONNX Runtime**, {outside['cores']} cores, in turn, "
        f"{outside['rounds']} rounds, commit `{outside['commit'][:7]}`; {named}; above 1 ours is "
        "the faster:",
        "",
        "| case | images | ours, CPU-s | theirs, CPU-s | theirs / ours, CPU-s | goal | wall |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        height, width = row["image"]
        found = row["theirs_over_ours"]
        ours, theirs = (row[side]["median_cpu_seconds"] for side in ("ours", "theirs"))
        lines.append(
            f"| {row['case'].replace('_', ' ')} | {row['batch']} x {height} x {width} | "
            f"{ours:.2f} | {theirs:.2f} | **{found['cpu_seconds']:.2f}** | {row['goal']:.1f} | "
            f"{found['seconds']:.2f} |"
        )
    sides = {(row["ours"]["what"], row["theirs"]["what"]) for row in rows}
    return [*lines, "", *(f"Ours: {ours}. Theirs: {theirs}." for ours, theirs in sorted(sides))]
