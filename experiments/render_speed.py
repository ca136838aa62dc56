"""Tables of time: training steps, sampling, the matcher, full-size steps."""

from __future__ import annotations

import statistics
from typing import Any

from outside.table import outside_table
from results_files import load, short


def step_time_table() -> str:
    """Ratios of the step-time benchmark."""
    result = load("step_time.json")
    if result is None:
        return "**Step time**: not run."
    lines = [
        f"**Step time**, device {result['device']}, commit `{short(result['commit'])}`, side by "
        "side in one process:",
        "",
        "| config | variant | ratio to float | ratio to the first model's | median ms | compile s "
        "| temporaries MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = []
    for found in result["configs"]:
        height, width = found["image"]
        for name, row in found["variants"].items():
            lines.append(
                f"| {found['config']} | {name} | {row['ratio_to_float']:.2f} | "
                f"{row['ratio_to_first']:.2f} | {row['median_seconds'] * 1e3:.0f} | "
                f"{row['compile_seconds']:.0f} | {row['temporary_bytes'] / 2**20:.0f} |"
            )
        shares = ", ".join(f"{k} {v:.1%}" for k, v in found["share_of_whole_step"].items())
        notes.append(
            f"`{found['config']}`: batch {found['batch']}, {height}x{width}; shares of the whole "
            f"step: {shares}."
        )
    peak = result["peak_resident_bytes"] / 2**30
    notes.append(f"Peak {peak:.1f} GiB resident for all.")
    return "\n".join([*lines, "", *notes, "", *outside_table(result.get("outside"))])


def per_minute_table() -> str:
    """AP and training time of both families."""
    result = load("deformable_per_minute.json")
    if result is None:
        return "**AP per minute of training**: not run."
    lines = [
        f"**AP per minute of training**, embedded set, device {result['device']}, commit "
        f"`{short(result['commit'])}`, all steps side by side in one process:",
        "",
        "| family | model | AP | steps x batch | ms a step | minutes | AP a minute |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['family']} | {row['model']} | {row['AP']:.3f} | {row['steps']} x "
            f"{row['batch']} | {row['median_seconds'] * 1e3:.0f} | {row['minutes']:.1f} | "
            f"{row['AP_per_minute']:.4f} |"
        )
    for row in result["rows"]:
        if row["curve"]:
            points = ", ".join(f"{p['AP']:.3f} ({p['minutes']:.0f} min)" for p in row["curve"])
            lines += ["", f"{row['family']}, {row['model']}, on the way: {points}."]
    return "\n".join(
        [*lines, "", "`python experiments/per_minute.py`; a student starts from its float teacher."]
    )


def sampling_table() -> str:
    """Ways to sample for deformable attention."""
    result = load("deformable_sampling.json")
    if result is None:
        return "**Deformable sampling**: not run."
    lines = [
        f"**Deformable sampling**, {result['cores']} cores of {result['device']}, commit "
        f"`{short(result['commit'])}`, side by side in one process; ratios are to the plain "
        "gather, bytes are temporaries of forward plus gradient:",
        "",
        "| case | way | forward ms | ratio | with gradient ms | ratio | MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, found in result["cases"].items():
        for way, row in found["methods"].items():
            if isinstance(row, str):
                lines.append(f"| {case} | {way} | {row} | | | | |")
                continue
            times = " | ".join(
                f"{statistics.median(row[f'{kind}_seconds']) * 1e3:.1f} | "
                f"{row[f'{kind}_ratio_to_gather']:.2f}"
                for kind in ("forward", "gradient")
            )
            here = row.get("gradient_temporary_bytes")
            cells = "–" if here is None else f"{here / 2**20:.0f}"
            lines.append(f"| {case} | {way} | {times} | {cells} |")
    return "\n".join([*lines, "", "`python experiments/deformable_sampling.py`."])


def matcher_table() -> str:
    """The matcher, before and after its bids and its kernel."""
    result = load("matcher.json")
    if result is None:
        return "**Matcher**: not run."
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault((row["case"], row["costs"], row["boxes"]), []).append(row)
    before, after = (next(iter(found.values()))[i]["commit"] for i in (0, -1))
    lines = [
        f"**Matcher**, commit `{short(before)}` → `{short(after)}`: a step's problems at 4 images "
        "a chip (shapes: 16), the fullest image with so many boxes; estimates of a v5e chip from "
        "the compilers' own cycles (`experiments/matcher.py`), nothing was run on one:",
        "",
        "| case | costs | boxes | iterations | CPU ms | SciPy's | ms on a v5e, estimated |",
        "|---|---|---|---|---|---|---|",
    ]
    for (case, costs, boxes), rows in found.items():
        old, new = rows[0], rows[-1]
        chips = [row["v5e_ms_estimated"] for row in (old, new) if "v5e_ms_estimated" in row]
        lines.append(
            f"| {case} | {costs} | {boxes} | {old['iterations']} → {new['iterations']} | "
            f"{old['cpu_ms']:.2f} → {new['cpu_ms']:.2f} | {new['scipy_cpu_ms']:.2f} | "
            f"{' → '.join(f'{ms:.2f}' for ms in chips) or '–'} |"
        )
    return "\n".join(lines)


def full_size_table(name: str) -> str:
    """A full-size step."""
    result = load(name)
    if result is None:
        return f"**Full-size step** (`{name}`): not run."
    seconds = result["seconds"]
    return (
        f"**Full size**: one training step of `{result['config']}` at "
        f"{result['image'][0]}x{result['image'][1]}, batch {result['batch']}, with teacher and "
        f"{result['auxiliary_queries']} auxiliary queries, on this CPU: {seconds['step']} s, "
        f"compiled in {seconds['compile']} s, "
        f"peak {result['peak_resident_bytes'] / 2**30:.1f} GiB resident "
        f"(`experiments/full_size_step.py`, `experiments/results/{name}`, commit "
        f"`{short(result['commit'])}`). Trainable "
        f"parameters in the official recipe: {result['trainable_parameters_official_recipe']:,}."
    )
