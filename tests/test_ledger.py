"""The ledger of published numbers: complete, and no value of ours without its evidence."""

from __future__ import annotations

import collections
import re
import shlex
import sys
from pathlib import Path

import pytest

from aqdetr_jax.training.experiment import load_experiment

ROOT = Path(__file__).resolve().parents[1]
METHOD = ROOT.parent / "shared" / "METHOD.md"


@pytest.fixture(scope="module")
def ledger():
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        import render_ledger
    finally:
        sys.path.pop(0)
    return render_ledger


def test_every_value_has_its_evidence(ledger):
    rows = ledger.read_ledger()
    ours = [(row, ledger.found(row)) for row in rows]
    assert any(value for _, value in ours)
    for row, value in ours:
        if value is not None:
            assert (ROOT / value["evidence"]).is_file(), row
            assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", value["commit"]), row


def test_no_row_twice(ledger):
    keys = collections.Counter(
        (row["what"], row["metric"], row["bits"], row["source"]) for row in ledger.read_ledger()
    )
    assert [key for key, count in keys.items() if count > 1] == []


def test_every_command_names_a_configuration_that_loads(ledger):
    commands = {row["command"] for row in ledger.read_ledger() if row["command"]}
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "aqdetr", command
        (config,) = (word.removeprefix("--config=") for word in words if "--config=" in word)
        load_experiment(config, tuple(w[9:] for w in words if w.startswith("--config.")))
        if words[1] in ("train", "ptq"):
            assert any(word.startswith("--config.init_from=") for word in words), command


def test_status(ledger):
    row = {"metric": "COCO val AP", "expected": 42.0}
    assert ledger.status(row, None) == "not run"
    assert ledger.status(row, {"value": 41.7}) == "reached"
    assert ledger.status(row, {"value": 41.6}) == "not reached"
    row = {"metric": "Size, MB", "expected": 100.0, "tolerance": 0.01}
    assert ledger.status(row, {"value": 101.0}) == "reached"
    assert ledger.status(row, {"value": 98.9}) == "not reached"


def test_a_value_that_its_file_lacks(ledger):
    row = {"what": "x", "metric": "m", "ours": {"file": "complexity.json", "value": "nothing"}}
    with pytest.raises(ValueError, match="has no nothing"):
        ledger.found(row)
    with pytest.raises(ValueError, match=r"absent\.json is not there"):
        ledger.found({**row, "ours": {"file": "absent.json", "value": "AP"}})


def test_a_row_for_every_number_on_record(ledger):
    """The notes on the papers list them; a copy of the package alone has no such notes."""
    if not METHOD.is_file():
        pytest.skip("the notes on the papers' numbers are not beside this checkout")
    section = METHOD.read_text(encoding="utf-8").split("## 6.")[1].split("\n## ")[0]
    table = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ")][1:]
    wanted = {float(n) for cell in table for n in re.findall(r"\d+\.\d+", cell)}
    assert len(wanted) > 70
    assert wanted <= {row["expected"] for row in ledger.read_ledger()}
