"""What the processes of a multi-process run must agree on, and the request to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints on the main process only."""
    if is_main():
        print(text, flush=True)


def agree(value: bool) -> bool:
    """Process 0's value on every process: what decides on collective work must not differ."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def one_for_all(tree: Any) -> Any:
    """Process 0's arrays on every process.

    All processes compute the same start, but on other machines the last bit may differ; what is
    replicated must not.
    """
    if jax.process_count() == 1:
        return tree
    return multihost_utils.broadcast_one_to_all(tree)


class StopRequest:
    """Set by SIGTERM or the first SIGINT; the second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Asks the run to stop."""
        self._event.set()

    def seen(self, step: int) -> bool:
        """Whether the run should stop after ``step``; the same answer on every process.

        In a multi-process run the processes ask each other every tenth step: a signal rarely
        reaches all of them within the same step.
        """
        if jax.process_count() == 1:
            return self._event.is_set()
        if step % 10:
            return False
        flags = multihost_utils.process_allgather(np.int32(self._event.is_set()))
        return bool(np.any(flags))

    def handle(self, number: int, frame: object) -> None:
        """Signal handler."""
        if self._event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._event.set()


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listens to SIGTERM and SIGINT within the body (main thread only)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    old = {s: signal.signal(s, request.handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
