"""Our own models in JAX, timed: as trained (float or fake-quantized), or packed as integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aqdetr_jax import host
from aqdetr_jax.checkpoint.model_folder import ModelBundle, model_folder
from aqdetr_jax.deploy.archive import MANIFEST, WEIGHTS
from aqdetr_jax.deploy.load import open_model
from aqdetr_jax.deploy.network import Network
from aqdetr_jax.evaluation.evaluator import make_predict_fn
from aqdetr_jax.models.detector import example_input
from aqdetr_jax.paths import as_path
from aqdetr_jax.quant.record import recording


class JaxRunner:
    """See ``runner.Runner``; XLA takes as many threads as the process has cores.

    Args:
      path: of a trained or a packed model.
      size: (height, width) of images; None = the model's first bucket.

    Attributes:
      facts: see there.
    """

    def __init__(self, path: str, size: tuple[int, int] | None):
        host.use_cpu()
        host.use_compilation_cache()
        self._bundle = open_model(path)
        height, width = size or self._bundle.input.buckets[0]
        files = list(as_path(model_folder(path)).rglob("*"))
        if isinstance(self._bundle.variables, Network):
            files = [as_path(path) / name for name in (MANIFEST, WEIGHTS)]
        self.facts: dict[str, Any] = {
            "height": height,
            "width": width,
            "batch": 1,
            "bits": weight_bits(self._bundle),
            "family": self._bundle.config.family,
            "file_bytes": sum(file.stat().st_size for file in files if file.is_file()),
        }

    def prepare(self, images: np.ndarray, sizes: np.ndarray) -> Callable[[], Any]:
        """See there."""
        device = jax.local_devices()[0]
        mesh = Mesh(np.array([device]).reshape(1, 1), ("data", "model"))
        predict = make_predict_fn(self._bundle.module(), mesh, len(self._bundle.class_names))
        variables = jax.device_put(self._bundle.variables, device)
        mask = np.zeros(images.shape[:3], bool)
        for row, (height, width) in zip(mask, sizes, strict=True):
            row[:height, :width] = True
        return lambda: jax.device_get(predict(variables, images, mask, sizes))

    def profile(self, runs: int) -> None:
        """XLA fuses operators into programs that have no such names."""


def weight_bits(bundle: ModelBundle) -> int:
    """Bits of most of a model's weights, 32 of a float model."""
    if isinstance(bundle.variables, Network):
        return bundle.variables.weight_bits
    counts: Counter[int] = Counter()
    if bundle.quant.quantized:
        with recording() as rows:
            jax.eval_shape(
                bundle.module().apply, bundle.variables, *example_input(bundle.input.buckets[0])
            )
        for row in rows:
            if row.weight is not None:
                counts[row.weight.bits] += row.kernel_size
    return counts.most_common(1)[0][0] if counts else 32
