"""A model in a runtime, in a process of its own, as the benchmark sees it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
from typing import Any

from aqdetr_jax.paths import printable


class BenchmarkError(RuntimeError):
    """A model that cannot be timed; names it and says why."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is timed.

    Attributes:
      path: of the model.
      runtime: see ``runner.RUNTIMES``.
      threads: that it may use.
    """

    path: str
    runtime: str
    threads: int

    def __str__(self) -> str:
        return f"{printable(self.path)} in {self.runtime}"


class Contestant:
    """The process of an entry; a context that ends it.

    Args:
      entry: what it runs.
      size: (height, width) of images, None = the model's own.

    Attributes:
      entry: the same.
      facts: what the model says of itself, see ``runner.Runner``.

    Raises:
      BenchmarkError: the model cannot be used.
    """

    def __init__(self, entry: Entry, size: tuple[int, int] | None):
        self.entry = entry
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "aqdetr_jax.deploy.runner", entry.runtime],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.facts = self.ask("open", path=entry.path, threads=entry.threads, size=size)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Contestant:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process."""
        self.close()

    def ask(self, what: str, **fields: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
          BenchmarkError: there is none, or it is an error.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"do": what, **fields}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchmarkError(f"{self.entry}: {self._end()}")
        answer = json.loads(line)
        if "error" in answer:
            raise BenchmarkError(f"{self.entry}: {answer['error']}")
        return answer

    def _end(self) -> str:
        """How the process ended by itself."""
        status = self._process.wait()
        if status < 0:
            return f"its process was ended by signal {-status} (9 is mostly: no memory left)"
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return f"its process ended with status {status}: {printable(lines[-1]) if lines else ''}"

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
