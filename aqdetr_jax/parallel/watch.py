"""Watches a run: processes that end without a word, and steps that do not come.

Processes that wait for each other wait for ever where one of them hangs, and a host that feeds
devices has no time-out of its own. So each process has a thread that notes where it is, on a board
that all of them see (the key-value store of ``jax.distributed``, which process 0 holds): it finds
out who has ended, who is behind, and ends its own process with the reason in one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import logging
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
from jax._src import distributed  # the only road to the key-value store

from aqdetr_jax.host import EXIT_LOST
from aqdetr_jax.io import write_text_atomic
from aqdetr_jax.parallel.hosts import process_name

logger = logging.getLogger(__name__)

LOST_SECONDS = 30.0
"""Without a sign of life for so long, a process has ended."""

TICK = 2.0
"""Seconds between signs of life."""

STACKS = "stacks"
"""Folder of a work directory with the stacks of a run that hung."""

UNWATCHED = ("start", "compile")
"""Parts of ``training.clock`` that may take any time."""


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a process is.

    Attributes:
      started: steps that the host has given to its devices.
      finished: steps that they have done.
      part: what the host is busy with, in the names of ``training.clock``.
      doing: the same in words, with what it waits for.
      count: anything else that moves (batches evaluated).
    """

    started: int
    finished: int
    part: str
    doing: str
    count: int = 0

    @property
    def mark(self) -> tuple[Any, ...]:
        """What changes when something moves."""
        return self.started, self.finished, self.part, self.count


class Board(Protocol):
    """Texts that every process of a run can write and read."""

    def put(self, key: str, text: str) -> None:
        """Writes."""

    def read(self, folder: str) -> dict[str, str]:
        """All texts below a folder, by their last name."""


class SharedBoard:
    """The board of a run of several processes; it is gone when process 0 is."""

    def __init__(self) -> None:
        client = distributed.global_state.client
        assert client is not None
        self._client: Any = client

    def put(self, key: str, text: str) -> None:
        """Writes."""
        self._client.key_value_set(f"aqdetr/{key}", text, allow_overwrite=True)

    def read(self, folder: str) -> dict[str, str]:
        """All texts below a folder, by their last name."""
        found = self._client.key_value_dir_get(f"aqdetr/{folder}/")
        return {key.rpartition("/")[2]: value for key, value in found}


class LoneBoard:
    """The board of a single process."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def put(self, key: str, text: str) -> None:
        """Writes."""
        self._texts[key] = text

    def read(self, folder: str) -> dict[str, str]:
        """All texts below a folder, by their last name."""
        start = f"{folder}/"
        return {k.removeprefix(start): v for k, v in self._texts.items() if k.startswith(start)}


def open_board() -> Board:
    """The board of this run."""
    return SharedBoard() if jax.process_count() > 1 else LoneBoard()


def stacks() -> str:
    """The stack of every thread of this process, by name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        lines = "".join(traceback.format_stack(frame))
        parts.append(f"--- thread {names.get(ident, ident)} ---\n{lines}")
    return "\n".join(parts)


def behind(positions: dict[int, dict[str, Any]]) -> str:
    """Who is behind, in words.

    Args:
      positions: of each process, the fields of a ``Position`` and "host".
    """
    # Who has not started what others wait for; if all have, whose devices have not done it.
    for key, text in (("started", "has started"), ("finished", "has finished")):
        values = {index: place[key] for index, place in positions.items()}
        least, most = min(values.values()), max(values.values())
        if least == most:
            continue
        late = [index for index, value in values.items() if value == least]
        names = [
            f"{process_name(i, positions[i]['host'])}: {positions[i]['doing']}" for i in late[:4]
        ]
        more = f" and {len(late) - 4} more" if len(late) > 4 else ""
        return f"{'; '.join(names)}{more} {text} {least} steps, others {most}"
    if len(positions) == 1:
        (place,) = positions.values()
        return f"{place['doing']} after {place['finished']} steps"
    doing = sorted({place["doing"] for place in positions.values()})
    return f"all {len(positions)} processes are at step {least}: {'; '.join(doing[:4])}"


