"""Bilinear samples for deformable attention.

ONNX Runtime's ``GridSample`` is several times as fast as gathers of neighbours' rows and their
weighted sums (see docs/deploy.md), because it reads every channel's plane with the weights of a
point at hand. Points lie along the last axis but one of its output, queries along the last: so all
that follows runs along queries, without a sum over neighbours in memory.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from aqdetr_jax.deploy.onnx.attention import AttentionOperations
from aqdetr_jax.deploy.onnx.graph import Value
from aqdetr_jax.deploy.onnx.tensors import Coded, Site
from aqdetr_jax.deploy.operations import Shapes, Tensor
from aqdetr_jax.deploy.parts import Grid


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples, level by level, with the queries last.

    Attributes:
      levels: [B, H, D * K, Q] each; codes where there is a grid.
      shape: [B, H, Q, P, D], what the vocabulary means.
      coded: says what the codes are, None for floats.
    """

    levels: tuple[Value, ...]
    shape: tuple[int, int, int, int, int]
    coded: Coded | None = None


class SamplingOperations(AttentionOperations):
    """The words for samples."""

    def sample(self, values: Tensor, locations: Tensor, shapes: Shapes) -> Tensor:
        """See ``Operations``."""
        values, locations = self.value(values), self.value(locations)
        batch, length, heads, width = values.shape
        _, queries, _, levels, points, _ = locations.shape
        planes = self.transposed(self.reshape(values, (batch, length, heads * width)), (0, 2, 1))
        # From [0, 1] to [-1, 1], and [L, B, H, K, Q, 2]: points before queries.
        where = self.subtract(self.multiply(locations, np.float32(2)), np.float32(1))
        where = self.transposed(where, (3, 0, 2, 4, 1, 5))
        found, start = [], 0
        for level, (height, breadth) in enumerate(shapes):
            plane = self.sliced(planes, 2, start, start + height * breadth)
            plane = self.reshaped(plane, (batch * heads, width, height, breadth))
            grid = self.sliced(where, 0, level, level + 1)
            grid = self.reshaped(grid, (batch * heads, points, queries, 2))
            samples = self.graph.add(
                "GridSample",
                [plane, grid],
                (batch * heads, width, points, queries),
                "f4",
                mode="linear",
                padding_mode="zeros",
                align_corners=0,
            )
            found.append(self.reshaped(samples, (batch, heads, width * points, queries)))
            start += height * breadth
        return Samples(tuple(found), (batch, heads, queries, levels * points, width))

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        """See ``Operations``."""
        if not isinstance(x, Samples):
            return super().quantize(x, grid)
        coded = [self.on_grid(level, grid) for level in x.levels]
        values = tuple(c.value for c in coded)
        names = tuple(value.name for value in values)
        self.sites.append(Site(grid, coded[0].carrier, names, x.shape, "samples"))
        return Samples(values, x.shape, coded[0])

    def mix_samples(self, weights: Tensor, samples: Tensor) -> Tensor:
        """See ``Operations``."""
        batch, heads, queries, points, width = samples.shape
        coded = isinstance(weights, Coded) and samples.coded is not None
        w = weights.value if isinstance(weights, Coded) else self.value(weights)
        w = self.transposed(w, (0, 1, 3, 2))  # [B, H, P, Q]
        each = points // len(samples.levels)
        total: Value | None = None
        for i, level in enumerate(samples.levels):
            part = self.sliced(w, 2, i * each, (i + 1) * each)
            part = self.reshaped(part, (batch, heads, 1, each, queries))
            level = self.reshaped(level, (batch, heads, width, each, queries))
            if isinstance(weights, Coded):
                part = self._operand(dataclasses.replace(weights, value=part), whole=coded)
            if samples.coded is not None:
                level = self._operand(dataclasses.replace(samples.coded, value=level), whole=coded)
            mixed = self.reduced("ReduceSum", self.multiply(level, part), 3, keep=False)
            total = mixed if total is None else self.add(total, mixed)
        assert total is not None
        mixed = self.transposed(total, (0, 1, 3, 2))
        if not coded:
            return mixed
        unit = np.float32(weights.grid.step) * np.float32(samples.coded.grid.step)
        return self.multiply(mixed, unit.reshape(-1, 1, 1) if np.ndim(unit) else unit)
