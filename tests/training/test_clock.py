"""The time of a run by parts: what was the devices', what was the host's."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqdetr_jax.training import clock as clocks
from aqdetr_jax.training.clock import PARTS, RunClock, split
from aqdetr_jax.training.metrics import shares


def test_a_step_that_is_computed_meanwhile_takes_the_hosts_time():
    host = [("input", 0.0, 4.0), ("other", 4.0, 5.0), ("checkpoint", 5.0, 10.0)]
    found = split(host, [(1.0, 2.5), (3.0, 6.0), (9.0, 9.5)])
    wanted = {"input": 1.5, "other": 0.0, "checkpoint": 3.5, "step": 5.0}
    assert found == dict.fromkeys(PARTS, 0.0) | wanted


lengths = st.lists(st.integers(0, 20), min_size=1, max_size=12)


@given(lengths, lengths, st.lists(st.sampled_from(sorted(PARTS)), min_size=12, max_size=12))
def test_parts_sum_to_the_whole(host, devices, names):
    """Counted second by second: a second is a step's, or else of what the host did in it."""
    ends = list(itertools.accumulate(host))
    segments = [(n, e - d, e) for n, d, e in zip(names, host, ends, strict=False)]
    edges = list(itertools.accumulate(devices))
    busy = list(itertools.pairwise(edges))[::2]
    wanted = dict.fromkeys(PARTS, 0.0)
    for second in range(ends[-1]):
        doing = next(part for part, begin, end in segments if begin <= second < end)
        computing = any(begin <= second < end for begin, end in busy)
        wanted["step" if computing else doing] += 1
    assert split(segments, busy) == wanted


class Machine:
    """A clock that is turned by hand, and devices that finish their steps when told."""

    def __init__(self):
        self.time = 0.0
        self.clock = RunClock(lambda: self.time, lambda done: done.wait())
        self.running: list[threading.Event] = []

    def start(self):
        """Starts a step, which runs until :meth:`finish`."""
        self.running.append(threading.Event())
        self.clock.step(lambda: ("state", {"loss": self.running[-1]}))

    def finish(self, at: float):
        """The oldest step is done at a time."""
        self.time, count = at, len(self.clock._busy)
        self.running.pop(0).set()
        while len(self.clock._busy) == count:
            time.sleep(0.001)


@pytest.fixture
def machine():
    machine = Machine()
    yield machine
    machine.clock.close()


def test_the_host_runs_no_further_ahead_than_it_can_stop(machine):
    for _ in range(clocks.AHEAD):
        machine.start()
    began = threading.Event()
    another = threading.Thread(target=lambda: (began.set(), machine.start()), daemon=True)
    another.start()
    began.wait(60)
    another.join(0.2)
    assert machine.clock.started_steps == clocks.AHEAD
    machine.finish(1.0)
    another.join(60)
    assert machine.clock.started_steps == clocks.AHEAD + 1
    while machine.running:
        machine.finish(2.0)


def test_the_host_runs_ahead_and_nothing_is_counted_twice(machine):
    machine.time = 3.0
    machine.clock.started()
    with machine.clock.within("input"):
        machine.time = 5.0
    machine.start()  # computed from 5 to 12
    with machine.clock.within("input"):
        machine.time = 7.0
    machine.start()  # from 12 to 18
    with machine.clock.within("checkpoint"):
        machine.finish(12.0)
        with machine.clock.within("compile"):
            machine.finish(18.0)
            machine.time = 20.0
        machine.time = 21.0
    machine.time = 21.5
    lap = machine.clock.lap()
    assert lap == dict.fromkeys(PARTS, 0.0) | {
        "start": 3.0,
        "input": 2.0,
        "step": 13.0,
        "compile": 2.0,
        "checkpoint": 1.0,
        "other": 0.5,
    }
    assert machine.clock.goodput == 13.0 / 21.5
    # The next lap begins where this one ended.
    machine.start()
    with machine.clock.within("evaluation"):
        machine.finish(22.5)
        machine.time = 23.5
    lap = machine.clock.lap()
    assert lap == dict.fromkeys(PARTS, 0.0) | {"step": 1.0, "evaluation": 1.0}
    assert sum(machine.clock.total.values()) == 23.5
    assert machine.clock.summary().startswith("24s: 60% computing steps, 13% starting, ")


def test_many_steps_between_two_laps_are_added_up_meanwhile(machine, monkeypatch):
    monkeypatch.setattr(clocks, "_MANY", 8)
    machine.clock.started()
    for number in range(50):
        with machine.clock.within("input"):
            machine.time = 10 * number + 2.0
        machine.start()
        if number:  # one step is always under way
            machine.finish(10 * number + 5.0)
        machine.time = 10 * number + 10.0
    assert len(machine.clock._segments) < 20
    assert len(machine.clock._busy) < 10
    machine.finish(505.0)
    lap = machine.clock.lap()
    # Busy from 2 to 15, 15 to 25, ...: always, but for the first two seconds.
    assert lap == dict.fromkeys(PARTS, 0.0) | {"input": 2.0, "step": 503.0}


def test_a_step_that_fails_ends_when_it_fails():
    def fails(value):
        raise RuntimeError("lost")

    ticks = itertools.count()
    clock = RunClock(lambda: float(next(ticks)), fails)
    clock.step(lambda: ("state", {"loss": 1.0}))
    assert clock.lap()["step"] > 0
    clock.close()


def test_shares_leave_out_what_takes_no_time():
    seconds = {"step": 93.0, "input": 6.6, "compile": 0.4, "start": 0.0}
    assert shares(seconds) == "93% step, 7% input"
    assert shares(seconds, {"step": "computing steps"}) == "93% computing steps, 7% input"
    assert shares({}) == ""
