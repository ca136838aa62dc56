"""Where the time of a run goes, without making a device wait for it.

The host runs ahead of the devices, by ``AHEAD`` steps: what it waits for is not what they do. So
two records are kept, what the host was busy with and when each step was done (a thread of its own
waits for that), and put on top of each other: time in which a step was computed is the step's,
whatever the host did meanwhile; the rest is the host's, by what it did.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from aqdetr_jax.data.batching import PipelineStats
from aqdetr_jax.parallel.watch import Position
from aqdetr_jax.training.metrics import format_seconds, shares

PARTS = {
    "step": "computing steps",
    "input": "waiting for input",
    "compile": "compiling",
    "checkpoint": "writing checkpoints",
    "evaluation": "evaluating",
    "start": "starting",
    "other": "anything else",
}
"""What time is spent on, in the words of the summary; "step" is the devices', the rest the host's
while they had no step to compute. Reading the batch and sending it to the devices is "input"."""

AHEAD = 2
"""Steps that are on their way at once: one that is computed and one that is next. With more, a run
that is asked to stop would have to finish them first."""
_MANY = 10_000  # segments that are kept before they are added up

Segment = tuple[str, float, float]
"""A part, and the seconds at which it began and ended."""


def split(segments: Sequence[Segment], busy: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Seconds of each part; their sum is the time that the segments cover.

    Args:
      segments: what the host did, in order.
      busy: begin and end of the times in which steps were computed, in order, without overlap.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    at = 0
    for part, begin, end in segments:
        covered, first = 0.0, at
        for i in range(first, len(busy)):
            if busy[i][0] >= end:
                break
            covered += max(0.0, min(busy[i][1], end) - max(busy[i][0], begin))
            at = i  # the last one that was seen may reach into the next segment
        seconds["step"] += covered
        seconds[part] += end - begin - covered
    return seconds


class RunClock:
    """The time of a run by parts.

    Args:
      now: seconds.
      wait: returns when a value has been computed.

    Attributes:
      started_steps: steps given to the devices.
      finished_steps: steps that they have done.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.perf_counter,
        wait: Callable[[Any], Any] = jax.block_until_ready,
    ):
        self._now, self._wait = now, wait
        self._part, self._since = "start", now()
        self._segments: list[Segment] = []
        self._lap = dict.fromkeys(PARTS, 0.0)
        self._busy: list[tuple[float, float]] = []
        self._steps: queue.Queue[tuple[float, Any] | None] = queue.Queue()
        self._room = threading.Semaphore(AHEAD)
        self._thread: threading.Thread | None = None
        self.total = dict.fromkeys(PARTS, 0.0)
        self.started_steps = self.finished_steps = 0

    def position(self, reads: Mapping[str, PipelineStats | None], count: int = 0) -> Position:
        """Where the run is; any thread may ask.

        Args:
          reads: what knows of the images that are read, by part.
          count: see ``Position``.
        """
        part = self._part
        doing, stats = PARTS[part], reads.get(part)
        if stats is not None and stats.slowest():
            doing += f" (reading {stats.slowest()})"
        return Position(self.started_steps, self.finished_steps, part, doing, count)

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """The host does something; parts may be nested, the innermost counts."""
        before = self._enter(part)
        try:
            yield
        finally:
            self._enter(before)

    def started(self) -> None:
        """Everything is ready: from here on the loop runs."""
        self._enter("other")

    def step(self, run: Callable[..., tuple[Any, Any]], *arguments: Any) -> tuple[Any, Any]:
        """Starts a step on the devices, once all but ``AHEAD`` - 1 of those before it are done.

        Args:
          run: what starts it and returns ``(state, metrics)`` without waiting.
          *arguments: its arguments.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._follow, daemon=True, name="step times")
            self._thread.start()
        self._room.acquire()
        start = self._now()
        state, metrics = run(*arguments)
        self.started_steps += 1
        self._steps.put((start, jax.tree.leaves(metrics)[0]))
        if len(self._segments) >= _MANY:
            self._fold()
        return state, metrics

    def lap(self) -> dict[str, float]:
        """Seconds of each part since the last lap; waits for the steps that were started."""
        self._steps.join()
        self._enter(self._part)
        self._fold(everything=True)
        lap, self._lap = self._lap, dict.fromkeys(PARTS, 0.0)
        for part, seconds in lap.items():
            self.total[part] += seconds
        return lap

    @property
    def goodput(self) -> float:
        """Share of the time up to the last lap in which steps were computed."""
        return self.total["step"] / max(sum(self.total.values()), 1e-9)

    def summary(self) -> str:
        """The time of the run in words."""
        whole = sum(self.total.values())
        return f"{format_seconds(whole)}: {shares(self.total, PARTS)}"

    def close(self) -> None:
        """Ends the thread."""
        self._steps.put(None)

    def _fold(self, everything: bool = False) -> None:
        """Adds up what the host did until the last step was done: nothing can change it."""
        busy = self._busy[:]  # which the thread appends to
        cut = len(self._segments)
        if not everything:
            last = busy[-1][1] if busy else float("-inf")
            cut = sum(end <= last for _, _, end in self._segments)
        for part, seconds in split(self._segments[:cut], busy).items():
            self._lap[part] += seconds
        until = self._segments[cut - 1][2] if cut else float("-inf")
        del self._segments[:cut]
        del self._busy[: sum(end <= until for _, end in busy)]

    def _enter(self, part: str) -> str:
        now, before = self._now(), self._part
        self._segments.append((before, self._since, now))
        self._part, self._since = part, now
        return before

    def _follow(self) -> None:
        """Waits for one step after the other and notes when it was done."""
        last = float("-inf")
        while (item := self._steps.get()) is not None:
            start, value = item
            # What went wrong on a device is raised where its values are used.
            with contextlib.suppress(Exception):
                self._wait(value)
            done = self._now()
            self._busy.append((max(start, last), done))
            last = done
            self.finished_steps += 1
            del item, value
            self._room.release()
            self._steps.task_done()
