"""The bit report: every operation of a model with its bits, kept-float ones included."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from aqdetr_jax.quant.record import OpRecord
from aqdetr_jax.quant.spec import QuantSpec

ATTENTION = ("scores", "mix", "mix_samples")


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
        ``packed_bytes``: weights at their bits, one float32 step per channel, two float32 for
        every centred input channel, all else float32;
        ``float_bytes``: everything in float32;
        ``macs``: per image, all products;
        ``macs_by_bits``: share of those by "WxA" bits, e.g. {"4x4": 0.93, "8x8": 0.05, ...}.
    """
    table, packed, plain = [], 0.0, 0
    macs: dict[str, int] = {}
    for row in _merged(rows):
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
        packed += _packed(row)
        if row.macs:
            left = row.activation if attention else row.weight
            right = row.other if attention else row.activation
            key = f"{_bits(left)}x{_bits(right)}"
            macs[key] = macs.get(key, 0) + row.macs // batch
    total = sum(macs.values())
    return {
        "rows": table,
        "packed_bytes": round(packed),
        "float_bytes": plain,
        "macs": total,
        "macs_by_bits": {key: value / total for key, value in sorted(macs.items())},
    }


def _merged(rows: Sequence[OpRecord]) -> list[OpRecord]:
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


def _packed(row: OpRecord) -> float:
    if row.weight is None:
        return 4.0 * row.parameters
    # A row's parameters are the kernel, and per output channel a bias (where there is one).
    kernel = row.kernel_size
    floats = row.parameters - kernel + row.channels + 2 * row.centred
    return kernel * row.weight.bits / 8 + 4.0 * floats


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
