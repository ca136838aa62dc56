"""The report's account of bits: what runs at how many, and what stays float."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aqdetr_jax.viz import html
from aqdetr_jax.viz.html import MISSING, Markup, element, join


def bits_section(report: Mapping[str, Any]) -> Markup:
    """Builds the section from the "bit_report" of ``report.write_report``.

    Args:
      report: {"rows": [...], "packed_bytes": int, "float_bytes": int}, the sizes optional; a row
        has path, kind, weight_bits, activation_bits, attention_bits, parameters and note.

    Returns:
      The share of parameters by width, a summary by kind, and every operation.
    """
    rows = report.get("rows") or []
    parts = []
    total = sum(int(row.get("parameters") or 0) for row in rows)
    if report.get("packed_bytes"):
        words = f"{total:,} parameters, {html.size(report['packed_bytes'])} as stored"
        if report.get("float_bytes"):
            words += f", {html.size(report['float_bytes'])} in float32"
        parts.append(element("p", words + ".", class_="lead"))
    shares: dict[str, int] = {}
    groups: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        parameters = int(row.get("parameters") or 0)
        key = tuple(_width(row.get(f"{k}_bits")) for k in ("weight", "activation", "attention"))
        shares[key[0]] = shares.get(key[0], 0) + parameters
        group = groups.setdefault((str(row.get("kind", "")), *key), [0, 0])
        group[0], group[1] = group[0] + 1, group[1] + parameters
    if total:
        ordered = sorted(((w, n) for w, n in shares.items() if n), key=lambda s: _order(s[0]))
        parts.append(element("div", *(_slice(w, n, total) for w, n in ordered), class_="share"))
        key_line = [
            element(
                "span",
                _chip(w),
                f"{' bits' if w.isdigit() else ''}: {100 * n / total:.1f} % of the parameters",
            )
            for w, n in ordered
        ]
        parts.append(element("div", *key_line, class_="key"))
    bit_columns = [("weights", ""), ("activations", ""), ("attention", "")]
    if groups:
        columns = [("kind", "text"), *bit_columns, ("operations", ""), ("parameters", "")]
        summary = [
            [kind, *map(_chip, widths), f"{count:,}", f"{parameters:,}"]
            for (kind, *widths), (count, parameters) in groups.items()
        ]
        parts += [element("h3", "By kind"), html.table(columns, summary)]
        columns = [("operation", "text code"), ("kind", "text"), *bit_columns]
        columns += [("parameters", ""), ("note", "text wrap")]
        full = [
            [
                row.get("path", ""),
                row.get("kind", ""),
                *(
                    _chip(_width(row.get(f"{k}_bits")))
                    for k in ("weight", "activation", "attention")
                ),
                html.text(int(row.get("parameters") or 0)),
                row.get("note") or "",
            ]
            for row in rows
        ]
        parts += [element("h3", f"Every operation ({len(rows)})"), html.table(columns, full)]
    return join(parts)


def _width(bits: Any) -> str:
    if bits is None:
        return MISSING
    return "float" if bits == "float" or float(bits) >= 16 else str(int(bits))


def _order(width: str) -> int:
    return int(width) if width.isdigit() else 99


def _chip(width: str) -> Markup:
    if width == MISSING:
        return Markup(MISSING)
    return element("span", width, class_=f"bits {_shade(width)}")


def _shade(width: str) -> str:
    if not width.isdigit():
        return "bf"
    return f"b{max(2, int(width))}" if int(width) <= 4 else "b8"


def _slice(width: str, parameters: int, total: int) -> Markup:
    share = 100 * parameters / total
    words = f"{width} bits: {parameters:,} parameters"
    return element("div", class_=_shade(width), style=f"width:{share:.3f}%", title=words)
