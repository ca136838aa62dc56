"""The same ONNX file in OpenVINO, timed, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


class OpenVinoRunner:
    """See ``runner.Runner``.

    Args:
      path: an ONNX file with inputs ``images`` and ``sizes``.
      threads: that it may use.
      size: (height, width) that the file must be for, or None.

    Attributes:
      facts: see there; the rest is ONNX Runtime's to say.

    Raises:
      ValueError: OpenVINO is not installed, or the file is for other images.
    """

    def __init__(self, path: str, threads: int, size: tuple[int, int] | None):
        try:
            import openvino
        except ImportError:
            raise ValueError("OpenVINO is not installed: pip install openvino") from None
        core = openvino.Core()
        model = core.read_model(path)
        batch, height, width, _ = model.input("images").shape
        if size is not None and size != (height, width):
            raise ValueError(f"it is for images of {height}x{width}, not of {size[0]}x{size[1]}")
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # as the others: no bfloat16 where there is some
        }
        self._compiled = core.compile_model(model, "CPU", settings)
        self.facts: dict[str, Any] = {"height": height, "width": width, "batch": batch}

    def prepare(self, images: np.ndarray, sizes: np.ndarray) -> Callable[[], Any]:
        """See there."""
        feeds = {"images": images, "sizes": sizes}
        outputs = self._compiled.outputs
        request = self._compiled.create_infer_request()

        def run() -> list[np.ndarray]:
            found = request.infer(feeds)
            return [np.asarray(found[output]) for output in outputs]

        return run

    def profile(self, runs: int) -> None:
        """Not asked."""
