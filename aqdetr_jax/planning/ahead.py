"""Compiles a configuration's step for a slice of TPUs without one, and reads what XLA made of it.

Code generation takes most of the time of such a compilation, and what a step moves and holds is
decided before it: by default the compiler is ended as soon as its buffers are assigned.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from aqdetr_jax.config_types import from_dataclass
from aqdetr_jax.io import read_json, write_json_atomic
from aqdetr_jax.planning.chips import Slice
from aqdetr_jax.planning.memory import Memory, argument_names, read_memory
from aqdetr_jax.planning.traffic import Program, read_program
from aqdetr_jax.provenance import package_versions
from aqdetr_jax.training.config import ExperimentConfig

Kind = Literal["train", "eval"]

INSTALL = "pip install 'jax[tpu]'"
"""Adds libtpu for the version of JAX that is there; so does ``requirements-tpu.txt``."""

LIBTPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
"""Lets libtpu compile where no TPU is, beside others; what a cache holds would not be dumped."""

_POLL_SECONDS = 0.5
_TEXT, _BUFFERS, _GIVEN = (
    "*.after_optimizations.txt",
    "*.after_optimizations-buffer-assignment.txt",
    "*.before_optimizations.txt",
)
_REPORT = "*.after_optimizations-memory-usage-report.txt"
"""What XLA writes after the buffer assignment."""

_REASON = re.compile(r"Check failed|^[\w.]*(Error|Exception)\b|^Killed")


@dataclasses.dataclass(frozen=True)
class Case:
    """One program.

    Attributes:
      config: every size given; ``train.batch_size`` and ``train.eval_batch_size`` are the rows of
        a step, over the slice.
      place: where it shall run.
      bucket: height and width of the images.
      kind: the training step, or the inference of an evaluation.
    """

    config: ExperimentConfig
    place: Slice
    bucket: tuple[int, int]
    kind: Kind


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case.

    Attributes:
      program: what it moves.
      memory: what it holds on a device.
      limit: bytes of HBM that it may use on a device.
      seconds: of tracing and compiling, until the compiler ended or was ended.
      complete: whether code was generated.
    """

    program: Program
    memory: Memory
    limit: int
    seconds: float
    complete: bool

    @property
    def fits(self) -> bool:
        """Whether there is room for it (without its code, where none was generated)."""
        return self.memory.total <= self.limit


def versions() -> dict[str, str]:
    """Versions of what compiles, and of what results depend on otherwise."""
    try:
        compiler = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        compiler = "unknown"
    return {**package_versions(), "libtpu": compiler}


def check_libtpu() -> None:
    """Raises an error that says what to install where the compiler for TPUs is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(
            f"libtpu, the compiler for TPUs, is not installed (no TPU is needed): {INSTALL}"
        )


def compile_ahead(case: Case, *, fast: bool = True) -> Compiled:
    """Compiles a program.

    Args:
      case: the program.
      fast: end the compiler once its buffers are assigned; else let it generate code.

    Raises:
      RuntimeError: libtpu is not installed, or the compiler failed for another reason than memory;
        the message has its words.
      ValueError: the configuration cannot be laid out on the slice.
    """
    check_libtpu()
    start = time.perf_counter()
    # Hundreds of megabytes, which are gone when the block is left.
    with tempfile.TemporaryDirectory(prefix="aqdetr_plan_") as name:
        folder = Path(name)
        dump = folder / "dump"
        dump.mkdir()
        write_json_atomic(
            folder / "case.json",
            {
                "config": from_dataclass(case.config),
                "topology": case.place.name,
                "bucket": case.bucket,
                "kind": case.kind,
            },
        )
        words = _run(folder, dump, fast)
        seconds = time.perf_counter() - start
        done = read_json(folder / "done.json") if (folder / "done.json").is_file() else {}
        if "refused" in done:
            raise ValueError(done["refused"])
        if not _assigned(dump) or not (done or fast):
            raise RuntimeError(f"compiling for {case.place.name} failed:\n{words}")
        memory = read_memory(
            _lines(dump, _BUFFERS), argument_names(_lines(dump, _GIVEN)), done.get("code_bytes")
        )
        found = Compiled(
            program=read_program(_lines(dump, _TEXT)),
            memory=memory,
            limit=case.place.kind.hbm,
            seconds=seconds,
            complete="code_bytes" in done,
        )
    if found.fits and "error" in done:  # of another kind than too little memory
        raise RuntimeError(f"compiling for {case.place.name} failed:\n{done['error'][:4000]}")
    return found


def _run(folder: Path, dump: Path, fast: bool) -> str:
    """Runs the child until it ends, or until its buffers are assigned; returns its last words."""
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text=true"
    environment = {**os.environ, **LIBTPU, "XLA_FLAGS": flags}
    log = folder / "log.txt"
    with log.open("wb") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "aqdetr_jax.planning.child", str(folder)],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while child.poll() is None and not (fast and _assigned(dump)):
                time.sleep(_POLL_SECONDS)
        finally:
            if child.poll() is None:  # by its number: it is ours
                child.send_signal(signal.SIGKILL)
            child.wait()
    return last_words(log.read_text(errors="replace"))


def last_words(log: str) -> str:
    """Of a log the lines that say why a process died, else its last ones."""
    lines = log.strip().splitlines()
    reasons = [line for line in lines if _REASON.search(line)]
    return "\n".join(reasons[:3] or lines[-5:])


def _assigned(dump: Path) -> bool:
    """Whether the report that follows the buffer assignment of the step is written."""
    report = _file(dump, _REPORT)
    return report is not None and report.stat().st_size > 0


def _file(dump: Path, pattern: str) -> Path | None:
    """The step's file of one kind: small programs may be compiled on the way."""
    found = sorted(dump.glob(pattern), key=lambda path: path.stat().st_size)
    return found[-1] if found else None


def _lines(dump: Path, pattern: str) -> Iterator[str]:
    path = _file(dump, pattern)
    if path is None:
        raise RuntimeError(f"XLA dumped no {pattern}: this libtpu names its files otherwise")
    with path.open(encoding="utf-8", errors="replace") as stream:
        yield from stream
