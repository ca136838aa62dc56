"""The processes of a multi-process run: start-up, what they agree on, the request to stop."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from aqdetr_jax.host import HostError

# Set by the launchers that jax.distributed.initialize() knows how to read.
_CLUSTER_VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "COORDINATOR_ADDRESS",
    "MEGASCALE_COORDINATOR_ADDRESS",
)

_MESSAGE = 2000  # bytes of an error that one process tells the others


def initialize_distributed(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> bool:
    """Joins the other processes of a multi-process run; does nothing in a single-process one.

    Must run before anything touches a device. Call it in every process. A cluster is recognised
    by the arguments, by a coordinator address in the environment, by more than one TPU worker
    (``TPU_WORKER_HOSTNAMES``), or by more than one Slurm or Open MPI task.

    Args:
      coordinator: ``host:port`` of process 0, where the launcher does not say it.
      processes: number of processes, with ``coordinator``.
      process: index of this process, with ``coordinator``.

    Returns:
      True if this is now part of a multi-process run.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    if coordinator is None and processes is None and not _in_cluster():
        return False
    jax.distributed.initialize(coordinator, num_processes=processes, process_id=process)
    return jax.process_count() > 1


def _in_cluster() -> bool:
    environment = os.environ
    if any(environment.get(name) for name in _CLUSTER_VARIABLES):
        return True
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    tasks = (environment.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    # An interactive Slurm allocation has the count but no task of its own.
    in_task = "SLURM_PROCID" in environment or "OMPI_COMM_WORLD_RANK" in environment
    return in_task and any(text.isdigit() and int(text) > 1 for text in tasks)


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints on the main process only."""
    if is_main():
        print(text, flush=True)


@functools.lru_cache(maxsize=256)
def say_once(text: str) -> None:
    """Says what several parts of one command would say, on the main process only."""
    say(text)


def agree(value: bool) -> bool:
    """Process 0's value on every process: what decides on collective work must not differ."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """What fails on one process fails on all, and is said by the first one alone.

    The body must do no collective work. Without this the others would wait for the one that
    stopped, or say the same once more.

    Raises:
      HostError: of another process: on the first one with its message, on the others without a
        word. (An error of the first process's own stays what it is there.)
    """
    failure: BaseException | None = None
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        failure = error
    if jax.process_count() == 1:
        if failure is not None:
            raise failure
        return
    text = f"{type(failure).__name__}: {failure}" if failure is not None else ""
    text = f"process {jax.process_index()} on {platform.node()}: {text}" if text else ""
    message = np.zeros(_MESSAGE, np.uint8)
    data = text.encode("utf-8", "backslashreplace")[:_MESSAGE]
    message[: len(data)] = np.frombuffer(data, np.uint8)
    found = np.asarray(multihost_utils.process_allgather(message))
    said = [bytes(row).rstrip(b"\0").decode("utf-8", "replace") for row in found]
    if failure is not None and is_main():
        raise failure
    if any(said):
        raise HostError(next(filter(None, said)) if is_main() else "")


def one_for_all(tree: Any) -> Any:
    """Process 0's arrays on every process.

    All processes compute the same start, but on other machines the last bit may differ; what is
    replicated must not.
    """
    if jax.process_count() == 1:
        return tree
    return multihost_utils.broadcast_one_to_all(tree)


def barrier(name: str) -> None:
    """Waits for all processes; does nothing in a single-process run."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


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
