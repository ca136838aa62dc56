"""Tables of studies: means over seeds, and pairs of methods compared image by image."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aqdetr_jax.viz.curves import capacity_curves, save_figure

NAMES = {
    "float": "float",
    "ptq_minmax": "calibrated, min-max",
    "ptq_percentile": "calibrated, percentile",
    "ptq_mse": "calibrated, MSE",
    "lsq": "LSQ",
    "lsq_plus": "LSQ+",
    "qdetr": "Q-DETR",
    "auxiliary": "LSQ + auxiliary queries",
    "distill": "LSQ + distillation",
    "aqdetr": "AQ-DETR (both)",
}
FAMILIES = {"detr": "DETR", "deformable": "Deformable DETR"}
SURE = 0.95
"""Share of the draws from which on a difference is called one."""


def of(rows: Sequence[Mapping[str, Any]], **facts: Any) -> list[Mapping[str, Any]]:
    """Rows with these facts, by seed."""
    found = [r for r in rows if all(r["facts"].get(k) == v for k, v in facts.items())]
    return sorted(found, key=lambda row: row["facts"].get("seed", 0))


def mean_and_spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def comparison(
    rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Two methods on the seeds that both have.

    Returns:
      "difference" of the means; "better", the share of draws of images in which the mean over seeds
      is higher, of equals half; "wins" and "seeds"; None if they share no seed.
    """
    left, right = ({r["facts"].get("seed", 0): r for r in some} for some in (rows, others))
    seeds = sorted(left.keys() & right.keys())
    if not seeds:
        return None
    draws = np.mean([np.subtract(left[s]["AP_draws"], right[s]["AP_draws"]) for s in seeds], axis=0)
    return {
        "difference": statistics.mean(left[s]["AP"] - right[s]["AP"] for s in seeds),
        "better": float(np.mean(draws > 0) + np.mean(draws == 0) / 2),
        "wins": sum(left[s]["AP"] > right[s]["AP"] for s in seeds),
        "seeds": len(seeds),
    }


def verdict(found: Mapping[str, Any] | None) -> str:
    """A comparison in words."""
    if found is None:
        return "not run"
    share, wins, seeds = found["better"], found["wins"], found["seeds"]
    if share >= SURE and wins == seeds:
        word = "better"
    elif share <= 1 - SURE and wins == 0:
        word = "worse"
    else:
        word = "no difference shown"
    return (
        f"{word}: {found['difference']:+.4f}, in {share:.0%} of the draws, on {wins} of {seeds} "
        f"seed{'s' if seeds > 1 else ''}"
    )


