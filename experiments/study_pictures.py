"""Pictures of the main table: AP against bits, size and training time, and what classes lose.

Methods are told apart by markers and line styles as well as by colour.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compared import FAMILIES, NAMES, Rows, of
from matplotlib.axes import Axes

from aqdetr_jax.training.experiment import load_experiment
from aqdetr_jax.viz import palette
from aqdetr_jax.viz.curves import add_legend, new_figure, save_figure, style_panel

LOOKS = {
    "ptq_mse": ("#8a93a3", "v", ":"),
    "lsq": ("#cf4f76", "s", "--"),
    "lsq_plus": ("#d99a0b", "D", "--"),
    "qdetr": ("#0e8f7e", "^", "-."),
    "aqdetr": ("#2563eb", "o", "-"),
}
"""Colour, marker and line of a method."""
TRAINED = ("lsq", "lsq_plus", "qdetr", "aqdetr")
"""Those of them that are trained."""


def points(rows: Rows, family: str, method: str) -> list[tuple[int, float, float, float]]:
    """(bits, mean AP in percent, its standard deviation over seeds, KiB) of a method."""
    found = []
    for bits in sorted({r["facts"]["bits"] for r in rows} - {32}, reverse=True):
        some = of(rows, family=family, method=method, bits=bits)
        values = [100 * r["AP"] for r in some]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            size = statistics.mean(r.get("packed_bytes") or 0 for r in some) / 1024
            found.append((bits, statistics.mean(values), spread, size))
    return found


def main_figure(rows: Rows) -> Any:
    """AP against bits (above) and against the size of the packed model, a column a family."""
    figure = new_figure(len(FAMILIES), 2, "", "light", width=4.6, height=3.2)
    for column, (family, title) in enumerate(FAMILIES.items()):
        whole = of(rows, family=family, method="float")
        for line, (axis, what) in enumerate(((0, "bits"), (3, "KiB, packed"))):
            axes = figure.add_subplot(2, len(FAMILIES), line * len(FAMILIES) + column + 1)
            style_panel(axes, f"{title}: AP, by {what}", "light")
            _lines(axes, rows, family, axis)
            if whole:
                axes.axhline(100 * whole[0]["AP"], color="#3d4757", lw=1.2, label="float")
            if axis == 0:
                axes.set_xlim(4.3, 1.7)
                axes.set_xticks((4, 3, 2))
    panels = figure.axes
    # One legend for all panels, each of which may lack a method.
    named = dict(
        pair
        for axes in panels
        for pair in zip(*reversed(axes.get_legend_handles_labels()), strict=True)
    )
    if named:
        order = sorted(named, key=list(NAMES.values()).index)
        add_legend(panels[0], "light", [named[name] for name in order], order, columns=1)
    return figure


def _lines(axes: Axes, rows: Rows, family: str, axis: int) -> None:
    for method in LOOKS:
        found = points(rows, family, method)
        if axis == 3 and not all(point[3] for point in found):
            continue
        if found:
            xs, means, spreads = ([point[i] for point in found] for i in (axis, 1, 2))
            _drawn(axes, method, xs, means, spreads)


def _drawn(
    axes: Axes, method: str, xs: Sequence[float], means: Sequence[float], spreads: Sequence[float]
) -> None:
    """A method's line with its spread over seeds."""
    color, marker, style = LOOKS[method]
    look = dict(color=color, marker=marker, ls=style, lw=1.6, ms=5, capsize=3)
    axes.errorbar(xs, means, spreads, label=NAMES[method], **look)


