"""The tables of docs/deploy.md, from exports.json, packed_size.json and deploy.json."""

from __future__ import annotations

from typing import Any

from results_files import commits_in

_MIB = 2**20
_RUNTIME = "ONNX Runtime"


def exports_table(rows: list[dict[str, Any]] | None) -> str:
    """Students that left: differing codes and AP, family by family, bits by bits."""
    if not rows:
        return "`python experiments/exports.py`: not run."
    lines = [
        "| student | steps | file | KiB | quantizers | codes compared "
        "| differ, deployed from trained | differ, ONNX Runtime from deployed "
        "| of those in the backbone | AP trained | AP deployed | AP ONNX Runtime |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r["family"], -int(r["policy"][1]), r["format"])):
        own = row["codes"]["trained, deployed"]
        other = row["codes"].get(f"deployed, {_RUNTIME}")
        backbone = own["different_in_backbone"] + (other["different_in_backbone"] if other else 0)
        ap = [row["ap"].get(name) for name in ("trained", "deployed", _RUNTIME)]
        others = f"{other['different']:,}" if other else "–"
        scores = " | ".join("–" if a is None else f"{a:.4f}" for a in ap)
        lines.append(
            f"| {row['family']} {row['policy']} | {row['steps']} | {row['format']} | "
            f"{row['bytes'] / 1024:,.0f} | {own['quantizers']} | {own['codes']:,} | "
            f"{own['different']:,} | {others} | {backbone:,} | {scores} |"
        )
    first = rows[0]
    commits = commits_in(rows)
    note = (
        f"`python experiments/exports.py`, {first['set']['images']} images of "
        f"{first['set']['name']}; seed {first['seed']}; commit {commits}. Refused by the gate: "
        f"{'; '.join(f for row in rows for f in row['failures']) or 'none'}."
    )
    return "\n".join([*lines, "", note])


def sizes_table(rows: list[dict[str, Any]] | None) -> str:
    """Packed files beside float ones, and the parts of DETR's at 4 bits."""
    if not rows:
        return "`python experiments/packed_size.py`: not run."
    lines = ["| model | packed | float32 | |", "|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| `{row['config']}` | {row['packed_bytes'] / _MIB:.2f} MiB | "
            f"{row['float_bytes'] / _MIB:.2f} MiB | 1/{row['ratio']:.2f} |"
        )
    chosen = next((row for row in rows if row["config"] == "coco:r50,w4a4"), None)
    if chosen is not None:
        lines += ["", "| part of `coco:r50,w4a4`, KiB | codes | scales, biases, steps | floats |"]
        lines.append("|---|---|---|---|")
        for part, sizes in chosen["parts"].items():
            cells = " | ".join(f"{size / 1024:,.1f}" for size in sizes.values())
            lines.append(f"| {part} | {cells} |")
    commits = commits_in(rows)
    return "\n".join(
        [
            *lines,
            "",
            f"Folders as written by `python experiments/packed_size.py`; commit {commits}.",
        ]
    )


def speed_table(result: dict[str, Any] | None) -> str:
    """Latency of models side by side."""
    if not result or not result["rows"]:
        return "`python experiments/deploy.py`: not run."
    lines = [
        "| model | runtime | bits | threads | image | median ms | p95 ms | × float | file KiB "
        "| AP |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ratio, ap = row["ratio_to_float"], row["ap"]
        lines.append(
            f"| {row['model'].removeprefix('runs/')} | {row['runtime']} | {row['bits']} | "
            f"{row['threads']} | {row['height']}x{row['width']} | {row['median_ms']:.2f} | "
            f"{row['p95_ms']:.2f} | {'–' if ratio is None else f'{ratio:.2f}'} | "
            f"{row['file_bytes'] / 1024:,.0f} | {'–' if ap is None else f'{ap:.4f}'} |"
        )
    commits = commits_in(result["rows"])
    cpu = result["groups"][0]["cpu"]
    flags = ", ".join(cpu["flags"])
    note = f"`python experiments/deploy.py` on {cpu['model']} ({flags}); commit {commits}."
    notes = dict.fromkeys(note for group in result["groups"] for note in group["notes"])
    return "\n".join([*lines, "", note, *(["", *(f"- {n}" for n in notes)] if notes else [])])
