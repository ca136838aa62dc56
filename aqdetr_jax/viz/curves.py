"""Charts of a run: training curves, average precision side by side, query capacity by layer.

Figures are made from matplotlib's object interface with the Agg canvas: no pyplot, no global
state, no display, safe beside a user's own plots.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from aqdetr_jax.io import write_bytes_atomic
from aqdetr_jax.viz import palette
from aqdetr_jax.viz.records import Records, series, smooth

_PANEL_WIDTH, _PANEL_HEIGHT, _DPI = 3.6, 2.4, 160
_MAX_LINES = 8
_LINE_COLORS = {
    "light": (
        "#2563eb",
        "#d99a0b",
        "#cf4f76",
        "#0e8f7e",
        "#7a45c9",
        "#8a5a2b",
        "#5f8f1d",
        "#3d4757",
    ),
    "dark": (
        "#6b9bff",
        "#e8b23a",
        "#e87f9e",
        "#37bba9",
        "#a983ec",
        "#c29163",
        "#96c24f",
        "#b9c2d0",
    ),
}
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Of lines that must be told apart without colours."""


def training_curves(
    runs: Mapping[str, Records] | Records,
    *,
    title: str = "",
    theme: str = "light",
) -> Figure | None:
    """Draws what a run logged: loss, its terms, AP, learning rate, gradient norm, throughput.

    One run shows every term of its loss, raw and smoothed. Several runs are laid over each other in
    their own colours. Panels without data are left out.

    Args:
      runs: the records of one run (``records.read_metrics``), or run name to records.
      title: written above the panels.
      theme: "light" or "dark".

    Returns:
      The figure, or None when there is nothing finite to draw.
    """
    if not isinstance(runs, Mapping):
        runs = {"": runs}
    keys = dict.fromkeys(k for records in runs.values() for r in records for k in r)
    drawable = [
        k
        for k in keys
        if k != "step" and any(np.isfinite(_curve(r, k)[1]).any() for r in runs.values())
    ]
    panels = _panels(drawable, several=len(runs) > 1)
    if not panels:
        return None
    columns = _columns(len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(columns, rows, title, theme)
    for index, (name, members) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        style_panel(axes, name, theme)
        _draw_panel(axes, runs, members, theme)
        handles, labels = axes.get_legend_handles_labels()
        # Runs keep their colours, so the first panel's legend serves all of them.
        if len(handles) > 1 and (len(runs) == 1 or index == 0):
            add_legend(axes, theme, handles, labels, columns=2 if len(handles) > 4 else 1)
    return figure


def ap_bars(
    blocks: Mapping[str, Mapping[str, Any]],
    *,
    metrics: Sequence[str] = ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    theme: str = "light",
) -> Figure | None:
    """Draws results side by side: one group per metric, one bar per result, values written on top.

    Args:
      blocks: run name to results block; the order is the order of the bars.
      metrics: which of the twelve numbers; those undefined in every block are left out.
      theme: "light" or "dark".

    Returns:
      The figure, or None when no number is defined.
    """
    shown = [m for m in metrics if any(_defined(b.get(m)) for b in blocks.values())]
    if not shown:
        return None
    colors = palette.run_colors(list(blocks), theme)
    ink = palette.theme(theme)
    figure = new_figure(1, 1, "", theme, width=max(6.2, 1.9 * len(shown)), height=3.3)
    axes = figure.add_subplot(1, 1, 1)
    style_panel(axes, "", theme)
    width = 0.84 / len(blocks)
    top = 0.0
    for index, (name, block) in enumerate(blocks.items()):
        for group, metric in enumerate(shown):
            value = block.get(metric)
            x = group + (index - (len(blocks) - 1) / 2) * width
            if not _defined(value):
                axes.text(x, 0, "–", ha="center", va="bottom", color=ink.muted, fontsize=8)
                continue
            percent = 100 * float(value)  # type: ignore[arg-type]
            top = max(top, percent)
            axes.bar(
                x, percent, width * 0.9, color=colors[name], label=name if group == 0 else None
            )
            axes.annotate(
                f"{percent:.1f}",
                (x, percent),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7.5 if len(blocks) < 5 else 6,
                color=ink.ink,
            )
    axes.set_xticks(range(len(shown)), shown)
    axes.tick_params(axis="x", length=0, labelsize=10, labelcolor=ink.ink)
    axes.set_xlim(-0.55, len(shown) - 0.45)
    axes.set_ylim(0, max(top * 1.12, 1.0))
    axes.set_ylabel("percent", color=ink.muted, fontsize=9)
    # Handles are built here so that a run whose first metric is undefined keeps its entry.
    handles = [axes.bar(0, 0, color=colors[name]) for name in blocks]
    add_legend(axes, theme, handles, list(blocks), columns=len(blocks))
    return figure


def capacity_curves(rows: Records, *, theme: str = "light") -> Figure | None:
    """Draws query capacity against the decoder layer, one panel per measure.

    Args:
      rows: dicts with an integer "layer", optional "model" and "set" (text), and numbers: entropy,
        effective rank, cosine, ... Each (model, set) is one line.
      theme: "light" or "dark".

    Returns:
      The figure, or None without a measure over at least two layers.
    """
    usable = [r for r in rows if isinstance(r.get("layer"), int)]
    measures = [
        key
        for key in dict.fromkeys(k for r in usable for k in r if k not in ("layer", "model", "set"))
        if len({r["layer"] for r in usable if _number(r.get(key))}) > 1
    ]
    if not measures:
        return None
    names = list(dict.fromkeys(str(r.get("model", "")) for r in usable))
    sets = list(dict.fromkeys(str(r.get("set", "")) for r in usable))
    colors = palette.run_colors(names, theme)
    columns = _columns(len(measures))
    grid = -(-len(measures) // columns)
    figure = new_figure(columns, grid, "", theme)
    for index, measure in enumerate(measures):
        axes = figure.add_subplot(grid, columns, index + 1)
        style_panel(axes, measure.replace("_", " "), theme)
        for name, marker in zip(names, itertools.cycle(_MARKERS), strict=False):
            for style, kind in zip(_STYLES * len(sets), sets, strict=False):
                line = sorted(
                    (r["layer"], float(r[measure]))
                    for r in usable
                    if (str(r.get("model", "")), str(r.get("set", ""))) == (name, kind)
                    and _number(r.get(measure))
                )
                if line:
                    x, y = zip(*line, strict=True)
                    label = ", ".join(part for part in (name, kind) if part)
                    axes.plot(
                        x, y, style, color=colors[name], lw=1.6, marker=marker, ms=5.5, label=label
                    )
        axes.set_xlabel("decoder layer", color=palette.theme(theme).muted, fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels and labels != [""]:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=2 * columns,
            fontsize=8,
            frameon=False,
            labelcolor=palette.theme(theme).ink,
            handlelength=5,
        )
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes a figure as PNG, making its folder; returns the path."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI, facecolor=figure.get_facecolor())
    return write_bytes_atomic(path, stream.getvalue())


def _curve(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    """``series``, with AP in percent and pycocotools' -1 (no ground truth) as a gap."""
    steps, values = series(records, key)
    if key.startswith("eval/"):
        values = np.where(values < 0, np.nan, 100 * values)
    return steps, values


def _panels(keys: Sequence[str], *, several: bool) -> list[tuple[str, list[str]]]:
    """Groups metric names into panels in a fixed order: what matters most comes first."""
    taken: set[str] = set()

    def take(pattern: str) -> list[str]:
        found = [
            k for k in keys if k not in taken and re.fullmatch(pattern, k.removeprefix("train/"))
        ]
        taken.update(found)
        return found

    # A term of one decoder layer (loss_ce_0, ...) repeats its sum's shape: left out of the chart.
    take(r"loss_\w*?_\d+")
    average_precision = take(r"eval/(?:(?!per_class/)\w+/)?AP(?:50|75)?")
    groups = [
        ("loss", take(r"loss|total_loss")),
        ("loss terms", take(r"loss_\w+")),
        ("average precision (%)", sorted(average_precision, key=len)),
        ("learning rate", take(r".*learning_rate\w*|(?:.*/)?lr\w*")),
        ("gradient norm", take(r".*grad\w*norm.*")),
        ("images per second", take(r".*images_per_second")),
    ]
    if several:
        # One colour per run leaves one curve per panel: every loss term gets its own.
        split = []
        for name, members in groups:
            wanted = members if name == "loss terms" else members[:1]
            split += [(_short(k) if len(wanted) > 1 else name, [k]) for k in wanted]
        return split
    # What else has a prefix ("aux_layers/loss_ce", ...) belongs together.
    for key in keys:
        prefix = key.removeprefix("train/").rpartition("/")[0]
        if key not in taken and prefix and not prefix.startswith("eval"):
            title = prefix.replace("/", " / ").replace("_", " ")
            groups.append((title, take(re.escape(prefix) + "/[^/]+")))
    return [(name, members[:_MAX_LINES]) for name, members in groups if members]


def _draw_panel(
    axes: Axes, runs: Mapping[str, Records], members: Sequence[str], theme: str
) -> None:
    several = len(runs) > 1
    colors = palette.run_colors(list(runs), theme)
    lowest = math.inf
    for name, records in runs.items():
        for index, key in enumerate(members):
            steps, values = _curve(records, key)
            if not np.isfinite(values).any():
                continue
            lowest = min(lowest, float(np.nanmin(values)))
            color = colors[name] if several else _LINE_COLORS[theme][index]
            label = name if several else _short(key)
            if len(steps) > 40 and not re.search("learning_rate|lr", key):
                axes.plot(steps, values, color=color, lw=0.7, alpha=0.25)
                values = smooth(values, max(5, len(steps) // 40))
            marker = "o" if len(steps) <= 40 else None
            axes.plot(steps, values, color=color, lw=1.7, label=label, marker=marker, ms=3)
    if lowest >= 0:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.set_xlabel("step", color=palette.theme(theme).muted, fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.yaxis.set_major_formatter(FuncFormatter(_thousands))


def _columns(panels: int) -> int:
    return {1: 1, 2: 2, 4: 2}.get(panels, 3)


def new_figure(
    columns: int,
    rows: int,
    title: str,
    theme: str,
    *,
    width: float = _PANEL_WIDTH,
    height: float = _PANEL_HEIGHT,
) -> Figure:
    """An empty figure of ``columns`` x ``rows`` panels, whose sizes are in inches."""
    colors = palette.theme(theme)
    figure = Figure(
        figsize=(columns * width, rows * height), facecolor=colors.surface, layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    if title:
        figure.suptitle(title, color=colors.ink, fontsize=12, fontweight="bold", x=0.01, ha="left")
    return figure


def style_panel(axes: Axes, title: str, theme: str) -> None:
    """Gives a panel its title and the look of all panels."""
    colors = palette.theme(theme)
    axes.set_facecolor(colors.surface)
    axes.set_title(title, loc="left", color=colors.ink, fontsize=10, fontweight="bold")
    axes.grid(axis="y", color=colors.grid, lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colors.grid)
    axes.tick_params(colors=colors.muted, labelsize=8, length=0)


def add_legend(
    axes: Axes, theme: str, handles: Sequence[Any], labels: Sequence[str], *, columns: int
) -> None:
    """Adds a legend; of three columns and more above the panel."""
    made = axes.legend(
        handles,
        labels,
        loc="best" if columns < 3 else "upper center",
        bbox_to_anchor=None if columns < 3 else (0.5, 1.16),
        ncols=columns,
        fontsize=8,
        frameon=columns < 3,
        framealpha=0.8,
        edgecolor="none",
        facecolor=palette.theme(theme).surface,
        handlelength=1.4,
    )
    for text in made.get_texts():
        text.set_color(palette.theme(theme).ink)


def _short(key: str) -> str:
    if key.startswith("eval/"):
        return key.removeprefix("eval/")
    return key.rpartition("/")[2].removeprefix("loss_").replace("_", " ")


def _thousands(value: float, _: int) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _defined(value: Any) -> bool:
    return _number(value) and value >= 0
