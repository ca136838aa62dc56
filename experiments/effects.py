"""What a choice does: lines that stand against one of them, as a table and as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from compared import FAMILIES, NAMES, Rows, ap_over_seeds, commits_of, comparison, of, verdict

from aqdetr_jax.viz import palette
from aqdetr_jax.viz.curves import new_figure, style_panel

Facts = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Effects:
    """A comparison.

    Attributes:
      rows: of one study or more.
      lines: facts by label.
      columns: facts by label; rows have a line's and a column's.
      reference: facts of the line that the others stand against.
      against: its name.
    """

    rows: Rows
    lines: Mapping[str, Facts]
    columns: Mapping[str, Facts]
    reference: Facts
    against: str

    def found(self, line: Facts, column: Facts) -> list[Mapping[str, Any]]:
        """The rows of a cell, by seed."""
        return of(self.rows, **{**column, **line})

    def pair(self, line: Facts, column: Facts) -> dict[str, Any] | None:
        """A cell and the one that it stands against, see ``comparison``."""
        return comparison(self.found(line, column), self.found({**line, **self.reference}, column))

    def is_reference(self, line: Facts) -> bool:
        """Whether a line is what others stand against."""
        return self.reference.items() <= line.items()


def effects_table(title: str, effects: Effects | None) -> str:
    """AP of each line, and how it compares with the reference's of its column."""
    if effects is None:
        return f"**{title}**: not run."
    heads = " | ".join(f"{label} | against {effects.against}" for label in effects.columns)
    text = [f"**{title}**: AP, mean ± standard deviation (seeds).", ""]
    text += [f"| | {heads} |", "|---" * (2 * len(effects.columns) + 1) + "|"]
    shown: list[Mapping[str, Any]] = []
    for label, line in effects.lines.items():
        cells = []
        for column in effects.columns.values():
            found = effects.found(line, column)
            shown += found
            if not found:
                cells += ["not run", ""]
                continue
            cells.append(ap_over_seeds(found))
            cells.append("–" if effects.is_reference(line) else verdict(effects.pair(line, column)))
        text.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*text, "", commits_of(shown)])


def effects_figure(effects: Effects | None) -> Any:
    """Differences to the reference with the interval of nine in ten draws of images; or None."""
    if effects is None:
        return None
    lines = {k: line for k, line in effects.lines.items() if not effects.is_reference(line)}
    drawn = {
        name: {k: effects.pair(line, column) for k, line in lines.items()}
        for name, column in effects.columns.items()
    }
    drawn = {name: some for name, some in drawn.items() if any(some.values())}
    lines = {k: line for k, line in lines.items() if any(some[k] for some in drawn.values())}
    if not drawn:
        return None
    height = 1.2 + 0.34 * len(lines)
    figure = new_figure(len(drawn), 1, "", "light", width=4.6, height=height)
    ink = palette.theme("light").ink
    for number, (name, some) in enumerate(drawn.items(), start=1):
        axes = figure.add_subplot(1, len(drawn), number)
        style_panel(axes, name, "light")
        axes.set_xlabel(f"points of AP against {effects.against}", color=ink, fontsize=9)
        axes.axvline(0, color="#8a93a3", lw=1)
        for place, pair in enumerate(some[label] for label in lines):
            if pair is None:
                continue
            low, high = (100 * x for x in pair["interval"])
            axes.plot([low, high], [place, place], color="#2563eb", lw=2, solid_capstyle="butt")
            axes.plot([100 * pair["difference"]], [place], "o", color="#2563eb", ms=5)
        axes.set_yticks(range(len(lines)), list(lines) if number == 1 else [""] * len(lines))
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.tick_params(axis="y", labelcolor=ink)
    return figure


SCHEDULES = {
    "plain": "as it is (moving average evaluated)",
    "raw": "without the moving average",
    "backbone_first": "a third with only the backbone quantized (Q-DETR's first stage)",
    "backbone_alone": "a third with only the backbone quantized and trained",
    "steps_last": "a last tenth of steps, offsets and shifts, from the average",
}


def families(rows: Rows, **facts: Any) -> dict[str, Facts]:
    """The families of some rows, as columns."""
    return {
        label: {"family": name, **facts}
        for name, label in FAMILIES.items()
        if of(rows, family=name)
    }


