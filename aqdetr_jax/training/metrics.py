"""Metrics of a run: ``metrics.jsonl`` and TensorBoard files, and the progress line.

``metrics.jsonl`` is the record: one JSON object a line with ``step`` (int), ``time`` (seconds since
the epoch) and the metrics of that step, such as ``{"step": 50, "time": 1.7e9, "train/loss": 3.2}``.
A value that is NaN or infinite is written as null and its name is listed under ``nonfinite``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from aqdetr_jax.io import write_text_atomic
from aqdetr_jax.paths import as_path
from aqdetr_jax.training.mirror import Mirror

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
"""Name of the metrics file in a work directory."""

CLOCK = ("time", "images_per_second", "goodput", "data/wait")
"""What the names of metrics begin with that are of the machine's speed, not of the run."""


def is_loss(name: str) -> bool:
    """Whether a metric is a term of the loss."""
    return name.rpartition("/")[2].startswith("loss")


class MetricsWriter:
    """Appends metrics to ``WORKDIR/metrics.jsonl`` and to TensorBoard files in ``WORKDIR/tb``.

    One process of a run writes (process 0).
    """

    def __init__(
        self,
        workdir: str | Path,
        resume_step: int | None = None,
        tensorboard: bool = True,
        keep_going: bool = False,
    ):
        """Opens the files.

        Args:
          workdir: folder, made if missing.
          resume_step: the step that training goes on from. Lines of later steps are dropped: a
            killed run had logged them, and this one will log them again. None keeps every line.
          tensorboard: also write TensorBoard event files.
          keep_going: lines that cannot be written are kept until they can.

        Raises:
          ValueError: an existing ``metrics.jsonl`` has a line that is not one of metrics.
        """
        folder = as_path(workdir)
        self.path = folder / METRICS
        folder.mkdir(parents=True, exist_ok=True)
        _repair(self.path, resume_step)
        self._mirror = Mirror(folder)
        self._mirror.fetch(METRICS)
        # Without a buffer: what is not written whole is known at once.
        self._file = (self._mirror.folder / METRICS).open("ab", buffering=0)
        self._keep_going, self._unwritten = keep_going, b""
        self._board: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # here, because importing it takes a second

            purge = None if resume_step is None else resume_step + 1
            self._board = SummaryWriter(str(self._mirror.folder / "tb"), purge_step=purge)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line and flushes it.

        Args:
          step: training step that the values belong to.
          metrics: numbers and scalar arrays (fetched from the device here); nested mappings are
            joined by ``/``; strings, booleans and None go to the JSON line only.

        Raises:
          ValueError: a value is not a scalar, or is named ``step``, ``time`` or ``nonfinite``.
        """
        line: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
        nonfinite = []
        for name, value in _flatten(metrics):
            if name in ("step", "time", "nonfinite"):
                raise ValueError(f"a metric cannot be named {name!r}")
            value = _scalar(name, value)
            if isinstance(value, float) and not math.isfinite(value):
                nonfinite.append(name)
                line[name] = None
            else:
                line[name] = value
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if self._board is not None and is_number and name not in nonfinite:
                self._board.add_scalar(name, value, step)
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._append((json.dumps(line, allow_nan=False) + "\n").encode())
        with self._kept():
            self._mirror.send()

    def sync(self) -> None:
        """Waits until what was written is where it belongs: before a checkpoint of that step.

        Raises:
          OSError: an object store refuses, unless the run keeps going.
        """
        if self._board is not None:
            self._board.flush()
        with self._kept():
            self._mirror.send(now=True)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """What cannot be sent now goes with the next try, where the run keeps going."""
        try:
            yield
        except OSError as error:
            if not self._keep_going:
                raise
            logger.warning("%s cannot be sent now (%s): its lines are kept", METRICS, error)

    def _append(self, line: bytes) -> None:
        """Appends whole lines, those that could not be written before first."""
        first = not self._unwritten
        lines = self._unwritten + line
        end = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(lines)
            if written != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), end)
            if not self._keep_going:
                raise
            self._unwritten = lines
            if first:
                logger.warning("%s cannot be written now (%s): its lines are kept", METRICS, error)
        else:
            self._unwritten = b""

    def close(self) -> None:
        """Closes the files."""
        if self._unwritten:
            with contextlib.suppress(OSError):
                self._append(b"")
        self._file.close()
        if self._board is not None:
            self._board.close()
        with self._kept():
            self._mirror.close()


def _repair(path: Path, resume_step: int | None) -> None:
    """Drops a half-written last line, and the lines after the step that training resumes from."""
    if not path.exists():
        return
    lines = read_lines(path)
    kept = [line for line in lines if resume_step is None or line["step"] <= resume_step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    if text == path.read_text(encoding="utf-8"):
        return
    if len(kept) < len(lines):
        logger.info("%s: dropped %d lines after step %s", path, len(lines) - len(kept), resume_step)
    write_text_atomic(path, text)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a metrics file; a last line that a kill cut off is left out."""
    texts = path.read_text(encoding="utf-8").split("\n")
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text) if text else None
            if line is not None and not isinstance(line.get("step"), int):
                raise ValueError("it has no step")
        except (ValueError, AttributeError) as error:
            if number == len(texts):  # no newline after it: it was being written
                break
            raise ValueError(
                f"{path}, line {number}: not a line of metrics ({error}): take it out to go on"
            ) from error
        if line is not None:
            lines.append(line)
    return lines


