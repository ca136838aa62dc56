"""Hosts that hang or end: found out, named, and the others do not wait for them."""

from __future__ import annotations

import json
import threading

import pytest

from aqdetr_jax.host import EXIT_LOST
from aqdetr_jax.parallel import watch as watches
from aqdetr_jax.parallel.watch import LoneBoard, Position, Watch, behind


def place(started, finished, doing="computing steps", host="h"):
    return {"started": started, "finished": finished, "doing": doing, "host": host}


@pytest.mark.parametrize(
    ("places", "text"),
    [
        (
            {0: place(7, 6), 1: place(6, 6, "waiting for input (reading a.jpg for 9 s)", "b")},
            "process 1 (b): waiting for input (reading a.jpg for 9 s) has started 6 steps, "
            "others 7",
        ),
        (
            {0: place(7, 5), 1: place(7, 6)},
            "process 0 (h): computing steps has finished 5 steps, others 6",
        ),
        ({0: place(7, 6, "writing checkpoints")}, "writing checkpoints after 6 steps"),
        (
            {0: place(7, 7, "evaluating"), 1: place(7, 7, "evaluating")},
            "all 2 processes are at step 7: evaluating",
        ),
    ],
)
def test_who_is_behind(places, text):
    assert behind(places) == text


class Host:
    """A process that watches, with a clock of its own; the board is shared."""

    def __init__(self, index, board, now, folder, count, monkeypatch, seconds=10.0):
        self.position = Position(0, 0, "step", "computing steps")
        self.status = None
        monkeypatch.setattr(watches.jax, "process_index", lambda: index)
        monkeypatch.setattr(watches.jax, "process_count", lambda: count)
        self.watch = Watch(
            lambda: self.position,
            seconds,
            folder,
            board=board,
            leave=self.leave,
            now=lambda: now[0],
            tick=0.01,
        )

    def leave(self, status):
        self.status = status

    def moves(self, **fields):
        self.position = Position(**{**vars(self.position), **fields})


@pytest.fixture
def pod(tmp_path, monkeypatch):
    """(clock, three hosts that share a board)."""
    now, board = [100.0], LoneBoard()
    monkeypatch.setattr(watches.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    hosts = [Host(i, board, now, tmp_path, 3, monkeypatch) for i in range(3)]
    return now, hosts


def test_a_hung_host_is_named_and_all_end_with_their_stacks(pod, tmp_path, capsys):
    now, hosts = pod
    for step in range(1, 4):
        now[0] += 6
        for host in hosts:
            host.moves(started=step, finished=step)
            host.watch.look()
    assert [host.status for host in hosts] == [None] * 3  # 18 s, but something moved
    # The second reads for ever; the others have started the step that it has not.
    hosts[1].moves(part="input", doing="waiting for input (reading 17.jpg for 11 s)")
    for index in (0, 2):
        hosts[index].moves(started=4)
    for host in hosts:
        host.watch.look()
    now[0] += 10.5
    inside = threading.Event()
    ready = threading.Event()

    def a_thread_that_hangs():
        ready.set()
        inside.wait()

    thread = threading.Thread(target=a_thread_that_hangs, name="reader 5")
    thread.start()
    ready.wait()
    for host in hosts:
        host.watch.look()
    inside.set()
    thread.join()
    assert [host.status for host in hosts] == [EXIT_LOST] * 3
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aqdetr: ")]
    assert len(said) == 3
    for line in said:
        assert "no step for 10 s (config.train.watchdog)" in line
        assert "(reading 17.jpg for 11 s) has started 3 steps, others 4" in line
        assert "Run the same command to go on" in line
    for index in range(3):
        text = (tmp_path / "stacks" / f"process_{index}.txt").read_text()
        assert "--- thread reader 5 ---" in text
        assert "in a_thread_that_hangs" in text
        assert "--- thread MainThread ---" in text


def test_starting_and_compiling_may_take_any_time(pod):
    now, hosts = pod
    for part in ("start", "compile"):
        hosts[0].moves(part=part)
        for _ in range(3):
            now[0] += 8
            for host in hosts[1:]:
                host.moves(started=host.position.started + 1)
            for host in hosts:
                host.watch.look()
    assert [host.status for host in hosts] == [None] * 3


def test_a_process_without_a_sign_of_life_has_ended(pod, capsys):
    now, hosts = pod
    hosts[2].moves(started=5, finished=5)
    for host in hosts[::-1]:
        host.watch.look()
    while now[0] < 100 + watches.LOST_SECONDS:
        now[0] += 5
        for host in hosts[:2]:
            host.moves(started=host.position.started + 1)
            host.watch.look()
    assert hosts[0].status is None
    now[0] += 5
    for host in hosts[:2]:
        host.moves(started=host.position.started + 1)
        host.watch.look()
    assert [host.status for host in hosts] == [EXIT_LOST, EXIT_LOST, None]
    text = capsys.readouterr().err
    assert "process 2 (" in text
    assert "ended without a word (killed, out of memory, or off the network) after 5 steps" in text
    assert hosts[0].watch.lost(0).startswith("process 2 (")


def test_what_another_process_fails_for_is_said_and_is_no_reason_to_try_again(pod, capsys):
    _, hosts = pod
    hosts[0].watch._board.put("failed/1", "process 1 (b) failed: ImageReadError: a.jpg")
    hosts[0].watch.look()
    assert hosts[0].status == 1
    text = capsys.readouterr().err
    assert "process 1 (b) failed: ImageReadError: a.jpg" in text
    assert "same command" not in text


def test_a_process_that_is_done_is_not_missed(pod):
    now, hosts = pod
    hosts[1].watch._board.put("position/1", "")
    for _ in range(10):
        now[0] += 9
        for host in (hosts[0], hosts[2]):
            host.moves(started=host.position.started + 1)
            host.watch.look()
    assert hosts[0].status is None


HUNG = """
    import dataclasses, sys, threading
    sys.path.insert(0, "tests")
    import tiny
    from aqdetr_jax.data.shapes.dataset import ShapesDataset
    from aqdetr_jax.training import loop
    from aqdetr_jax.training.experiment import pretraining

    read, count = ShapesDataset.__getitem__, 0

    def waits_for_ever(self, index):
        global count
        count += 1
        if count == 9:
            threading.Event().wait()
        return read(self, index)

    ShapesDataset.__getitem__ = waits_for_ever
    config = pretraining(tiny.FLOAT, ())
    train = dataclasses.replace(config.train, watchdog=2.0, steps=50)
    loop.train(dataclasses.replace(config, train=train), {folder!r})
"""


@pytest.mark.usefixtures("quick_compile")
def test_a_run_whose_input_hangs_ends_and_names_the_image(tmp_path, run_python):
    folder = tmp_path / "run"
    run_python(HUNG.format(folder=str(folder)), devices=1, expect=EXIT_LOST)
    text = (folder / "stacks" / "process_0.txt").read_text()
    first = text.splitlines()[0]
    assert first.startswith("no step for ")
    assert "waiting for input (reading " in first
    assert "in waits_for_ever" in text
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows
