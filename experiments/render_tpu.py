"""The tables of docs/plan.md, from what was compiled ahead of time; see ``render_results``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from results_files import commits_in

NOT_RUN = "not run"
_GIB = 2**30


def step_table(result: list[dict[str, Any]] | None) -> str:
    """What a step moves and holds: every program once, its labels (before, after) side by side."""
    if result is None:
        return f"`python experiments/tpu_step.py`: {NOT_RUN}."
    labels = list(dict.fromkeys(row["label"] for row in result))
    programs: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in result:
        key = (row["config"], row["kind"], row["dtype"], row["per_chip"], row["topology"])
        programs.setdefault(key, {})[row["label"]] = row

    def hbm(row: dict[str, Any]) -> str:
        return f"{row['hbm_gib']:.1f}" + ("" if row["fits"] else " (!)")

    def moved(row: dict[str, Any]) -> str:
        return f"{row['gb_per_image']:.1f}"

    def cells(found: dict[str, dict[str, Any]], show: Callable[[dict[str, Any]], str]) -> str:
        return " → ".join(show(found[x]) if x in found else NOT_RUN for x in labels)

    lines = [
        f"Labels: {' → '.join(labels)}.",
        "",
        "| config | step | dtype | images a chip | HBM GiB | GB an image | all-reduces in loops | "
        "instructions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (config, kind, dtype, count, topology), found in sorted(programs.items()):
        lines.append(
            f"| `{config}` on {topology} | {kind} | {dtype} | {count} | "
            f"{cells(found, hbm)} | {cells(found, moved)} | "
            f"{cells(found, lambda x: str(x['all_reduces_in_loops']))} | "
            f"{cells(found, lambda x: format(x['instructions'], ','))} |"
        )
    commits = "; ".join(
        f"{label} {commits_in(rows)}"
        for label in labels
        for rows in [[row for row in result if row["label"] == label]]
    )
    versions = result[-1]["versions"]
    return "\n".join(
        [
            *lines,
            "",
            f"(!) more than the chip has. `python experiments/tpu_step.py`, bucket 800 x 1344, jax "
            f"{versions['jax']}, libtpu {versions.get('libtpu', 'unknown')}; commits: {commits}.",
        ]
    )


def chip_rate(row: dict[str, Any]) -> float:
    """Images a second a chip at most, of a plan's row, over its buckets."""
    steps = [step["estimate"] for step in row["steps"] if step["kind"] == "train"]
    return len(steps) / sum(1 / step["images_per_second_a_chip_at_most"] for step in steps)


def plan_table(result: list[dict[str, Any]] | None) -> str:
    """What slices give the recipes."""
    if result is None:
        return f"`python experiments/tpu_plan.py`: {NOT_RUN}."
    lines = [
        "| config | slice | chips | images a chip | batch | HBM GiB | fits | bound by | images/s a "
        "chip at most | hours at least | chip-hours |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    buckets = []
    for row in sorted(result, key=lambda x: (x["config"], x["chips"], x["topology"])):
        steps = [step for step in row["steps"] if step["kind"] == "train"]
        fullest = max(steps, key=lambda step: step["hbm_bytes"])
        rate = chip_rate(row)
        time = row["schedule"]
        hours = (
            f"{time['hours_at_least']:.1f} | {time['chip_hours_at_least']:,.0f}"
            if time
            else "– | –"
        )
        lines.append(
            f"| `{row['given']}` | {row['topology']} | {row['chips']} | {row['per_chip']} | "
            f"{row['batch']} | {fullest['hbm_bytes'] / _GIB:.1f} | "
            f"{'yes' if row['fits'] else 'no'} | {fullest['estimate']['bound_by']} | {rate:.1f} | "
            f"{hours} |"
        )
        if len(steps) > 1:
            sizes = ", ".join(
                f"{s['bucket'][0]}x{s['bucket'][1]} {s['hbm_bytes'] / _GIB:.1f} GiB, "
                f"{s['traffic_bytes'] / 1e9 / s['per_chip']:.1f} GB an image"
                for s in steps
            )
            buckets.append(f"`{row['given']}` on {row['topology']} by bucket: {sizes}.")
    commits = commits_in(result)
    return "\n".join(
        [
            *lines,
            "",
            *buckets,
            "",
            "Rates and hours are estimates: a roofline's bounds, no measurements. "
            f"`python experiments/tpu_plan.py`, commits: {commits}.",
        ]
    )


def whole_text(result: list[dict[str, Any]] | None) -> str:
    """What compiling a step to its end costs."""
    command = "`python experiments/tpu_plan.py --whole`"
    if result is None:
        return f"{command}: {NOT_RUN}."
    lines = [
        "| config | slice | bucket | instructions | code, GiB | HBM with it, GiB | CPU minutes | "
        "memory of the compiler, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(result, key=lambda x: x["given"]):
        (step,), cost = row["steps"], row["compiler"]
        height, width = step["bucket"]
        lines.append(
            f"| `{row['given']}` | {row['topology']} | {height} x {width} | "
            f"{step['instructions']:,} | {step['hbm_parts_bytes']['code'] / _GIB:.2f} | "
            f"{step['hbm_bytes'] / _GIB:.1f} | {cost['cpu_seconds'] / 60:.0f} | "
            f"{cost['peak_bytes'] / _GIB:.1f} |"
        )
    commits = commits_in(result)
    versions = result[0]["versions"]
    commands = ", ".join(f"`{text}`" for text in dict.fromkeys(row["command"] for row in result))
    lines += [
        "",
        f"{commands}; jax {versions['jax']}, libtpu {versions.get('libtpu', 'unknown')}; commits: "
        f"{commits}.",
    ]
    return "\n".join(lines)


def sampling_table(result: dict[str, Any] | None) -> str:
    """Ways to sample, side by side."""
    if result is None:
        return f"`python experiments/deformable_tpu.py`: {NOT_RUN}."
    lines = [
        "| attention | way | GB moved, float32 | GB moved, bfloat16 | MiB held, float32 | "
        "MiB held, bfloat16 |",
        "|---|---|---|---|---|---|",
    ]
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault((row["attention"], row["way"]), {})[row["dtype"]] = row
    for (attention, way), rows in sorted(found.items()):
        cells = [
            str(rows[dtype][key]) if dtype in rows else NOT_RUN
            for key in ("gb", "temporary_mib")
            for dtype in ("float32", "bfloat16")
        ]
        lines.append(f"| {attention} | {way} | {' | '.join(cells)} |")
    commits = commits_in(result["rows"])
    versions = result["versions"]
    return "\n".join(
        [
            *lines,
            "",
            "Samples, quantizers and weighted sum of one attention of one image, 800 x 1344, "
            "forward and gradient, compiled for one v5e chip; what stays in vector memory is not "
            "counted, and what a gathered row costs is not in it. "
            "`python experiments/deformable_tpu.py`, jax "
            f"{versions['jax']}, libtpu {versions['libtpu']}; commits: {commits}.",
        ]
    )