def _flatten(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _scalar(name: str, value: Any) -> float | int | str | bool | None:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf" + "V":  # V: bfloat16 and its like
        raise ValueError(f"metric {name!r} is not a number: shape {array.shape}, {array.dtype}")
    item = array.reshape(()).item()
    return item if isinstance(item, bool | int) else float(item)


class Progress:
    """Shows how a run goes: one line rewritten on a terminal, else a plain line now and then.

    The line holds step and total, a bar, the loss terms, images per second, what the time since the
    last line went into, the time left, the last AP when known, and the work directory.
    """

    def __init__(
        self,
        total: int,
        workdir: str | Path,
        *,
        batch_size: int = 0,
        start: int = 0,
        interval: float = 20.0,
        stream: TextIO | None = None,
    ):
        """Prepares the line; nothing is shown before the first update.

        Args:
          total: last step.
          workdir: shown as the place where results go.
          batch_size: images per step over all processes; 0 shows steps per second instead.
          start: step that a resumed run starts from.
          interval: seconds between plain lines where the stream is no terminal.
          stream: standard error by default.
        """
        self.total, self.workdir, self.batch_size = total, str(workdir), batch_size
        self._stream = stream if stream is not None else sys.stderr
        self._is_terminal = bool(getattr(self._stream, "isatty", lambda: False)())
        self._interval = 0.2 if self._is_terminal else interval
        self._ap: float | None = None
        self._shown_at = -math.inf
        self._width = 0
        # The first step holds the compilation: speed is measured from its end.
        self._origin: tuple[int, float] | None = None
        self._step = start
        self._spent: dict[str, float] = {}

    def update(
        self,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        """Reports that ``step`` is done; draws only when a new line is due.

        Args:
          step: steps done so far.
          metrics: loss terms; fetched from the device only if they are drawn. A value under
            ``AP`` (or ending in ``/AP``) is remembered, others are shown once.
          seconds: what the time since the last update went into; shown as shares.
        """
        now = time.monotonic()
        self._step = step
        if self._origin is None:
            self._origin = step, now
        for name, value in _flatten(metrics or {}):
            if name.rsplit("/", 1)[-1] == "AP":
                self._ap = float(value)
        for part, spent in (seconds or {}).items():
            self._spent[part] = self._spent.get(part, 0.0) + spent
        if now - self._shown_at < self._interval and step < self.total:
            return
        self._shown_at = now
        self._draw(self._line(now, metrics or {}))

    def write(self, text: str) -> None:
        """Prints a line of its own without breaking the progress line."""
        self._clear()
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the progress line, so that what follows starts on a new one."""
        if self._is_terminal and self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0

    def _line(self, now: float, metrics: Mapping[str, Any]) -> str:
        done = min(self._step / self.total, 1.0) if self.total else 1.0
        filled = int(done * 20)
        parts = [f"step {self._step}/{self.total} [{'#' * filled}{'.' * (20 - filled)}]"]
        terms = []
        for name, value in _flatten(metrics):
            number = _scalar(name, value)
            if isinstance(number, int | float) and name.rsplit("/", 1)[-1] != "AP":
                terms.append(f"{name.removeprefix('train/')} {number:.4g}")
        if terms:
            parts.append(" ".join(terms))
        steps, seconds = self._step - self._origin[0], now - self._origin[1]  # type: ignore[index]
        if steps > 0 and seconds > 0:
            rate = steps / seconds
            parts.append(
                f"{rate * self.batch_size:.3g} images/s" if self.batch_size else f"{rate:.3g} st/s"
            )
            parts.append(f"{format_seconds((self.total - self._step) / rate)} left")
        if self._spent:
            parts.append(shares(self._spent))
            self._spent = {}
        if self._ap is not None and self._ap >= 0:
            parts.append(f"AP {100 * self._ap:.1f}")
        return " | ".join([*parts, self.workdir])

    def _draw(self, line: str) -> None:
        if not self._is_terminal:
            self._stream.write(line + "\n")
        else:
            columns = _columns(self._stream)
            line = line if len(line) < columns else line[: columns - 2] + "…"
            self._stream.write("\r" + line + " " * max(0, self._width - len(line)))
            self._width = len(line)
        self._stream.flush()

    def _clear(self) -> None:
        if self._is_terminal and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0


def shares(seconds: Mapping[str, float], names: Mapping[str, str] | None = None) -> str:
    """The parts that take a percent and more, largest first: ``93% step, 5% input``.

    Args:
      seconds: of each part.
      names: words for the parts.
    """
    whole = max(sum(seconds.values()), 1e-9)
    found = sorted(seconds, key=lambda part: -seconds[part])
    return ", ".join(
        f"{seconds[part] / whole:.0%} {(names or {}).get(part, part)}"
        for part in found
        if seconds[part] >= 0.005 * whole
    )


def format_seconds(seconds: float) -> str:
    """Formats a duration for people: ``42s``, ``3m05s``, ``2h07m``, ``3d04h``."""
    whole = max(0, round(seconds))
    for size, unit, part, part_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{part_unit}"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 100
    except (OSError, ValueError, AttributeError):
        return 100
