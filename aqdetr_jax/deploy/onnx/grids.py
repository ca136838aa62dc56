"""Codes on their grids, in the form that ONNX Runtime computes with integers.

A product of codes is written as dequantized operands, a float operator and, where its sums go to a
grid, a quantizer: ONNX Runtime fuses these to one integer operator (``QLinearConv``, ``QGemm``,
``MatMulIntegerToFloat``), and any other runtime can read them. The numbers are chosen so that the
fused operator computes the rule of ``deploy.parts`` bit for bit:

* Operands are dequantized with step 1 and quantizers have step 1; the weights' scale is the whole
  factor that sums are multiplied with, unit or unit / step, rounded to float32 by us.
* Reshapes and transposes are of bytes: between a dequantizer and what it feeds a runtime would put
  another pair.
* A byte's own end is one end of a grid; the other is cut off on the bytes, after the quantizer. A
  float ``Clip`` before it would keep the runtime from fusing.
* Weights are signed bytes where two products of bytes fit in 16 bits: x86 without VNNI adds pairs
  of products there, and saturates. Elsewhere (8 bits by 8 bits) they are unsigned with zero point
  128, which have another kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from aqdetr_jax.deploy.onnx.floats import FloatOperations
from aqdetr_jax.deploy.onnx.graph import Graph, Value
from aqdetr_jax.deploy.onnx.tensors import Carrier, Coded, Map, MapSum, Site, Sums, carrier
from aqdetr_jax.deploy.operations import Tensor
from aqdetr_jax.deploy.parts import Grid


class GridOperations(FloatOperations):
    """The words for grids.

    Attributes:
      dtype: of the activations' bytes, uint8 (x86) or int8 (ARM).
      sites: of all quantizers, in order.
    """

    def __init__(self, graph: Graph, dtype: DTypeLike = np.uint8):
        super().__init__(graph)
        self.dtype = np.dtype(dtype)
        self.sites: list[Site] = []

    # --- grids ------------------------------------------------------------------------------------

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        """See ``Operations``."""
        if any(site.grid.site == grid.site for site in self.sites):
            raise ValueError(f"{grid.site} is asked for twice, and a tensor has one name")
        coded = self.on_grid(x, grid, grid.site)
        shape, layout = coded.value.shape, "plain"
        if coded.is_map:
            shape, layout = tuple(shape[i] for i in (0, 2, 3, 1)), "map"
        self.sites.append(Site(grid, coded.carrier, (grid.site,), shape, layout))
        return coded

    def on_grid(self, x: Tensor, grid: Grid, name: str | None = None) -> Coded:
        """``quantize``, of anything; the codes may have a name.

        A grid of heads is along axis 1, and along the last one of sums.
        """
        kind = carrier(grid, self.dtype)
        steps, low, high = np.asarray(grid.step, np.float32), kind.low, kind.high
        if getattr(x, "rectified", False):
            low = np.maximum(low, kind.zero)
        if getattr(x, "ceiling", None) is not None:
            # Rounding keeps the order, so that the end may be rounded before the comparison.
            high = np.minimum(high, kind.zero + np.rint(np.float32(x.ceiling) / steps).astype(int))
        is_map, back = isinstance(x, Map | MapSum), None
        if isinstance(x, Sums):
            is_map, fused = x.source.is_map, kind.is_bytes and x.source.carrier.is_bytes
            back = x.shape if fused and not is_map else None
            channels = len(x.layer.bias)
            steps, low, high = (
                np.repeat(a, channels // len(a)) if a.ndim else a for a in (steps, low, high)
            )
            y = self.times(x, (x.layer.unit / steps).astype(np.float32), fused=fused)
            steps = np.ones((), np.float32)
        elif isinstance(x, MapSum):
            y, steps = self._added(x, steps), np.ones((), np.float32)
        else:
            y = x.value if isinstance(x, Map) else self.value(x)
            after = (1,) * (len(y.shape) - 2)
            low, high = (a.reshape(-1, *after) if a.ndim else a for a in (low, high))
        if y.rows is not None and not steps.ndim:
            rows = self._codes(y.rows, steps, kind, low, high, name)
            return Coded(self.of_rows(rows, y.shape), grid, kind, is_map)
        return Coded(self._codes(y, steps, kind, low, high, name, back), grid, kind, is_map)

    def _codes(
        self,
        y: Value,
        steps: np.ndarray,
        kind: Carrier,
        low: np.ndarray,
        high: np.ndarray,
        name: str | None,
        back: tuple[int, ...] | None = None,
    ) -> Value:
        """``y / steps`` rounded and cut to [low, high]; the last of it has the name.

        Args:
          y: values.
          steps: [] or of axis 1.
          kind: the codes' carrier.
          low: smallest carried code, broadcastable.
          high: largest.
          name: of the tensor of codes.
          back: what a ``times(fused=True)`` of rows is brought back to; [..., N].
        """
        ends = (-np.inf, np.inf)
        if kind.is_bytes:
            ends = (np.iinfo(kind.dtype).min, np.iinfo(kind.dtype).max)
        below, above = bool(np.any(low > ends[0])), bool(np.any(high < ends[1]))
        low, high = np.asarray(low, kind.dtype), np.asarray(high, kind.dtype)
        cuts: list[tuple[str, list[np.ndarray]]]
        if (below or above) and not low.ndim:
            cuts = [("Clip", [low, high])]
        else:
            cuts = [("Max", [low])] * below + [("Min", [high])] * above  # of every head its own
        if kind.is_bytes:
            zero = np.full(steps.shape, kind.zero, kind.dtype)
            todo = [("QuantizeLinear", [steps, zero])]
        else:
            after = (1,) * (len(y.shape) - 2)
            todo = [("Div", [steps.reshape(-1, *after) if steps.ndim else steps]), ("Round", [])]
        if back is not None:
            todo += [("Transpose", []), *cuts]
        else:
            todo += cuts
        x = y
        for number, (operator, operands) in enumerate(todo, 1):
            label = name if number == len(todo) else None
            given = [x, *(self.graph.constant(a) for a in operands)]
            attributes: dict[str, Any] = {}
            shape = x.shape
            if operator == "Transpose":
                attributes, shape = {"perm": [0, 2, 3, 1]}, tuple(shape[i] for i in (0, 2, 3, 1))
            elif operator == "QuantizeLinear" and steps.ndim:
                attributes = {"axis": 1}
            x = self.graph.add(operator, given, shape, kind.dtype, name=label, **attributes)
        if back is None:
            return x
        return self.of_rows(self.reshaped(x, (-1, back[-1])), back)

    def times(self, x: Sums, factor: np.ndarray, *, fused: bool = False) -> Value:
        """Sums times a factor a channel."""
        raise NotImplementedError

    def _added(self, x: MapSum, step: np.ndarray) -> Value:
        """The sum of two coded maps in units of a step."""
        a, b = (
            self.dequantized(c.value, np.float32(c.grid.step) / step, c.carrier) for c in (x.a, x.b)
        )
        return self.graph.add("Add", [a, b], a.shape, a.dtype)

    def dequantized(self, x: Value, step: np.ndarray, kind: Carrier) -> Value:
        """``code * step`` of an array of codes; a step a head is along axis 1."""
        step = np.asarray(step, np.float32)
        if not kind.is_bytes:
            after = (1,) * (len(x.shape) - 2)
            return self.elementwise("Mul", x, step.reshape(-1, *after) if step.ndim else step)
        operands = [
            self.graph.constant(a) for a in (step, np.full(step.shape, kind.zero, kind.dtype))
        ]
        source = x.rows if x.rows is not None and not step.ndim else x
        attributes: dict[str, Any] = {"axis": 1} if step.ndim else {}
        y = self.graph.add(
            "DequantizeLinear", [source, *operands], source.shape, "f4", **attributes
        )
        return y if source is x else self.of_rows(y, x.shape)

    def dequantize(self, x: Tensor) -> Tensor:
        """See ``Operations``."""
        y = self.dequantized(x.value, x.grid.step, x.carrier)
        return Map(y) if x.is_map else y