def classes_figure(rows: Rows, methods: Sequence[str] = ("lsq", "aqdetr")) -> Any:
    """What each class loses against float, in points of AP; a panel a family and number of bits."""
    every = sorted({r["facts"]["bits"] for r in rows} - {32}, reverse=True)
    figure = new_figure(len(FAMILIES), len(every), "", "light", width=4.6, height=2.6)
    for line, bits in enumerate(every):
        for column, (family, title) in enumerate(FAMILIES.items()):
            axes = figure.add_subplot(len(every), len(FAMILIES), line * len(FAMILIES) + column + 1)
            style_panel(axes, f"{title}, {bits} bits: AP less than float", "light")
            whole = of(rows, family=family, method="float")
            if not whole:
                continue
            names = list(whole[0]["per_class"])
            for place, method in enumerate(methods):
                some = of(rows, family=family, method=method, bits=bits)
                if not some:
                    continue
                losses = [
                    100
                    * (
                        whole[0]["per_class"][name]["AP"]
                        - statistics.mean(r["per_class"][name]["AP"] for r in some)
                    )
                    for name in names
                ]
                color = LOOKS[method][0]
                axes.bar(
                    [i + (place - (len(methods) - 1) / 2) * 0.4 for i in range(len(names))],
                    losses,
                    0.36,
                    color=color,
                    hatch="" if place else "///",
                    edgecolor="white",
                    label=NAMES[method],
                )
            axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
            axes.tick_params(axis="x", labelcolor=palette.theme("light").ink)
            handles, labels = axes.get_legend_handles_labels()
            if line == column == 0 and labels:
                add_legend(axes, "light", handles, labels, columns=1)
    return figure


@functools.lru_cache
def _steps(config: str, overrides: tuple[str, ...]) -> int:
    return load_experiment(config, overrides).train.steps


def minutes(row: Mapping[str, Any], cost: Mapping[str, Any]) -> float:
    """How long a row trains: its steps times the step that ``cost_shapes.py`` measured."""
    words = [word.removeprefix("--config") for word in row["command"].split()]
    config = next(word[1:] for word in words if word.startswith("="))
    overrides = tuple(word[1:] for word in words if word.startswith(".train.steps="))
    facts = row["facts"]
    measured = cost["families"][facts["family"]]["methods"]
    method = facts["method"].removesuffix("_longer")
    return _steps(config, overrides) * measured[method]["median_seconds"] / 60


def time_figure(rows: Rows, cost: Mapping[str, Any], bits: int = 4) -> Any:
    """AP against training time, rows of all schedules together; a panel a family."""
    figure = new_figure(len(FAMILIES), 1, "", "light", width=4.6, height=3.2)
    for number, (family, title) in enumerate(FAMILIES.items(), start=1):
        axes = figure.add_subplot(1, len(FAMILIES), number)
        style_panel(axes, f"{title}, {bits} bits: AP, by minutes of training", "light")
        for method in LOOKS:
            by_time: dict[float, list[float]] = {}
            for name in (method, f"{method}_longer") if method in TRAINED else ():
                for row in of(rows, family=family, method=name, bits=bits):
                    by_time.setdefault(minutes(row, cost), []).append(100 * row["AP"])
            if by_time:
                times, values = zip(*sorted(by_time.items()), strict=True)
                means = [statistics.mean(v) for v in values]
                spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
                _drawn(axes, method, times, means, spreads)
        whole = of(rows, family=family, method="float")
        if whole:
            axes.axhline(100 * whole[0]["AP"], color="#3d4757", lw=1.2, label="float")
        handles, labels = axes.get_legend_handles_labels()
        if number == 1 and labels:
            add_legend(axes, "light", handles, labels, columns=1)
    return figure


def write_pictures(
    folder: Path,
    result: Mapping[str, Any] | None,
    long: Mapping[str, Any] | None,
    cost: Mapping[str, Any] | None,
) -> None:
    """Pictures of what was run.

    Args:
      folder: of the pictures.
      result: of ``main_shapes.py``: ``main_shapes.png`` and ``classes_shapes.png``.
      long: of ``long_shapes.py``, more points of ``time_shapes.png``.
      cost: of ``cost_shapes.py``, without which that is not drawn.
    """
    if result is None:
        return
    rows = result["rows"]
    save_figure(main_figure(rows), folder / "main_shapes.png")
    save_figure(classes_figure(rows), folder / "classes_shapes.png")
    if cost is not None:
        every = [*rows, *(long["rows"] if long else ())]
        save_figure(time_figure(every, cost), folder / "time_shapes.png")
