"""The picture and the section of a sensitivity study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aqdetr_jax.viz import curves, html, palette
from aqdetr_jax.viz.html import Markup, element, join

_ROW_HEIGHT = 0.24


def sensitivity_figure(result: Mapping[str, Any], *, theme: str = "light") -> Figure:
    """Loss of AP and signal-to-noise of every group quantized alone, a dot for each of the bits.

    Groups stand in the order of their noise, the most sensitive on top; a ring marks the bits that
    were chosen.

    Args:
      result: content of ``sensitivity.json``.
      theme: "light" or "dark".
    """
    names = result["ranking"]["by_snr"]
    alone = {(r["group"], r["bits"]): r for r in result["rows"] if r["kind"] == "alone"}
    float_ap = next(r["AP"] for r in result["rows"] if r["kind"] == "float")
    chosen = {group["name"]: group["chosen_bits"] for group in result["groups"]}
    figure = curves.new_figure(1, 1, "", theme, width=9.0, height=1.2 + _ROW_HEIGHT * len(names))
    panels = (
        ("loss of AP (points)", lambda row: 100 * (float_ap - row["AP"])),
        ("signal to noise of the outputs (dB)", lambda row: row["snr_db"]),
    )
    for column, (title, value) in enumerate(panels):
        axes = figure.add_subplot(1, 2, column + 1)
        curves.style_panel(axes, title, theme)
        _draw(axes, names, result["candidates"], alone, chosen, value, theme)
        axes.set_yticks(range(len(names)), names if column == 0 else [])
        axes.tick_params(axis="y", labelcolor=palette.theme(theme).ink)
        axes.set_ylim(len(names) - 0.4, -0.6)
        if column == 0:
            axes.axvline(0, color=palette.theme(theme).muted, lw=0.8)
            handles, labels = axes.get_legend_handles_labels()
            curves.add_legend(axes, theme, handles, labels, columns=1)
    return figure


def _draw(
    axes: Axes,
    names: Sequence[str],
    candidates: Sequence[int],
    alone: Mapping[tuple[str, int], Mapping[str, Any]],
    chosen: Mapping[str, int | None],
    value: Any,
    theme: str,
) -> None:
    colors = palette.run_colors([f"{bits} bits" for bits in candidates], theme)
    axes.grid(axis="x", color=palette.theme(theme).grid, lw=0.8)
    for bits in candidates:
        label = f"{bits} bits"
        points = [(value(alone[name, bits]), y) for y, name in enumerate(names)]
        points = [(x, y) for x, y in points if x is not None]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=26, color=colors[label], label=label, zorder=3)
        rings = [(x, y) for x, y in points if chosen.get(names[y]) == bits]
        if rings:
            x, y = zip(*rings, strict=True)
            axes.scatter(x, y, s=70, facecolors="none", edgecolors=palette.theme(theme).ink, lw=1.2)


def sensitivity_section(content: Mapping[str, Any]) -> Markup:
    """The report's section.

    Args:
      content: "result", the content of ``sensitivity.json``; "headings" and "cells", its table.
    """
    result = content["result"]
    light, dark = (sensitivity_figure(result, theme=t) for t in ("light", "dark"))
    lead = (
        "Each group of operations quantized alone after calibration, all others float. Signal to "
        "noise: of the last layer's logits and boxes against the float model's; a group without a "
        "dot there changes nothing. Rings: the chosen bits."
    )
    columns = [(name, "text" if i == 0 else "") for i, name in enumerate(content["headings"])]
    agreement = result["ranking"]["agreement"]
    words = "The last column: AP of the policy with this group left float, minus the policy's."
    if agreement is not None:
        words += f" Rank correlation of AP loss and noise: {agreement:.2f}."
    return join(
        [
            element("p", lead, class_="lead"),
            html.chart(light, dark, alt="Loss of AP and signal to noise by group and bits"),
            element("h3", "Numbers"),
            html.table(columns, content["cells"]),
            element("p", words, class_="under"),
        ]
    )
