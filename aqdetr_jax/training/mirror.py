"""Files that grow while a run goes on, in an object store that cannot append."""

from __future__ import annotations

import contextlib
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from aqdetr_jax.paths import is_local

EVERY = 30.0
"""Seconds between two copies, and what a killed machine may lose of its log."""


class Mirror:
    """A folder to write growing files to; in a store they appear now and then, each whole.

    Args:
      target: where the files belong.

    Attributes:
      folder: where to write them: the target itself on a disk, else a temporary folder.
    """

    def __init__(self, target: Path):
        self._target = target
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self.folder = target
        if not is_local(target):
            self._temporary = tempfile.TemporaryDirectory(prefix="aqdetr_log_")
            self.folder = Path(self._temporary.name)
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="mirror")
            self._sending: Future[None] | None = None
            self._sent: dict[str, int] = {}
            self._at = time.monotonic()

    def fetch(self, name: str) -> None:
        """Takes over a file that is there already, to append to it."""
        if self._temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).write_bytes((self._target / name).read_bytes())

    def send(self, *, now: bool = False) -> None:
        """Copies what has grown, in the background, if that is due.

        Args:
          now: at once, and wait for it.

        Raises:
          OSError: the store refuses, now or the last time.
        """
        if self._temporary is None:
            return
        if self._sending is not None and (now or self._sending.done()):
            self._sending.result()
            self._sending = None
        if self._sending is None and (now or time.monotonic() - self._at >= EVERY):
            self._at = time.monotonic()
            self._sending = self._threads.submit(self._send)
            if now:
                self._sending.result()

    def close(self) -> None:
        """Copies what is left, and removes the temporary folder."""
        if self._temporary is None:
            return
        try:
            self.send(now=True)
        finally:
            self._threads.shutdown()
            self._temporary.cleanup()
            self._temporary = None

    def _send(self) -> None:
        for file in sorted(self.folder.rglob("*")):
            name = file.relative_to(self.folder).as_posix()
            if file.is_file() and file.stat().st_size != self._sent.get(name):
                data = file.read_bytes()
                (self._target / name).write_bytes(data)
                self._sent[name] = len(data)
