"""The processes of a multi-process run: start-up, what they agree on, the request to stop."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from aqdetr_jax.host import ElsewhereError

# Set by the launchers that jax.distributed.initialize() knows how to read.
_CLUSTER_VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "COORDINATOR_ADDRESS",
    "MEGASCALE_COORDINATOR_ADDRESS",
)


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


def exchange(text: str) -> list[str]:
    """Every process's text, in the order of the processes."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode("utf-8", "backslashreplace"), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    # To a power of two: a gather is compiled for each length.
    padded = np.zeros(1 << max(int(np.max(sizes)) - 1, 1).bit_length(), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [
        bytes(row[:size]).decode() for row, size in zip(rows, np.ravel(sizes).tolist(), strict=True)
    ]


def anywhere(value: bool) -> bool:
    """Whether a value is true on any process."""
    if jax.process_count() == 1:
        return value
    return bool(np.any(multihost_utils.process_allgather(np.int32(value))))


def process_name(index: int, host: str) -> str:
    """A process of the run in words."""
    return f"process {index} ({host})"


@contextlib.contextmanager
def together() -> Iterator[None]:
    """All processes get through the body, or all stop, and one of them says why.

    Without it one process would end and the others wait for it. The body must not wait for other
    processes.

    Raises:
      ElsewhereError: another process failed, and says so.
      RuntimeError: on process 0, the failure of another process, which is named.
    """
    if jax.process_count() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    text = "" if error is None else f"{type(error).__name__}: {error}"
    found = exchange(f"{platform.node()}\n{text}" if text else "")
    failed = [i for i, line in enumerate(found) if line]
    if not failed:
        return
    if not is_main():
        raise ElsewhereError(f"process {failed[0]} failed: process 0 says why") from error
    if error is not None:
        raise error
    host, _, reason = found[failed[0]].partition("\n")
    raise RuntimeError(f"{process_name(failed[0], host)} cannot start: {reason}")


def check_same(facts: Mapping[str, Any]) -> None:
    """Whether all processes were given the same; else all stop, and process 0 names what differs.

    Args:
      facts: values with a JSON form, by the name that the message uses.

    Raises:
      ValueError: on process 0: a value differs.
      ElsewhereError: on the others.
    """
    if jax.process_count() == 1:
        return
    mine = {"host": platform.node(), "facts": dict(facts)}
    found = [json.loads(text) for text in exchange(json.dumps(mine))]
    first = found[0]
    for index, other in enumerate(found):
        names = [*first["facts"], *(other["facts"].keys() - first["facts"].keys())]
        for name in names:
            values = [x["facts"].get(name) for x in (first, other)]
            if values[0] == values[1]:
                continue
            if not is_main():
                raise ElsewhereError(f"{name} differs: process 0 says how")
            raise ValueError(
                f"{name} differs between the hosts: {_short(values[0])} in "
                f"{process_name(0, first['host'])}, {_short(values[1])} in "
                f"{process_name(index, other['host'])}: give all of them the same command, the "
                "same files and the same version"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:100]}..."


class StopRequest:
    """Set by SIGTERM or the first SIGINT; the second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._asked = 0

    def set(self) -> None:
        """Asks the run to stop."""
        self._event.set()

    def seen(self, step: int) -> bool:
        """Whether the run should stop after ``step``; the same answer on every process.

        A signal rarely reaches all processes of a run within the same step: JAX's preemption
        service, which takes the signal there, tells the others, and all stop at the first question
        that none of them has asked yet. Every process must ask the same questions.
        """
        if jax.process_count() == 1:
            return self._event.is_set()
        self._asked += 1
        return bool(multihost_utils.reached_preemption_sync_point(self._asked))

    def handle(self, number: int, frame: object) -> None:
        """Signal handler."""
        if self._event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._event.set()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listens to SIGTERM and SIGINT within the body (main thread only)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    lone = jax.process_count() == 1
    numbers = (signal.SIGTERM, signal.SIGINT) if lone else (signal.SIGINT,)
    old = {number: signal.signal(number, request.handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
