"""The bit report: every operation of a model with its bits, kept-float ones included."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from aqdetr_jax.quant.record import OpRecord
from aqdetr_jax.quant.spec import QuantSpec, packed_size

ATTENTION = ("scores", "mix", "mix_samples")

PACKED_PARTS = ("codes", "scales", "biases", "grids", "floats")
"""What a packed model consists of, see ``packed_parts``."""


def bit_report(rows: Sequence[OpRecord], batch: int = 1) -> dict[str, Any]:
    """A table of all operations and honest totals.

    An operation that runs several times in a pass (the decoder's shared norm) is one row: its
    weights count once, its multiply-adds every time.

    Args:
      rows: records of one forward pass.
      batch: images in that pass; multiply-adds are given per image.

    Returns:
      JSON-serialisable dict:
        ``rows``: one dict an operation with ``path``, ``kind``, ``weight_bits``,
        ``activation_bits``, ``attention_bits`` (int, "float", or None where it has no such
        operand), ``grids`` (text), ``parameters``, ``macs``, ``note``;
        ``packed_bytes``: of a packed model, see ``packed_parts``;
        ``packed_parts``: the same by part;
        ``float_bytes``: everything in float32;
        ``macs``: per image, all products;
        ``macs_by_bits``: share of those by "WxA" bits, e.g. {"4x4": 0.93, "8x8": 0.05, ...}.
    """
    table, plain = [], 0
    parts = dict.fromkeys(PACKED_PARTS, 0)
    macs: dict[str, int] = {}
    for row in merged_rows(rows):
        attention = row.kind in ATTENTION
        activates = row.kind == "add" or (row.macs and not attention)
        table.append(
            {
                "path": row.path,
                "kind": row.kind,
                "weight_bits": _bits(row.weight) if row.kind in ("dense", "conv") else None,
                "activation_bits": _bits(row.activation) if activates else None,
                "attention_bits": _bits(row.activation) if attention else None,
                "grids": _grids(row),
                "parameters": row.parameters,
                "macs": row.macs // batch,
                "note": row.note,
            }
        )
        plain += 4 * row.parameters
        for part, size in packed_parts(row).items():
            parts[part] += size
        if row.macs:
            left, right = operands(row)
            key = f"{_bits(left)}x{_bits(right)}"
            macs[key] = macs.get(key, 0) + row.macs // batch
    total = sum(macs.values())
    return {
        "rows": table,
        "packed_bytes": sum(parts.values()),
        "packed_parts": parts,
        "float_bytes": plain,
        "macs": total,
        "macs_by_bits": {key: value / total for key, value in sorted(macs.items())},
    }


def merged_rows(rows: Sequence[OpRecord]) -> list[OpRecord]:
    """One record per operation, in the order of first use."""
    merged: dict[tuple[str, str], OpRecord] = {}
    for row in rows:
        first = merged.get((row.path, row.kind))
        merged[row.path, row.kind] = (
            row if first is None else dataclasses.replace(first, macs=first.macs + row.macs)
        )
    return list(merged.values())


def _bits(spec: QuantSpec | None) -> int | str:
    return "float" if spec is None else spec.bits


def _grids(row: OpRecord) -> str:
    named = (("w", row.weight), ("a", row.activation), ("b", row.other))
    text = " ".join(f"{name}:{spec.describe()}" for name, spec in named if spec is not None)
    return f"{text} centred" if row.centred else text


def operands(row: OpRecord) -> tuple[QuantSpec | None, QuantSpec | None]:
    """The grids of both operands of a product: the weight's first where there is one."""
    if row.kind in ATTENTION:
        return row.activation, row.other
    return row.weight, row.activation


def packed_parts(row: OpRecord) -> dict[str, int]:
    """Bytes of an operation's arrays in a packed model (``deploy.parts``).

    Args:
      row: merged, see ``merged_rows``.

    Returns:
      ``PACKED_PARTS`` -> bytes: "codes", weights at their bits; "scales", a float32 for each of
      their output channels, a folded norm's factor in it; "biases", int32 of integer layers, whose
      norms fold into them; "grids", the float32 step of every site, shift and scale of every
      centred input channel; "floats", all else, float32. A convolution has a bias whether the
      model's has one or not: that of the norm that folds into it.
    """
    parts = dict.fromkeys(PACKED_PARTS, 0)
    steps = sum(_steps(spec, row) for spec in (row.activation, row.other))
    parts["grids"] = 4 * (steps + 2 * row.centred)
    if row.folds:
        return parts
    if not row.kernel_size:
        parts["floats"] = 4 * row.parameters
        return parts
    if row.weight is None:
        parts["floats"] += 4 * row.kernel_size
    else:
        parts["codes"] = packed_size(row.kernel_size, row.weight.bits)
        parts["scales"] = 4 * row.channels
    integer = row.weight is not None and row.activation is not None
    parts["biases" if integer else "floats"] += 4 * row.channels
    return parts


def _steps(spec: QuantSpec | None, row: OpRecord) -> int:
    """Steps of a grid; its bits and zero points stand in the manifest."""
    if spec is None:
        return 0
    return row.heads if spec.granularity == "head" else 1


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the first column left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def format_bit_report(report: dict[str, Any]) -> str:
    """The report as a text table."""
    lines = [f"{'operation':58s} {'kind':9s} {'W':>5s} {'A':>5s} {'attn':>5s} {'params':>9s}  note"]
    for row in report["rows"]:
        cells = [row["weight_bits"], row["activation_bits"], row["attention_bits"]]
        text = " ".join(f"{'-' if c is None else c!s:>5s}" for c in cells)
        lines.append(
            f"{row['path'][:58]:58s} {row['kind']:9s} {text} {row['parameters']:>9d}  {row['note']}"
        )
    shares = ", ".join(f"{k}: {v:.1%}" for k, v in report["macs_by_bits"].items())
    lines.append(
        f"weights {report['packed_bytes'] / 2**20:.2f} MiB packed, "
        f"{report['float_bytes'] / 2**20:.2f} MiB as float32; "
        f"{report['macs'] / 1e9:.2f} GMACs an image ({shares})"
    )
    return "\n".join(lines)
