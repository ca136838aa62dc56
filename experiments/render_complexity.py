"""The tables of docs/complexity.md, from ``experiments/complexity.py``; see ``render_results``."""

from __future__ import annotations

from typing import Any

from results_files import commits_in

_MIB = 2**20


def models_table(result: list[dict[str, Any]] | None) -> str:
    """Parameters, multiply-adds and bytes of every model."""
    if result is None:
        return "`python experiments/complexity.py`: not run."
    lines = [
        "| config | parameters | GMACs | float32 MiB | packed MiB | ratio | codes | scales | "
        "biases | grids | floats |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result:
        parts = " | ".join(f"{size / _MIB:.2f}" for size in row["packed_parts"].values())
        lines.append(
            f"| `{row['config']}` | {row['parameters']['learnable']:,} | {row['macs'] / 1e9:.1f} | "
            f"{row['float_bytes'] / _MIB:.2f} | {row['packed_bytes'] / _MIB:.2f} | "
            f"1/{row['float_bytes'] / row['packed_bytes']:.2f} | {parts} |"
        )
    return "\n".join([*lines, "", _source(result)])


def groups_table(result: list[dict[str, Any]] | None, config: str) -> str:
    """One model by part of the network."""
    rows = [row for row in result or [] if row["config"] == config]
    if not rows:
        return "`python experiments/complexity.py`: not run."
    lines = [
        f"| `{config}` | numbers | GMACs | float32 KiB | packed KiB | bits of its multiply-adds |",
        "|---|---|---|---|---|---|",
    ]
    for part in rows[0]["groups"]:
        shares = ", ".join(f"{b} {s:.1%}" for b, s in part["macs_by_bits"].items())
        lines.append(
            f"| {part['group']} | {part['parameters']:,} | {part['macs'] / 1e9:.3f} | "
            f"{part['float_bytes'] / 1024:,.1f} | {part['packed_bytes'] / 1024:,.1f} | "
            f"{shares or '–'} |"
        )
    return "\n".join(lines)


def papers_table(result: list[dict[str, Any]] | None) -> str:
    """Size and OPs beside the printed ones."""
    if result is None:
        return "`python experiments/complexity.py`: not run."
    lines = [
        "| config | Size, ours | if all numbers had the bits | printed | FLOPs | OPs, ours | "
        "with a float first convolution | printed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result:
        papers = row["papers"]
        printed = papers["published"]
        if printed is None:
            continue
        lines.append(
            f"| `{row['config']}` | {papers['size_mib']:.2f} | {papers['size_if_all_mib']:.2f} | "
            f"{printed['size_mb']:.2f} | {papers['flops'] / 1e9:.2f} | "
            f"{papers['ops'] / 1e9:.2f} | {papers['ops_if_stem_float'] / 1e9:.2f} | "
            f"{printed['ops_g']:.2f} |"
        )
    return "\n".join([*lines, "", _source(result)])


def _source(result: list[dict[str, Any]]) -> str:
    commits = commits_in(result)
    return (
        f"`python experiments/complexity.py`, one image of {result[0]['height']} x "
        f"{result[0]['width']}, commit {commits}."
    )
