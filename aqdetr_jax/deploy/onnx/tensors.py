"""The tensors of the ONNX back end, beside plain values: maps, codes, and sums to be made."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import DTypeLike

from aqdetr_jax.deploy.onnx.graph import Value
from aqdetr_jax.deploy.parts import Grid, Layer


@dataclasses.dataclass(frozen=True)
class Map:
    """A float feature map.

    Attributes:
      value: [B, C, H, W].
    """

    value: Value


@dataclasses.dataclass(frozen=True)
class Carrier:
    """How the codes of a grid are stored: ``code + zero``.

    Attributes:
      dtype: uint8 or int8, or float32 where a byte has no room for the grids of all heads.
      zero: what carries code 0.
      low: smallest carried code, int32 [] or, where heads differ, [H].
      high: largest carried code.
    """

    dtype: np.dtype
    zero: int
    low: np.ndarray
    high: np.ndarray

    @property
    def is_bytes(self) -> bool:
        """Whether products of the codes can be products of bytes."""
        return self.dtype.kind != "f"


@dataclasses.dataclass(frozen=True)
class Coded:
    """Codes on a grid.

    Attributes:
      value: of the carrier's dtype.
      grid: what the codes stand for.
      carrier: how they are stored.
      is_map: whether the shape is [B, C, H, W].
    """

    value: Value
    grid: Grid
    carrier: Carrier
    is_map: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
    """An integer layer's sums, which no node computes before it is known what they become.

    Attributes:
      source: the layer's input.
      layer: which is integer.
      shape: of the result, [..., N] or [B, N, H, W].
      rectified: a ReLU follows.
      ceiling: where it ends, for a ReLU6.
    """

    source: Coded
    layer: Layer
    shape: tuple[int, ...]
    rectified: bool = False
    ceiling: float | None = None


@dataclasses.dataclass(frozen=True)
class MapSum:
    """The sum of two coded maps on its way to a grid.

    Attributes:
      a: one.
      b: the other, of its shape.
      rectified: a ReLU follows.
    """

    a: Coded
    b: Coded
    rectified: bool = False


def carrier(grid: Grid, dtype: DTypeLike) -> Carrier:
    """Bytes for a grid: code 0 as low as it can be, so that one end of a grid needs no clipping.

    Args:
      grid: whose heads may have differing smallest codes.
      dtype: uint8 or int8.
    """
    lowest, highest = np.iinfo(dtype).min, np.iinfo(dtype).max
    lower, upper = grid.lowest, grid.highest
    zero = lowest + max(0, -int(lower.min()))
    if zero > highest or int(upper.max()) + zero > highest:
        return Carrier(np.dtype(np.float32), 0, lower, upper)
    low, high = (end[0] if end.ndim and np.ptp(end) == 0 else end for end in (lower, upper))
    return Carrier(np.dtype(dtype), zero, np.asarray(low + zero), np.asarray(high + zero))


@dataclasses.dataclass(frozen=True)
class Site:
    """Where the codes of a quantizer are in the graph.

    Attributes:
      grid: theirs.
      carrier: how they are stored.
      tensors: the name of the tensor, or one a level of samples.
      shape: of the codes in the vocabulary; of a map [B, H, W, C].
      layout: "plain" (as ``shape``, up to a reshape), "map" ([B, C, H, W]) or "samples" (of every
        level [B, H, D * K, Q]).
    """

    grid: Grid
    carrier: Carrier
    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    layout: str
