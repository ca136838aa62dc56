"""An exported folder of ONNX files, one for each size of images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np

from aqdetr_jax.deploy.detector import DeployedBundle
from aqdetr_jax.deploy.onnx.model import onnx_model, save_onnx
from aqdetr_jax.deploy.onnx.runner import OnnxDetector


@dataclasses.dataclass(frozen=True)
class OnnxOptions:
    """How a network is written as ONNX, see ``model.onnx_model``.

    Attributes:
      batch: images at once.
      activations: bytes that carry the codes: uint8 for x86, int8 for ARM.
      outputs: "raw" or "detections".
    """

    batch: int = 1
    activations: Literal["uint8", "int8"] = "uint8"
    outputs: Literal["raw", "detections"] = "raw"

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"--batch={self.batch}: a file takes at least 1 image at once")


def write_folder(folder: Path, bundle: DeployedBundle, options: OnnxOptions) -> OnnxFolder:
    """Writes ``model_HEIGHTxWIDTH.onnx`` for every bucket of the model's image rule.

    Args:
      folder: empty, or not there yet.
      bundle: the network and what goes with it.
      options: see there.

    Raises:
      ValueError: the network cannot be written so; the message says why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for size in bundle.input.buckets:
        made = onnx_model(bundle, size=size, **vars(options))
        save_onnx(folder / f"model_{size[0]}x{size[1]}.onnx", made)
    return OnnxFolder(folder)


class OnnxFolder:
    """The files of a folder as one detector, see ``gate.Runtime``.

    Args:
      folder: with files of ``write_folder``.

    Attributes:
      name: of the runtime.
      batch: images at once.
      raw: whether class scores come out, else detections.
    """

    name = OnnxDetector.name

    def __init__(self, folder: Path):
        detectors = [OnnxDetector(file) for file in sorted(folder.glob("*.onnx"))]
        shapes = [d.input_shape for d in detectors]
        self._by_size = dict(zip((s[1:3] for s in shapes), detectors, strict=True))
        self.batch = shapes[0][0]
        self.raw = detectors[0].facts["outputs"] == "raw"

    def _of(self, images: np.ndarray) -> OnnxDetector:
        return self._by_size[images.shape[1:3]]

    def detect(self, images: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, ...]:
        """See ``gate.Runtime``."""
        found = self._of(images).run(images, sizes)
        return tuple(
            found[n] for n in (("logits", "boxes") if self.raw else ("scores", "labels", "boxes"))
        )

    def codes(self, images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        """See ``gate.Runtime``."""
        return self._of(images).codes(images, sizes)
