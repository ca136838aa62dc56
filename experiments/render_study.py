"""Tables of studies: the main one, query capacity, and what a training step costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compared import (
    FAMILIES,
    NAMES,
    Rows,
    ap_over_seeds,
    commits_of,
    comparison,
    mean_and_spread,
    of,
    verdict,
)

from aqdetr_jax.viz.curves import capacity_curves, save_figure


def main_table(
    title: str, result: Mapping[str, Any] | None, planned: Rows = (), reference: str = "lsq"
) -> str:
    """Methods by bits for each family, and each method against ``reference``.

    Args:
      title: of the table.
      result: of the study; None = not run.
      planned: facts of its rows, with those that are not run yet.
      reference: a method.
    """
    if result is None:
        return f"**{title}**: not run."
    rows, parts = result["rows"], []
    for family, name in FAMILIES.items():
        mine = of(rows, family=family)
        meant = of(planned, family=family)
        if not (mine or meant):
            continue
        bits = sorted({r["facts"]["bits"] for r in (*mine, *meant)} - {32}, reverse=True)
        whole = of(mine, method="float")
        if not whole:
            parts.append(f"**{title}, {name}**: not run.")
            continue
        best = whole[0]["AP"]
        heads = [x for b in bits for x in (f"{b} bits", "of float", f"against {NAMES[reference]}")]
        on = of(mine, method="float_longer")
        floats = f"float {best:.4f}" + "".join(
            f", trained on by the same schedule {r['AP']:.4f}" for r in on
        )
        lines = [
            f"**{title}, {name}**: AP, mean ± standard deviation (seeds); {floats}.",
            "",
            f"| method | {' | '.join(heads)} |",
            "|---" * (len(heads) + 1) + "|",
        ]
        for method, label in NAMES.items():
            if method.startswith("float") or not of((*mine, *meant), method=method):
                continue
            cells = []
            for b in bits:
                found = of(mine, method=method, bits=b)
                if not found:
                    cells += ["not run" if of(meant, method=method, bits=b) else "", "", ""]
                    continue
                mean = statistics.mean(r["AP"] for r in found)
                pair = comparison(found, of(mine, method=reference, bits=b))
                cells += [
                    ap_over_seeds(found),
                    f"{mean / best:.1%}",
                    "–" if method == reference else verdict(pair),
                ]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines += ["", commits_of(mine)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


LENGTHS = {
    "three times": "three times the quickstart's steps",
    "whole": "the whole schedule, 8000 steps",
}


def long_tables(title: str, result: Mapping[str, Any] | None, planned: Rows = ()) -> str:
    """The main table of each longer schedule."""
    if result is None:
        return f"**{title}**: not run."
    parts = []
    for steps, label in LENGTHS.items():
        rows = [r for r in result["rows"] if r["facts"].get("steps", steps) == steps]
        meant = of(planned, steps=steps)
        if of(rows, steps=steps):
            parts.append(main_table(f"{title}, {label}", {"rows": rows}, meant))
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
            f"{mine[0]['images']} validation images, mean ± standard deviation over seeds.",
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