def ablation(result: Mapping[str, Any] | None) -> Effects | None:
    """AQ-DETR's parts alone and together, at 4 bits."""
    if result is None:
        return None
    methods = ("lsq", "lsq_longer", "auxiliary", "distill", "aqdetr")
    lines = {NAMES[name]: {"method": name} for name in methods}
    columns = families(result["rows"], bits=4)
    return Effects(result["rows"], lines, columns, {"method": "lsq"}, "LSQ")


def schedules(result: Mapping[str, Any] | None) -> Effects | None:
    """Schedules by method and bits, each against the plain one."""
    if result is None:
        return None
    kinds = sorted({(-r["facts"]["bits"], r["facts"]["method"]) for r in result["rows"]})
    kinds = sorted(kinds, key=lambda kind: (kind[0], list(NAMES).index(kind[1])))
    columns = {
        f"{NAMES[method]}, {-bits} bits": {"method": method, "bits": -bits}
        for bits, method in kinds
    }
    lines = {label: {"schedule": name} for name, label in SCHEDULES.items()}
    return Effects(result["rows"], lines, columns, {"schedule": "plain"}, "plain")


CHOICES = {
    "plain": "as it is",
    "symmetric": "symmetric grids of activations in place of centred ones",
    "zero_point": "grids with zero points in place of centred ones",
    "equal_scales": "centred grids with one scale for all channels",
    "a_tensor": "one step for all heads of an attention",
    "probabilities": "probabilities not divided by their sum",
    "lsq_start": "first steps by LSQ's formula in place of the least squared error",
    "float_sums": "float residual sums in place of 8 bits",
    "random_start": "auxiliary queries that start at random",
    "two_groups": "auxiliary queries in two groups",
    "less_decay": "a quarter of the weight decay (LSQ's at 2 bits)",
}


def choices(result: Mapping[str, Any] | None) -> Effects | None:
    """Choices undone one at a time, each against its method and bits as they are."""
    if result is None:
        return None
    kinds = [(r["facts"]["bits"], r["facts"]["method"]) for r in result["rows"]]
    lines = {
        f"{NAMES[method]}, {bits} bits: {label}": {"choice": name, "method": method, "bits": bits}
        for bits, method in dict.fromkeys(kinds)
        for name, label in CHOICES.items()
        if of(result["rows"], choice=name, method=method, bits=bits)
    }
    return Effects(result["rows"], lines, families(result["rows"]), {"choice": "plain"}, "as it is")


PLACES = {
    "lsq": "no distillation (LSQ)",
    "encoder": "encoder, probabilities",
    "decoder": "decoder, probabilities",
    "both": "both, probabilities",
    "both_logits": "both, logits",
    "both_output": "both, outputs",
    "both_float_path": "both, probabilities, of the float path",
    "both_deep": "both, probabilities, of a deeper teacher",
}


def distillation(
    result: Mapping[str, Any] | None, main: Mapping[str, Any] | None
) -> Effects | None:
    """Where to distil, what, and from whom, each against LSQ of the main study."""
    if result is None:
        return None
    plain = of(main["rows"], method="lsq", bits=4) if main else []
    seeds = {row["facts"]["seed"] for row in result["rows"]}
    rows = [*result["rows"], *(row for row in plain if row["facts"]["seed"] in seeds)]
    lines = {label: {"method": name} for name, label in PLACES.items()}
    return Effects(rows, lines, families(result["rows"]), {"method": "lsq"}, "LSQ")


def positives(result: Mapping[str, Any] | None) -> Effects | None:
    """Auxiliary queries and how often each box is given to them, against none."""
    if result is None:
        return None
    kinds = sorted({(r["facts"]["M"], r["facts"]["K"]) for r in result["rows"]})
    lines = {
        f"M = {count}, K = {repeats}" if count else "none": {"M": count, "K": repeats}
        for count, repeats in kinds
    }
    columns = {"4 bits": {"bits": 4}, "float": {"bits": 32}}
    return Effects(result["rows"], lines, columns, {"M": 0, "K": 0}, "none")


def operands(result: Mapping[str, Any] | None) -> Effects | None:
    """What few bits cost where, against 8 bits everywhere."""
    if result is None:
        return None
    names = dict.fromkeys(r["facts"]["method"] for r in result["rows"])
    label = {"nothing": "8 bits everywhere"}
    lines = {label.get(name, f"{name} bits"): {"method": name} for name in names}
    columns = families(result["rows"])
    return Effects(result["rows"], lines, columns, {"method": "nothing"}, "8 bits")
