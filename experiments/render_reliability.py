"""Figures of docs/reliability.md from what ``kill_points.py`` wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from results_files import short


def kill_points_text(killed: dict[str, Any] | None, stopped: dict[str, Any] | None) -> str:
    """What came of killed runs, and of runs that were asked to stop."""
    lines = []
    for result, command in ((killed, ""), (stopped, " --signal=TERM")):
        text = f"`experiments/kill_points.py{command}`: "
        if result is None:
            lines.append(f"{text}not run.")
            continue
        lines.append(text + (_stopped(result) if command else _killed(result)))
    return "\n\n".join(lines)


_AN = {"step": "a step", "save": "a save", "evaluation": "an evaluation"}


def _killed(result: dict[str, Any]) -> str:
    points = result["points"]
    phases = Counter(point["phase"] for point in points)
    equal = sum(all(point["equal"].values()) for point in points)
    moments = ", ".join(f"{n} in {_AN[phase]}" for phase, n in phases.items())
    text = f"{len(points)} random points ({moments}); {equal} runs went on to the same bits."
    seconds = [
        point["ended"]["seconds"][1 - point["victim"]] for point in points if point["kind"] == "two"
    ]
    if seconds:
        text += (
            f" In {len(seconds)} of them one of two processes was killed; the other ended by "
            f"itself after {min(seconds):.0f} to {max(seconds):.0f} s."
        )
    return f"{text} {_where(points, result)}"


def _stopped(result: dict[str, Any]) -> str:
    points = result["points"]
    ended = [point for point in points if 75 in point["ended"]["status"]]
    seconds = [max(point["ended"]["seconds"]) for point in ended]
    equal = sum(all(point["equal"].values()) for point in points)
    text = f"{len(points)} random points; {equal} runs went on to the same bits."
    if seconds:
        median = sorted(seconds)[len(seconds) // 2]
        took = result["seconds_of"]["one"]
        text += (
            f" {len(ended)} stopped with status 75, {median:.0f} s after the signal in the median "
            f"and {max(seconds):.0f} s at most (steps of {took['step']:.1f} s "
            f"and saves of {took['save']:.1f} s, on two busy cores)."
        )
    return f"{text} {_where(points, result)}"


def _where(points: list[dict[str, Any]], result: dict[str, Any]) -> str:
    stored = sum(point["kind"] == "store" for point in points)
    where = "Work directories: on a disk"
    if stored:
        where += f", {stored} of them in an object store (an emulator)"
    return f"{where}; commit `{short(result['commit'])}`."


def rerun_text(result: Mapping[str, Any] | None) -> str:
    """A row that was done again from its manifest."""
    if result is None:
        return "A row done again from its manifest: not run."
    run = result["run"]
    model = "equal to the last bit" if result["model"] else "another"
    if result["results"]:
        values = (f"{name} {then} -> {now}" for name, (then, now) in result["results"].items())
        numbers = f"results differ: {', '.join(values)}"
    else:
        numbers = "all its results the same"
    starts = f", in {run['starts']} starts" if run["starts"] > 1 else ""
    command = f"aqdetr rerun {run['manifest']} --workdir=DIR"
    text = (
        f"A row done again from its manifest (`{command}`, commit `{short(run['commit'])}`): "
        f"`{run['name']}`, seed {run['seed']}, AP {run['AP']:.4f} by its own evaluation"
        f"{starts}. The model is {model}, {numbers}"
    )
    other = result["environment"]
    return f"{text}; another than then: {', '.join(other)}." if other else f"{text}."