def main_table(title: str, result: Mapping[str, Any] | None, reference: str = "lsq") -> str:
    """Methods by bits for each family, and each method against ``reference``."""
    if result is None:
        return f"**{title}**: not run."
    rows, parts = result["rows"], []
    for family, name in FAMILIES.items():
        mine = of(rows, family=family)
        if not mine:
            continue
        bits = sorted({r["facts"]["bits"] for r in mine} - {32}, reverse=True)
        whole = of(mine, method="float")
        if not whole:
            parts.append(f"**{title}, {name}**: not run.")
            continue
        best = whole[0]["AP"]
        heads = [x for b in bits for x in (f"{b} bits", "of float", f"against {NAMES[reference]}")]
        lines = [
            f"**{title}, {name}**: AP, mean ± standard deviation over seeds; float {best:.4f}.",
            "",
            f"| method | seeds | {' | '.join(heads)} |",
            "|---" * (len(heads) + 2) + "|",
        ]
        for method, label in NAMES.items():
            if method == "float" or not of(mine, method=method):
                continue
            cells, count = [], 0
            for b in bits:
                found = of(mine, method=method, bits=b)
                if not found:
                    cells += ["not run", "", ""]
                    continue
                values = [r["AP"] for r in found]
                count = max(count, len(values))
                pair = comparison(found, of(mine, method=reference, bits=b))
                cells += [
                    mean_and_spread(values),
                    f"{statistics.mean(values) / best:.1%}",
                    "–" if method == reference else verdict(pair),
                ]
            lines.append(f"| {label} | {count} | {' | '.join(cells)} |")
        lines += ["", commits_of(mine)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def commits_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The commits of some rows, in twelve digits; that one was dirty stays said."""
    commits = sorted({r["commit"][:12] + r["commit"][40:] for r in rows})
    return f"Commits {', '.join(commits)}."


SCHEDULES = {
    "plain": "as it is (moving average evaluated)",
    "raw": "without the moving average",
    "backbone_first": "a third with only the backbone quantized (Q-DETR's first stage)",
    "backbone_alone": "a third with only the backbone quantized and trained",
    "steps_last": "a last tenth of steps, offsets and shifts, from the average",
}


def effects_table(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    lines: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, Mapping[str, Any]],
    reference: Mapping[str, Any],
    against: str,
) -> str:
    """What a choice does: AP, and each line compared with the reference's of its column.

    Args:
      title: of the table.
      rows: of one study or more.
      lines: facts by label.
      columns: facts by label; rows have a line's and a column's.
      reference: facts of the line that the others stand against.
      against: its name in the heads.
    """
    heads = " | ".join(f"{label} | against {against}" for label in columns)
    text = [f"**{title}**: AP, mean ± standard deviation over seeds.", ""]
    text += [f"| | seeds | {heads} |", "|---" * (2 * len(columns) + 2) + "|"]
    shown = []
    for label, facts in lines.items():
        cells, seeds = [], 0
        for column in columns.values():
            found = of(rows, **facts, **column)
            shown += found
            if not found:
                cells += ["not run", ""]
                continue
            seeds = max(seeds, len(found))
            pair = comparison(found, of(rows, **reference, **column))
            cells.append(mean_and_spread([r["AP"] for r in found]))
            cells.append("–" if facts == reference else verdict(pair))
        text.append(f"| {label} | {seeds} | {' | '.join(cells)} |")
    return "\n".join([*text, "", commits_of(shown)])


def schedules_table(title: str, result: Mapping[str, Any] | None) -> str:
    """Schedules by method and bits, each against the plain one."""
    if result is None:
        return f"**{title}**: not run."
    kinds = sorted({(-r["facts"]["bits"], r["facts"]["method"]) for r in result["rows"]})
    kinds = sorted(kinds, key=lambda kind: (kind[0], list(NAMES).index(kind[1])))
    columns = {
        f"{NAMES[method]}, {-bits} bits": {"method": method, "bits": -bits}
        for bits, method in kinds
    }
    lines = {label: {"schedule": name} for name, label in SCHEDULES.items()}
    reference = {"schedule": "plain"}
    return effects_table(title, result["rows"], lines, columns, reference, "plain")


PLACES = {
    "lsq": "no distillation (LSQ)",
    "encoder": "encoder, probabilities",
    "decoder": "decoder, probabilities",
    "both": "both, probabilities",
    "both_logits": "both, logits",
    "both_output": "both, outputs",
    "both_float_path": "both, probabilities, of the float path",
}


def distill_table(
    title: str, result: Mapping[str, Any] | None, main: Mapping[str, Any] | None
) -> str:
    """Where to distil, what, and from whom, each against LSQ of the main study."""
    if result is None:
        return f"**{title}**: not run."
    plain = of(main["rows"], method="lsq", bits=4) if main else []
    seeds = {row["facts"]["seed"] for row in result["rows"]}
    rows = [*result["rows"], *(row for row in plain if row["facts"]["seed"] in seeds)]
    lines = {label: {"method": name} for name, label in PLACES.items()}
    columns = {label: {"family": name} for name, label in FAMILIES.items() if of(rows, family=name)}
    return effects_table(title, rows, lines, columns, {"method": "lsq"}, "LSQ")


def positives_table(title: str, result: Mapping[str, Any] | None) -> str:
    """AP by auxiliary queries and how often each box is given to them."""
    if result is None:
        return f"**{title}**: not run."
    kinds = sorted({(r["facts"]["M"], r["facts"]["K"]) for r in result["rows"]})
    lines = {
        f"M = {count}, K = {repeats}" if count else "none": {"M": count, "K": repeats}
        for count, repeats in kinds
    }
    columns = {"4 bits": {"bits": 4}, "float": {"bits": 32}}
    reference = {"M": 0, "K": 0}
    return effects_table(title, result["rows"], lines, columns, reference, "none")


def operands_table(title: str, result: Mapping[str, Any] | None) -> str:
    """What few bits cost where, against 8 bits everywhere."""
    if result is None:
        return f"**{title}**: not run."
    names = dict.fromkeys(r["facts"]["method"] for r in result["rows"])
    label = {"nothing": "8 bits everywhere"}
    lines = {label.get(name, f"{name} bits"): {"method": name} for name in names}
    columns = {
        label: {"family": name}
        for name, label in FAMILIES.items()
        if of(result["rows"], family=name)
    }
    reference = {"method": "nothing"}
    return effects_table(title, result["rows"], lines, columns, reference, "8 bits")


LENGTHS = {
    "three times": "three times the quickstart's steps",
    "whole": "the whole schedule, 8000 steps",
}


def long_tables(title: str, result: Mapping[str, Any] | None) -> str:
    """The main table of each longer schedule."""
    if result is None:
        return f"**{title}**: not run."
    parts = []
    for steps, label in LENGTHS.items():
        rows = [r for r in result["rows"] if r["facts"].get("steps", steps) == steps]
        if of(rows, steps=steps):
            parts.append(main_table(f"{title}, {label}", {"rows": rows}))
    return "\n\n".join(parts)


CAPACITY = {
    "entropy": "entropy, nats",
    "effective_rank": "effective rank",
    "cosine": "mean cosine",
    "distinct": "distinct predictions",
}
DRAWN = ("float", "lsq", "qdetr", "aqdetr")
"""Methods of the picture of query capacity."""


def capacity_tables(title: str, result: Mapping[str, Any] | None) -> str:
    """Query capacity after the last decoder layer, of each family, method and number of bits."""
    if result is None:
        return f"**{title}**: not run."
    parts = []
    for family, name in FAMILIES.items():
        mine = of(result["rows"], family=family)
        if not mine:
            continue
        lines = [
            f"**{title}, {name}**: object queries after the last decoder layer, "
            f"{mine[0]['images']} images, mean ± standard deviation over seeds.",
            "",
            f"| model | bits | seeds | {' | '.join(CAPACITY.values())} | positives a step |",
            "|---" * (len(CAPACITY) + 4) + "|",
        ]
        for bits in sorted({r["facts"]["bits"] for r in mine}, reverse=True):
            for method, label in NAMES.items():
                found = of(mine, method=method, bits=bits)
                if not found:
                    continue
                cells = [
                    mean_and_spread([r["layers"][-1][key] for r in found], 2) for key in CAPACITY
                ]
                positives = [r["positives"] for r in found if "positives" in r]
                cells.append(
                    " + ".join(
                        f"{statistics.mean(p[kind] for p in positives):.0f} {kind}"
                        for kind in positives[0]
                    )
                    if positives
                    else "–"
                )
                lines.append(f"| {label} | {bits} | {len(found)} | {' | '.join(cells)} |")
        parts.append("\n".join([*lines, "", f"`{result['command']}`. {commits_of(mine)}"]))
    return "\n\n".join(parts)


def write_capacity_pictures(result: Mapping[str, Any] | None, folder: Path) -> None:
    """``capacity_FAMILY.png``: each measure by decoder layer, the mean over seeds."""
    if result is None:
        return
    for family in FAMILIES:
        rows = []
        for method in DRAWN:
            mine = of(result["rows"], family=family, method=method)
            for bits in sorted({r["facts"]["bits"] for r in mine}, reverse=True):
                found = of(mine, bits=bits)
                for layer in range(len(found[0]["layers"])):
                    means = {
                        text: statistics.mean(r["layers"][layer][key] for r in found)
                        for key, text in CAPACITY.items()
                    }
                    kind = "" if method == "float" else f"{bits} bits"
                    names = {"model": NAMES[method], "set": kind}
                    rows.append({**names, "layer": layer + 1, **means})
        figure = capacity_curves(rows)
        if figure is not None:
            save_figure(figure, folder / f"capacity_{family}.png")


def cost_tables(title: str, result: Mapping[str, Any] | None) -> str:
    """Time and memory of each method's step, and the size of what it exports."""
    if result is None:
        return f"**{title}**: not run."
    parts = []
    for family, found in result["families"].items():
        lines = [
            f"**{title}, {FAMILIES[family]}**: batch {found['batch']}, {result['device']}; ratios "
            "are to the float step of the same run.",
            "",
            "| method | step, ms | of float | memory, MiB | of float | ONNX nodes | parameters | "
            "bytes |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method, row in found["methods"].items():
            graph = row["onnx"]
            lines.append(
                f"| {NAMES[method]} | {1e3 * row['median_seconds']:.0f} | "
                f"{row['time_of_float']:.2f} | {row['step_bytes'] / 2**20:.0f} | "
                f"{row['memory_of_float']:.2f} | {graph['nodes']} | {graph['parameters']:,} | "
                f"{graph['bytes']:,} |"
            )
        same = found["same_graph"]
        names = ", ".join(NAMES[method] for method in same["methods"])
        word = "are equal" if same["equal"] else "DIFFER"
        lines += ["", f"The exported graphs of {names} {word} in nodes, parameters and bytes."]
        parts.append("\n".join(lines))
    commit = commits_of([result])
    return "\n\n".join([*parts, f"`{result['command']}`. {commit}"])
