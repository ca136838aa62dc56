"""The comparison with other libraries: its protocol, what is missing, and the ratios."""

import json
import subprocess
import sys

import pytest
from outside import compare
from outside.cases import CASES, ROOT
from outside.table import outside_table

TALKER = """
from outside.worker import serve
def build():
    print("building")
    return lambda: print("computing")
serve(build, {"library": "1.2"})
"""


def worker(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        input="\n\n",
        capture_output=True,
        text=True,
        cwd=ROOT / "experiments",
        check=True,
        timeout=1800,
    )


def test_a_worker_answers_every_line_and_nothing_else():
    answers = [json.loads(line) for line in worker(TALKER).stdout.splitlines()]
    assert answers[0] == {"versions": {"library": "1.2"}}
    assert len(answers) == 3
    assert all(row["cpu_seconds"] >= 0 and 0 < row["seconds"] < 60 for row in answers[1:])


def test_what_is_missing_is_said(tmp_path):
    nowhere = tmp_path / "python"
    assert compare.missing(nowhere) == f"{nowhere}: No such file or directory"
    error = "ModuleNotFoundError: No module named 'torch'"
    nowhere.write_text(f'#!/bin/sh\necho "{error}" >&2\nexit 1\n')
    nowhere.chmod(0o755)
    found = compare.compare(nowhere)
    assert found == {"skipped": f"{nowhere}: {error}"}
    assert found["skipped"] in outside_table(found)[0]


def test_a_side_that_ends_is_named(tmp_path):
    dead = tmp_path / "python"
    dead.write_text("#!/bin/sh\nexit 3\n")
    dead.chmod(0o755)
    side = compare.Side(dead, "theirs", "tiny_step")
    with pytest.raises(RuntimeError, match="tiny_step, theirs ended with status 3"):
        side.read()
    side.end()


class Told:
    """A side whose rounds are given."""

    def __init__(self, *cpu):
        self.versions = {"torch": "9"}
        self.rows = [{"seconds": 10 * c, "cpu_seconds": c} for c in cpu]


def test_ratios_are_of_the_same_round():
    # Slow rounds are slow for both; medians of the sides alone would say 4 / 2.
    row = compare.row_of("tiny_step", CASES["tiny_step"], Told(1, 2, 8), Told(3, 4, 24))
    assert row["theirs_over_ours"] == {"seconds": 3.0, "cpu_seconds": 3.0}
    assert row["ours"]["median_cpu_seconds"] == 2
    assert row["theirs"]["seconds"] == [30, 40, 240]
    table = outside_table({"cores": 2, "rounds": 3, "commit": "c0ffee1234", "rows": [row]})
    assert "| tiny step | 16 x 128 x 128 | 2.00 | 4.00 | **3.00** | 1.1 | 3.00 |" in table
    assert any("torch 9" in line and "`c0ffee1`" in line for line in table)
