"""ONNX Runtime with a stated number of threads, timed, and asked where its time goes.

It opens files itself: what else is loaded would be in the memory that it is said to take.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from aqdetr_jax.deploy.onnx.facts import read_facts
from aqdetr_jax.paths import as_path


class OnnxRunner:
    """See ``deploy.runner.Runner``.

    Args:
      path: an ONNX file with inputs ``images`` and ``sizes``.
      threads: that operators may use; they run one after the other.
      size: (height, width) that the file must be for, or None.

    Attributes:
      facts: see there.

    Raises:
      ValueError: the file is none of ours, or for other images.
    """

    def __init__(self, path: str, threads: int, size: tuple[int, int] | None):
        self._path, self._threads = path, threads
        self._session = self._open()
        self.facts = file_facts(self._session, path, size)
        self._feeds: dict[str, np.ndarray] = {}

    def _open(self, trace: str = "") -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        if trace:
            options.enable_profiling = True
            options.profile_file_prefix = trace
        return ort.InferenceSession(self._path, options, providers=["CPUExecutionProvider"])

    def prepare(self, images: np.ndarray, sizes: np.ndarray) -> Callable[[], Any]:
        """See there."""
        self._feeds = {"images": images, "sizes": sizes}
        return lambda: self._session.run(None, self._feeds)

    def profile(self, runs: int) -> list[dict[str, Any]]:
        """See there; in a session of its own, since tracing takes time."""
        with tempfile.TemporaryDirectory() as folder:
            session = self._open(str(Path(folder) / "trace"))
            for _ in range(runs + 1):
                session.run(None, self._feeds)
            return operator_times(json.loads(Path(session.end_profiling()).read_text()))


def file_facts(
    session: ort.InferenceSession, path: str, size: tuple[int, int] | None
) -> dict[str, Any]:
    """What a file says of itself.

    Args:
      session: of the file.
      path: of the file.
      size: (height, width) that it must be for, or None.

    Raises:
      ValueError: it is none of ours, or for other images.
    """
    known = read_facts(session.get_modelmeta().custom_metadata_map, "it")
    batch, height, width, _ = session.get_inputs()[0].shape
    if size is not None and size != (height, width):
        raise ValueError(f"it is for images of {height}x{width}, not of {size[0]}x{size[1]}")
    return {
        "height": height,
        "width": width,
        "batch": batch,
        "bits": known["bits"],
        "family": known["model"]["family"],
        "file_bytes": as_path(path).stat().st_size,
    }


def operator_times(events: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Nodes of ONNX Runtime's trace with the median of their time, the first run left out.

    Args:
      events: of its profiling file.

    Returns:
      One dict a node: ``node``, ``operator``, ``milliseconds``, ``types`` (of its inputs).
    """
    runs = sorted(e["ts"] for e in events if e.get("name") == "model_run")
    nodes: dict[str, dict[str, Any]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        if len(runs) > 1 and event["ts"] < runs[1]:
            continue
        facts = event["args"]
        node = nodes.setdefault(
            f"{facts.get('node_index')} {name}",
            {
                "node": name.removesuffix("_kernel_time"),
                "operator": facts["op_name"],
                "types": [kind for one in facts.get("input_type_shape", []) for kind in one],
                "times": [],
            },
        )
        node["times"].append(event["dur"] / 1e3)
    return [
        {**{k: v for k, v in node.items() if k != "times"}, "milliseconds": _median(node["times"])}
        for node in nodes.values()
    ]


def _median(values: list[float]) -> float:
    return float(np.median(values))
