"""What the parts of ``accelerator_run.sh`` share: who has the device, and the file of results.

python experiments/accelerator_rows.py tests LOG OUT.json      (pytest's -v output as JSON)
python experiments/accelerator_rows.py show OUT                (what a folder of results says)

The programs that compile do so side by side; a program that measures has the device alone. A row is
written as soon as it is there, and whatever follows from the rows is worked out again each time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aqdetr_jax.io import read_json, write_json_atomic

GOALS = {
    "float_over_theirs": (1.5, "at least", "images/s of our float step over transformers' best"),
    "lsq_over_float": (1.3, "at most", "seconds of the 4-bit step over the float step"),
    "everything_over_float": (1.7, "at most", "auxiliary queries, teacher, distillation too"),
    "matcher_of_float": (0.02, "at most", "matcher alone over the float step, object queries"),
}
"""Ratio of a family -> (goal, which side of it is good, what it is)."""
WARM_UP, ROUNDS, SECONDS = 2, 12, 4.0
"""Rounds not kept; rounds kept at most; seconds after which five are enough (or four times as many
seconds for a single one)."""


class Device:
    """One device between processes: compiled for by many at a time, measured by one alone.

    Args:
      file: lock file, the same for all.
      deadline: seconds from now after which this process gives up compiling, and ends.
    """

    def __init__(self, file: str | Path, deadline: float):
        self.file, self.deadline = Path(file), deadline
        self.file.parent.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def compiling(self, late: Callable[[], None]) -> Iterator[None]:
        """Shared with others that compile; ``late`` is called before the process is ended."""

        def end() -> None:
            late()
            os._exit(124)

        timer = threading.Timer(self.deadline, end)
        timer.daemon = True
        timer.start()
        try:
            with self._locked(fcntl.LOCK_SH):
                yield
        finally:
            timer.cancel()

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Waits until nobody compiles or measures."""
        return self._locked(fcntl.LOCK_EX)

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        with open(self.file, "a") as file:
            fcntl.flock(file, how)
            say("has the device" if how == fcntl.LOCK_EX else "compiles")
            yield  # closing the file, or the end of the process, unlocks it


def say(what: str) -> None:
    """A line of the log, with the seconds since the process began to count."""
    print(f"{time.monotonic() - _BEGUN:.1f} s: {what}", flush=True)


_BEGUN = time.monotonic()


def timed_rounds(step: Callable[[], object], finish: Callable[[object], None]) -> list[float]:
    """Seconds of each round of ``step``, each waited for by ``finish``."""
    seconds: list[float] = []
    begun = time.perf_counter()
    for number in range(WARM_UP + ROUNDS):
        passed = time.perf_counter() - begun
        if (len(seconds) >= 5 and passed > SECONDS) or (seconds and passed > 4 * SECONDS):
            break
        start = time.perf_counter()
        finish(step())
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    return seconds


def timing(seconds: list[float], batch: int) -> dict[str, Any]:
    """The figures of a row from the seconds of its rounds."""
    median = statistics.median(seconds)
    return {
        "median_seconds": round(median, 6),
        "images_per_second": round(batch / median, 2),
        "seconds": [round(s, 6) for s in seconds],
    }


def add_row(out: str | Path, name: str, row: dict[str, Any]) -> None:
    """Puts a row into the file of results, and works out the ratios again."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = read_json(out)["rows"] if out.is_file() else {}
        rows[name] = row
        rows = dict(sorted(rows.items()))
        write_json_atomic(out, {"ratios": ratios(rows), "rows": rows})


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the rows of each family say beside the goals, as far as they are there."""
    found: dict[str, Any] = {}
    for family in sorted({name.partition("/")[0] for name in rows}):
        seconds = {
            name.partition("/")[2]: row["median_seconds"]
            for name, row in rows.items()
            if name.startswith(f"{family}/")
            and "median_seconds" in row
            and min(row["image"]) >= 800  # of a toy's ratios nothing follows
        }
        theirs = [s for name, s in seconds.items() if name.startswith("theirs ")]
        ours, whole = seconds.get("float recipe"), seconds.get("float")
        values: dict[str, float] = {}
        if ours and theirs:
            values["float_over_theirs"] = min(theirs) / ours
        for key, name in (("lsq_over_float", "lsq"), ("everything_over_float", "everything")):
            if whole and name in seconds:
                values[key] = seconds[name] / whole
        matcher = rows.get(f"{family}/float", {}).get("matcher")
        if matcher and whole:
            values["matcher_of_float"] = max(matcher.values()) / whole
        found[family] = {key: _judged(key, value) for key, value in values.items()}
    return found


def _judged(key: str, value: float) -> dict[str, Any]:
    goal, side, what = GOALS[key]
    reached = value >= goal if side == "at least" else value <= goal
    return {"value": round(value, 4), "goal": f"{side} {goal}", "reached": reached, "what": what}


def tests_json(log: Path, out: Path) -> None:
    """The outcome of every test that pytest's -v output names, a cut-off one too."""
    outcomes: dict[str, str] = {}
    for line in log.read_text(errors="replace").splitlines():
        # "tests/a.py::b PASSED [ 3%]", or under xdist "[gw0] [ 3%] PASSED tests/a.py::b"
        found = re.match(r"(?:\[gw\d+\] \[ *\d+%\] )?(.*)", line)
        words = re.fullmatch(r"(PASSED|FAILED|ERROR|SKIPPED) (tests/\S+::.+?) *", found[1])
        if words:
            outcomes[words[2]] = words[1].lower()
            continue
        words = re.match(r"(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", found[1])
        if words:
            outcomes[words[1]] = words[2].lower()
    counts = {kind: list(outcomes.values()).count(kind) for kind in sorted(set(outcomes.values()))}
    failed = {name: kind for name, kind in outcomes.items() if kind in ("failed", "error")}
    finished = bool(re.search(r"^=.* in [\d.]+s", log.read_text(errors="replace"), re.M))
    write_json_atomic(
        out, {"counts": counts, "finished": finished, "failed": failed, "outcomes": outcomes}
    )
    print("tests:", counts, "" if finished else "(cut off)", *failed)


def show(folder: Path) -> None:
    """One line for each row and ratio."""
    steps = folder / "steps.json"
    if not steps.is_file():
        return
    result = read_json(steps)
    for name, row in result["rows"].items():
        if "median_seconds" not in row:
            print(f"{name:40s} {row.get('failed', '')}")
            continue
        print(
            f"{name:40s} {row['median_seconds'] * 1e3:9.2f} ms {row['images_per_second']:8.1f} "
            f"images/s {row.get('peak_bytes', 0) / 2**30:6.1f} GiB"
        )
    for family, values in result["ratios"].items():
        for key, value in values.items():
            word = "reached" if value["reached"] else "not reached"
            print(f"{family:12s} {key:24s} {value['value']:7.3f} (goal {value['goal']}: {word})")


if __name__ == "__main__":
    if sys.argv[1] == "tests":
        tests_json(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        show(Path(sys.argv[2]))
