"""Runs both sides of the cases in turn and works out the ratios."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outside.cases import CASES, ROOT, Case

PARITY = ROOT / ".venv-parity/bin/python"
"""Made by ``make test-parity``."""

NEEDED = "import numpy, onnxruntime, torch, transformers"

ROUNDS = 5

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
"""OpenMP's threads sleep while they wait. Spinning, they would take the core that the other side
computes on, and the time of whoever shares the machine."""


class Side:
    """One side of a case: a process that is alive from the first round to the last."""

    def __init__(self, python: str | Path, module: str, case: str):
        self.what = f"{case}, {module}"
        environment = {**os.environ, **PASSIVE, "TF_CPP_MIN_LOG_LEVEL": "2"}
        # What this program asked of its own allocator is not what theirs would be started with.
        environment.pop("GLIBC_TUNABLES", None)
        paths = [str(ROOT / "experiments"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self.process = subprocess.Popen(
            [python, "-m", f"outside.{module}", case],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.rows: list[dict[str, float]] = []
        self.versions: dict[str, str] = {}

    def read(self) -> dict[str, Any]:
        """The next answer.

        Raises:
          RuntimeError: the process has ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"{self.what} ended with status {code}; its error stands above")
        return json.loads(line)

    def run(self, keep: bool) -> None:
        """One round."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        row = self.read()
        if keep:
            self.rows.append(row)

    def end(self) -> None:
        """Lets the process go, whatever state it is in."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def missing(python: str | Path) -> str | None:
    """Why an interpreter cannot be the other side; None if it can."""
    try:
        found = subprocess.run([python, "-c", NEEDED], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{python}: {error.strerror}"
    if found.returncode == 0:
        return None
    return f"{python}: {(found.stderr.strip().splitlines() or ['no torch'])[-1]}"


def measure(name: str, python: str | Path, rounds: int) -> dict[str, Any]:
    """A case's row: both sides in turn, the order turned round every other time."""
    case = CASES[name]
    sides: list[Side] = []
    try:
        # One after the other: building takes more memory than running.
        for program, module in ((sys.executable, "ours"), (python, "theirs")):
            sides.append(Side(program, module, name))
            sides[-1].versions = sides[-1].read()["versions"]
        for number in range(rounds + 1):  # the first round warms up
            for side in sides if number % 2 == 0 else sides[::-1]:
                side.run(keep=number > 0)
    finally:
        for side in sides:
            side.end()
    return row_of(name, case, *sides)


def row_of(name: str, case: Case, ours: Side, theirs: Side) -> dict[str, Any]:
    """What is kept of a case."""
    row: dict[str, Any] = {
        "case": name,
        "config": case.config,
        "image": [case.height, case.width],
        "batch": case.batch,
        "goal": case.goal,
    }
    for key, side in (("ours", ours), ("theirs", theirs)):
        row[key] = {"what": getattr(case, key), "versions": side.versions}
        for kind in ("seconds", "cpu_seconds"):
            times = [r[kind] for r in side.rows]
            row[key] |= {
                kind: [round(t, 4) for t in times],
                f"median_{kind}": round(statistics.median(times), 4),
            }
    row["theirs_over_ours"] = {
        kind: round(ratio([r[kind] for r in theirs.rows], [r[kind] for r in ours.rows]), 3)
        for kind in ("seconds", "cpu_seconds")
    }
    return row


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def compare(
    python: str | Path, rounds: int = ROUNDS, names: Sequence[str] = tuple(CASES)
) -> dict[str, Any]:
    """All cases.

    Args:
      python: interpreter with torch, transformers and onnxruntime.
      rounds: kept of each case.
      names: of the cases.

    Returns:
      ``{"skipped": why}`` if the interpreter lacks them, else rounds and rows.
    """
    reason = missing(python)
    if reason is not None:
        return {"skipped": reason}
    rows = []
    for name in names:
        row = measure(name, python, rounds)
        print(line_of(row), flush=True)
        rows.append(row)
    return {"cores": len(os.sched_getaffinity(0)), "rounds": rounds, "rows": rows}


def line_of(row: dict[str, Any]) -> str:
    """A row in words."""
    found = row["theirs_over_ours"]
    return (
        f"{row['case']:16s} ours {row['ours']['median_cpu_seconds']:7.3f}, "
        f"theirs {row['theirs']['median_cpu_seconds']:7.3f} CPU-s: "
        f"theirs/ours {found['cpu_seconds']:.2f} (goal {row['goal']}), wall {found['seconds']:.2f}"
    )
