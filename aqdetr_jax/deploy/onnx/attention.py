"""Products of two activations: scores, mixed values, mixed samples."""

from __future__ import annotations

import numpy as np

from aqdetr_jax.deploy.onnx.graph import Value
from aqdetr_jax.deploy.onnx.layers import LayerOperations
from aqdetr_jax.deploy.onnx.tensors import Coded
from aqdetr_jax.deploy.operations import Tensor


class AttentionOperations(LayerOperations):
    """The words for attention."""

    def scores(self, q: Tensor, k: Tensor, factor: float) -> Tensor:
        """See ``Operations``.

        In floats, with the unit in the queries: sums are short and many, so that a product of bytes
        gains nothing, and a multiplication of all scores costs a third of their product.
        """
        if isinstance(q, Coded) and isinstance(k, Coded):
            unit = np.float32(q.grid.step) * np.float32(k.grid.step) * np.float32(factor)
            x, y = (self._operand(v, whole=True) for v in (q, k))
            x = self.multiply(x, unit.reshape(-1, 1, 1) if unit.ndim else unit)
        else:
            x, y = (self._operand(v, whole=False) for v in (q, k))
            x = self.multiply(x, np.float32(factor))
        y = self.transposed(y, (0, 1, 3, 2))
        return self._floats_product(x, y)

    def _floats_product(self, x: Value, y: Value) -> Value:
        return self.graph.add("MatMul", [x, y], (*x.shape[:-1], y.shape[-1]), "f4")

    def mix(self, weights: Tensor, values: Tensor) -> Tensor:
        """See ``Operations``."""
        coded = isinstance(weights, Coded) and isinstance(values, Coded)
        x, y = (self._operand(v, whole=coded) for v in (weights, values))
        mixed = self._floats_product(x, y)
        if not coded:
            return mixed
        unit = np.float32(weights.grid.step) * np.float32(values.grid.step)
        return self.multiply(mixed, unit.reshape(-1, 1, 1) if np.ndim(unit) else unit)
