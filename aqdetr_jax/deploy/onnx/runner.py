"""Exported files computed by ONNX Runtime."""

from __future__ import annotations

import collections
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from aqdetr_jax.deploy.onnx.model import OnnxModelError, codes_of, read_onnx, with_codes
from aqdetr_jax.paths import as_path

PROVIDER = "CPUExecutionProvider"


class OnnxDetector:
    """A file of ``aqdetr export --format=onnx``, ready to detect.

    Args:
      path: the file.
      threads: of one operator; None = as many as there are cores.

    Attributes:
      name: of the runtime.
      facts: what the file says of itself.

    Raises:
      FileNotFoundError: there is no file.
      OnnxModelError: it cannot be used; the message says why.
    """

    name = "ONNX Runtime"

    def __init__(self, path: str | Path, threads: int | None = None):
        self._path, self._threads = as_path(path), threads
        self._model, self.facts = read_onnx(path)
        self._session = self._open(self._model)
        self._with_codes: onnxruntime.InferenceSession | None = None

    def _open(self, model: onnx.ModelProto) -> onnxruntime.InferenceSession:
        try:
            return _session(model, self._threads)
        except Exception as error:  # its exceptions have no common class
            reason = str(error).splitlines()[0]
            raise OnnxModelError(f"{self._path}: ONNX Runtime cannot open it: {reason}") from None

    def run(self, images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs by name.

        Args:
          images: uint8 [B, H, W, 3] of the file's size.
          sizes: int32 [B, 2], (height, width) of the real images.

        Raises:
          ValueError: the images are of another size than the file's.
        """
        return self._run(self._session, images, sizes)

    def _run(self, session, images, sizes) -> dict[str, np.ndarray]:
        wanted = session.get_inputs()[0].shape
        if list(np.shape(images)) != wanted:
            raise ValueError(f"{self._path} takes images {wanted}, got {list(np.shape(images))}")
        given = {"images": np.asarray(images, np.uint8), "sizes": np.asarray(sizes, np.int32)}
        names = [x.name for x in session.get_outputs()]
        return dict(zip(names, session.run(names, given), strict=True))

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """(batch, height, width, 3) of its images."""
        batch, height, width, channels = self._session.get_inputs()[0].shape
        return batch, height, width, channels

    def codes(self, images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        """The codes of every quantizer by site, int32."""
        if self._with_codes is None:
            self._with_codes = self._open(with_codes(self._model))
        return codes_of(self.facts, self._run(self._with_codes, images, sizes))


def optimized(model: onnx.ModelProto) -> onnx.ModelProto:
    """What ONNX Runtime makes of a model before it runs it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        _session(model, 1, optimized=path)
        return onnx.load(path)


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """How many nodes of each kind a model has; ``com.microsoft:QGemm`` is a kind of a domain."""
    return dict(collections.Counter(kind_of(node) for node in model.graph.node))


def kind_of(node: onnx.NodeProto) -> str:
    """A node's kind with its domain."""
    return f"{node.domain}:{node.op_type}" if node.domain else node.op_type


def unfused(model: onnx.ModelProto) -> list[str]:
    """Names of the products in an optimised model whose operands are dequantized first.

    They are computed with floats where integers were meant. (The stem of a backbone that pools is
    meant so.)
    """
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    products = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add")
    return [
        node.name
        for node in model.graph.node
        if node.op_type in products
        and len(node.input) > 1
        and all(made.get(name) == "DequantizeLinear" for name in node.input)
    ]


def _session(
    model: onnx.ModelProto,
    threads: int | None,
    *,
    optimized: Path | None = None,
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3  # errors; what it optimises is no warning for our users
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[PROVIDER])
