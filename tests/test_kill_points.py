"""The driver that kills runs at random points: what it draws, keeps and compares; no run."""

from __future__ import annotations

import contextlib
import json
import sys

import kill_points
import pytest

TIMES = {
    kind: dict.fromkeys(kill_points.PHASES, 2.0 + number)
    for number, kind in enumerate(kill_points.PROCESSES)
}


def test_points_are_those_of_the_seed():
    drawn = kill_points.draw(50, 10, 10, 0, TIMES)
    assert drawn == kill_points.draw(50, 10, 10, 0, TIMES)
    assert drawn != kill_points.draw(50, 10, 10, 1, TIMES)
    assert [point["kind"] for point in drawn] == ["one"] * 30 + ["two"] * 10 + ["store"] * 10
    for kind in kill_points.PROCESSES:
        own = [point for point in drawn if point["kind"] == kind]
        assert {point["phase"] for point in own} == set(kill_points.PHASES)
        assert {point["victim"] for point in own} == set(range(kill_points.PROCESSES[kind]))
    for point in drawn:
        assert 0 <= point["delay"] <= TIMES[point["kind"]][point["phase"]]
        assert 1 <= point["nth"] <= (8 if point["phase"] == "step" else kill_points.EXPECTED)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """``driver(*options) -> exit status`` with runs that only say what they would have left."""
    results, started, places = {}, [], []

    def start(command, work, processes, kill=None, times=None):
        (name,) = (word.rpartition("/")[2] for word in command if word.startswith("--workdir"))
        started.append((name, processes, None if kill is None else kill["phase"]))
        if times:
            times.write_text(json.dumps(TIMES[name.rpartition("_")[2]]))
        status = [0] * processes
        if kill:
            status[kill["victim"]] = -9
        return {"status": status, "said": [""] * processes, "seconds": [0.0] * processes}

    @contextlib.contextmanager
    def bucket():
        yield "gs://runs"

    def outcome(workdir):
        places.append(workdir)
        return {"state": "a", "model": results.get(workdir.rpartition("/")[2], "b")}

    monkeypatch.setattr(kill_points, "start", start)
    monkeypatch.setattr(kill_points, "outcome", outcome)
    monkeypatch.setattr(kill_points, "_bucket", bucket)

    def run(*options):
        argv = ["kill_points.py", f"--work={tmp_path}", f"--out={tmp_path / 'out.json'}", *options]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ended:
            kill_points.main()
        return ended.value.code

    return run, started, results, places, tmp_path / "out.json"


def test_a_stopped_search_goes_on(driver):
    run, started, _, _, out = driver
    assert run("--points=4", "--two=1", "--store=0", "--most=1") == 0
    assert len(json.loads(out.read_text())["points"]) == 1
    # Killed, and once more by the same command.
    assert [name for name, _, _ in started] == [
        *("teacher", "straight_one", "straight_two", "point_0", "point_0")
    ]
    assert started[-2][2] is not None
    assert started[-1][2] is None
    started.clear()
    assert run("--points=4", "--two=1", "--store=0") == 0
    points = json.loads(out.read_text())["points"]
    assert [point["point"] for point in points] == [0, 1, 2, 3]
    assert "point_0" not in {name for name, _, _ in started}
    assert run("--points=4", "--two=1", "--store=0", "--seed=9") != 0  # other points


def test_points_of_a_store_are_compared_with_a_disk(driver):
    run, started, results, places, out = driver
    results["straight_one"] = results["point_1"] = "that of a disk"
    assert run("--points=2", "--two=0", "--store=1") == 1
    points = json.loads(out.read_text())["points"]
    assert [point["kind"] for point in points] == ["one", "store"]
    assert [point["equal"]["model"] for point in points] == [False, True]
    assert [place for place in places if place.startswith("gs://")] == [
        *("gs://runs/straight_store", "gs://runs/point_1")
    ]
    assert "straight_two" not in {name for name, _, _ in started}


def test_a_difference_is_kept_and_fails(driver):
    run, _, results, _, out = driver
    results["point_1"] = "other"
    assert run("--points=3", "--two=0", "--store=0") == 1
    equal = [point["equal"] for point in json.loads(out.read_text())["points"]]
    assert [sum(x.values()) for x in equal] == [2, 1, 2]
    assert not equal[1]["model"]


def test_a_run_that_was_not_killed_is_an_error(driver, monkeypatch):
    run, *_ = driver
    start = kill_points.start

    def ends_first(*arguments, **options):
        return {**start(*arguments, **options), "status": [0, 0]}

    monkeypatch.setattr(kill_points, "start", ends_first)
    with pytest.raises(RuntimeError, match="was not ended"):
        run("--points=1", "--two=0", "--store=0")
