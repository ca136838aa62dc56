"""One model in one runtime, timed: a process of its own, so that its memory is its own.

``python -m aqdetr_jax.deploy.runner RUNTIME`` reads one JSON request a line and answers each with
one JSON line, see ``contestant``. Only what the runtime needs is imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol, TextIO

import numpy as np

from aqdetr_jax.deploy.cpu import limit_cores, peak_bytes

RUNTIMES = ("jax", "onnxruntime", "openvino")

MOST_SAID = 500
"""Characters of a runtime's error that are passed on, in one line."""


class Runner(Protocol):
    """A model that is ready.

    Attributes:
      facts: plain JSON values: height, width, batch, bits (of most weights, 32 = float), family,
        file_bytes.
    """

    facts: dict[str, Any]

    def prepare(self, images: np.ndarray, sizes: np.ndarray) -> Callable[[], Any]:
        """What is timed: from images on the host to detections on the host.

        Args:
          images: uint8 [B, H, W, 3].
          sizes: int32 [B, 2], (height, width) of the real images.
        """
        ...

    def profile(self, runs: int) -> list[dict[str, Any]] | None:
        """Time by operator, see ``operators``; None where the runtime tells none."""
        ...


def open_runner(runtime: str, path: str, threads: int, size: tuple[int, int] | None) -> Runner:
    """Loads a model.

    Args:
      runtime: one of ``RUNTIMES``.
      path: of the model.
      threads: that it may use.
      size: (height, width) of images; None = the model's own.

    Raises:
      ValueError: it cannot be used so; says why.
    """
    if runtime == "onnxruntime":
        try:
            from aqdetr_jax.deploy.onnx.running import OnnxRunner
        except ModuleNotFoundError as error:
            raise ValueError(
                f"ONNX files need the package {error.name}: pip install 'aqdetr-jax[onnx]'"
            ) from None
        return OnnxRunner(path, threads, size)
    if runtime == "openvino":
        from aqdetr_jax.deploy.openvino_runner import OpenVinoRunner

        return OpenVinoRunner(path, threads, size)
    from aqdetr_jax.deploy.jax_runner import JaxRunner

    return JaxRunner(path, size)


class _Worker:
    """Answers requests."""

    def __init__(self, runtime: str):
        self._runtime = runtime
        self._runner: Runner | None = None
        self._run: Callable[[], Any] = lambda: None

    def open(self, path: str, threads: int, size: list[int] | None) -> dict[str, Any]:
        limit_cores(threads)
        start = time.perf_counter()
        given = None if size is None else (size[0], size[1])
        self._runner = open_runner(self._runtime, path, threads, given)
        return {"load_seconds": time.perf_counter() - start, **self._runner.facts}

    def image(self, file: str) -> dict[str, Any]:
        """Takes the input and runs twice: what compiles does so, and what is allocated once is."""
        assert self._runner is not None
        with np.load(file) as arrays:
            self._run = self._runner.prepare(arrays["images"], arrays["sizes"])
        seconds = [self._timed() for _ in range(2)]
        return {"first_seconds": seconds[0], "seconds": seconds[1]}

    def turn(self, untimed: int, seconds: float, most: int) -> dict[str, Any]:
        for _ in range(untimed):
            self._run()
        times = [self._timed()]
        while len(times) < most and sum(times) < seconds:
            times.append(self._timed())
        return {"seconds": times}

    def memory(self) -> dict[str, Any]:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        return {"peak_bytes": peak_bytes(), "cores": cores}

    def profile(self, runs: int) -> dict[str, Any]:
        assert self._runner is not None
        return {"operators": self._runner.profile(runs)}

    def _timed(self) -> float:
        start = time.perf_counter()
        self._run()
        return time.perf_counter() - start


def serve(runtime: str, requests: TextIO, replies: TextIO) -> None:
    """Answers until there are no more requests, or one fails."""
    worker = _Worker(runtime)
    for line in requests:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:  # whatever a runtime raises: the parent says it
            traceback.print_exc()
            text = " ".join(str(error).split()) or type(error).__name__
            answer = {"error": text[:MOST_SAID]}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()
        if "error" in answer:
            return


def main() -> None:
    """The process."""
    runtime = sys.argv[1]
    if runtime == "jax":
        from aqdetr_jax import host

        host.keep_memory()  # as the command line does
    # What libraries print must not stand between the answers.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(runtime, sys.stdin, replies)


if __name__ == "__main__":
    main()
