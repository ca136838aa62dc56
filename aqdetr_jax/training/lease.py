"""Who uses a work directory that is in an object store, where nothing can be locked.

A disk's lock is dropped by the operating system when its process ends, however that happens. A
store knows one operation that two cannot both succeed in: making an object that is not there yet.
So the right to a folder is a numbered object in ``.lock/``, and the highest number has it. Its
owner writes to it every :data:`BEAT` seconds; who wants the folder makes the next number, once the
owner has let it go, is a process of this machine that is gone, or has not written for
:data:`SILENT` seconds *by the clock of the one who waits* (no two clocks are compared). An owner
that was only cut off finds the higher number and stops: see :meth:`Lease.check`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from pathlib import Path
from typing import Any, cast

from aqdetr_jax.parallel.hosts import say
from aqdetr_jax.stores.paths import ObjectPath
from aqdetr_jax.training.places import WorkdirError

BEAT = 10.0
SILENT = 60.0
FOLDER = ".lock"


class InUseError(WorkdirError):
    """Another process has the folder, or took it."""


class Lease:
    """The right to a folder of a store, taken when made and kept by a thread.

    Args:
      folder: the work directory.

    Raises:
      InUseError: another process uses it.
      OSError: the store refuses.
    """

    def __init__(self, folder: Path):
        self._folder = cast(ObjectPath, folder)
        self._beats = 0
        self._name = secrets.token_hex(8)  # two of one process are two
        self._lost = ""
        self._stop = threading.Event()
        self._number = self._take()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")
        self._thread.start()

    def check(self) -> None:
        """Whether the folder still is this process's: to be asked before something is replaced.

        Raises:
          InUseError: another process took it.
        """
        if self._lost:
            raise InUseError(
                f"{self._folder} was taken over by {self._lost}, after this process could not "
                f"reach the store for {SILENT:.0f} s or more: this one stops"
            )

    def close(self) -> None:
        """Lets the folder go."""
        self._stop.set()
        self._thread.join()
        if not self._lost:
            with contextlib.suppress(OSError):
                self._object(self._number).write_bytes(self._content("released"))

    # --- taking ---------------------------------------------------------------------------------

    def _take(self) -> int:
        while True:
            newest = max(self._numbers(), default=0)
            if newest:
                self._wait_for_end_of(newest)
            mine = newest + 1
            if not self._object(mine).create(self._content("held")):
                continue
            numbers = self._numbers()
            if max(numbers) > mine:  # others were faster
                self._object(mine).unlink(missing_ok=True)
                continue
            for number in numbers:
                if number < mine:
                    self._object(number).unlink(missing_ok=True)
            return mine

    def _wait_for_end_of(self, number: int) -> None:
        """Returns when the holder of a number is gone.

        Raises:
          InUseError: it is not.
        """
        first = self._read(number)
        holder = _holder(first)
        if first is None or first.get("state") == "released" or _is_dead_here(first):
            return
        say(
            f"{self._folder} was last used by {holder}, which did not let it go: waiting "
            f"{SILENT:.0f} s for a sign of life"
        )
        begin = time.monotonic()
        while time.monotonic() - begin < SILENT:
            time.sleep(min(BEAT / 4, SILENT / 4))
            now = self._read(number)
            if now is None or now.get("state") == "released":
                return
            if now != first:
                raise InUseError(
                    f"another process is using the work directory {self._folder} ({holder}). "
                    "Wait for it, stop it, or choose another --workdir."
                )

    # --- keeping --------------------------------------------------------------------------------

    def _keep(self) -> None:
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):  # it was said already; the next beat tries again
                newest = max(self._numbers(), default=self._number)
                if newest > self._number:
                    self._lost = _holder(self._read(newest))
                    return
                self._beats += 1
                self._object(self._number).write_bytes(self._content("held"))

    def _numbers(self) -> list[int]:
        try:
            names = [path.name for path in (self._folder / FOLDER).iterdir()]
        except FileNotFoundError:
            return []
        return [int(name) for name in names if name.isdigit()]

    def _object(self, number: int) -> ObjectPath:
        return self._folder / FOLDER / f"{number:08d}"

    def _read(self, number: int) -> dict[str, Any] | None:
        try:
            content = json.loads(self._object(number).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def _content(self, state: str) -> bytes:
        content = {"state": state, "beat": self._beats, "name": self._name, **_this_process()}
        return json.dumps(content).encode()


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": platform.node(),
        "process": pid,
        "machine": _machine(),
        "started": _started(pid),
    }


def _holder(content: dict[str, Any] | None) -> str:
    found = content or {}
    return f"process {found.get('process', '?')} on {found.get('host', '?')}"


def _is_dead_here(content: dict[str, Any]) -> bool:
    """Whether the process was one of this machine and has ended; False if that cannot be told."""
    machine = _machine()
    if not machine or content.get("machine") != machine or not content.get("started"):
        return False
    return _started(content.get("process")) != content["started"]


def _machine() -> str:
    """This start of this machine, and the set of process numbers that this process counts in."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(process: object) -> str:
    """When a process of this machine began, in ticks since the machine did; "" if there is none."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in ("Z", "X") else fields[19]  # ended, and not yet fetched