class Watch:
    """The thread that watches; ``with`` starts and ends it.

    Args:
      position: where this process is; called by the thread.
      seconds: without anything that moves for so long, all stacks are written and the run ends;
        0 = however long it takes.
      folder: work directory, for the stacks.
      board: of the run.
      leave: ends the process; for tests.
      now: seconds.
      tick: seconds between looks.
    """

    def __init__(
        self,
        position: Callable[[], Position],
        seconds: float,
        folder: Path,
        *,
        board: Board | None = None,
        leave: Callable[[int], Any] = os._exit,
        now: Callable[[], float] = time.monotonic,
        tick: float = TICK,
    ):
        self._position, self._seconds, self._folder = position, seconds, folder
        self._board = open_board() if board is None else board
        self._leave, self._now, self._tick = leave, now, tick
        self._index, self._count = jax.process_index(), jax.process_count()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._mark: tuple[Any, ...] = ()
        self._moved = now()
        self._seen: dict[int, tuple[str, float]] = {}
        self._reason = ""

    def __enter__(self) -> Watch:
        if self._seconds or self._count > 1:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
            if self._count > 1:
                with contextlib.suppress(Exception):  # of a board that is gone
                    self._board.put(f"position/{self._index}", "")

    def lost(self, wait: float = LOST_SECONDS + 5 * TICK) -> str:
        """Which process has ended, in words; "" if none has within some seconds.

        For who was told by the network that something is wrong, before anybody knows what.
        """
        end = time.monotonic() + wait
        while not self._reason and time.monotonic() < end and self._count > 1:
            time.sleep(0.1)
        return self._reason

    def look(self) -> None:
        """One look: notes where this process is, and ends it if nothing moves or another ended."""
        if self._seconds:  # for what holds Python's lock, under which this thread cannot run
            with contextlib.suppress(Exception):  # of a program without an error stream
                assert sys.__stderr__ is not None
                later = 1.5 * self._seconds + 60
                faulthandler.dump_traceback_later(later, exit=True, file=sys.__stderr__)
        now, place = self._now(), self._position()
        if place.mark != self._mark or place.part in UNWATCHED:
            self._mark, self._moved = place.mark, now
        note = {**dataclasses.asdict(place), "host": platform.node(), "at": now}
        self._board.put(f"position/{self._index}", json.dumps(note))
        for index, text in sorted(self._board.read("failed").items()):
            if int(index) != self._index:
                self._end(text, stuck=False, status=1)
        for text in self._board.read("stuck").values():
            self._end(text, stuck=True)
        if self._seconds and now - self._moved > self._seconds:
            self._stuck(now - self._moved)
        if self._count > 1:
            self._missed(now)

    def _run(self) -> None:
        unheard = 0.0
        while not self._done.wait(self._tick):
            try:
                self.look()
                unheard = 0.0
            except jax.errors.JaxRuntimeError as error:  # the board is gone, and so is process 0
                unheard += self._tick
                if unheard > LOST_SECONDS:
                    reason = " ".join(str(error).split())[:200]
                    self._end(f"process 0 does not answer ({reason})", stuck=False)
            except Exception:  # what watches must not end what it watches
                logger.exception("the watch failed, and goes on")

    def _missed(self, now: float) -> None:
        """Ends this process if another has not moved its note for a while."""
        for index, text in self._board.read("position").items():
            known, since = self._seen.get(int(index), ("", now))
            if text != known:
                self._seen[int(index)] = text, now
            elif text and now - since > LOST_SECONDS and int(index) != self._index:
                place = json.loads(text)
                self._end(
                    f"{process_name(int(index), place['host'])} ended without a word (killed, out "
                    f"of memory, or off the network) after {place['finished']} steps",
                    stuck=False,
                )

    def _stuck(self, seconds: float) -> None:
        notes = self._board.read("position")
        places = {int(i): json.loads(text) for i, text in notes.items() if text}
        text = f"no step for {seconds:.0f} s (config.train.watchdog): {behind(places)}"
        self._board.put(f"stuck/{self._index}", text)
        self._end(text, stuck=True)

    def _end(self, text: str, *, stuck: bool, status: int = EXIT_LOST) -> None:
        """Ends this process, with a line and, where nothing moves, the stacks of its threads."""
        if self._done.is_set():  # it ends by itself
            return
        self._reason = text
        if stuck:
            found = stacks()
            print(found, file=sys.stderr)
            file = self._folder / STACKS / f"process_{self._index}.txt"
            with contextlib.suppress(OSError):
                write_text_atomic(file, f"{text}\n\n{found}")
            text = f"{text}; the stacks of all threads are in {file.parent}"
        if status == EXIT_LOST:
            text = f"{text}. Run the same command to go on from the newest checkpoint"
        print(f"aqdetr: LostError: {text}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        if stuck and self._count > 1:
            # The board goes with process 0, which waits until the others have seen this.
            time.sleep(3 * self._tick if self._index == 0 else 0)
        self._done.set()
        self._leave(status)


def leave_others(status: int, reason: str = "") -> None:
    """Ends a process of a run of several that did not finish; does nothing in a lone one.

    A process that ends as usual waits until all have; and when process 0 ends, JAX aborts those
    that are left. So process 0 goes last, some seconds later at most.

    Args:
      status: exit status.
      reason: what the other processes are to say; "" where they know.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    board, index = SharedBoard(), jax.process_index()
    with contextlib.suppress(Exception):
        if reason:
            name = process_name(index, platform.node())
            board.put(f"failed/{index}", f"{name} failed: {reason}")
        if index:
            board.put(f"left/{index}", "")
        else:
            end = time.monotonic() + 5 * TICK
            while len(board.read("left")) < jax.process_count() - 1 and time.monotonic() < end:
                time.sleep(0.1)
    os._exit(status)
