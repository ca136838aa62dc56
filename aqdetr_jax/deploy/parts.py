"""The parameters of a deployed network: codes, grids, and what turns integer sums into values.

The rule of all integer arithmetic, which ``deploy.operations`` computes by:

1. A grid's codes are integers in ``[lower, lower + 2^bits - 1]``; each stands for ``code * step``.
2. A product of codes is summed in int32, its bias is an int32 in the same unit, and a sum stands
   for ``sum * unit`` with ``unit = input step * scale``, rounded to float32. ``scale`` [N] is the
   step of an output channel's weights, times the norm's factor where a norm follows.
3. Sums go to the next grid without becoming values: ``round(float32(sum) * (unit / step))``, ties
   to even, the quotient rounded to float32 (as ONNX Runtime's QLinearConv has it), then clipped.
4. A value goes to a grid as ``round(value / step)``, ties to even, then clipped.
5. Two arrays of codes are added on their way to a third grid, without a value between:
   ``round(a * (a's step / step) + b * (b's step / step))``, quotients rounded to float32, clipped.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from aqdetr_jax.deploy.bits import Codes
from aqdetr_jax.ops.convolution import Window

jax.tree_util.register_dataclass(Codes, ["values"], ["bits"])

_node = functools.partial(jax.tree_util.register_dataclass)
"""A pytree: the arrays are its leaves, so that they can be a compiled function's arguments."""


@functools.partial(_node, data_fields=["step"], meta_fields=["site", "lower", "bits"])
@dataclasses.dataclass(frozen=True)
class Grid:
    """Where a quantizer puts values.

    Attributes:
      site: its name, ``module path/operand``, e.g. "encoder/layer_0/self_attention/core/probs".
      step: float32 [] or, one an attention head, [H].
      lower: the smallest code (0, -2^(bits-1), minus a zero point, or moved by an offset); of
        every head where the step is.
      bits: word length.
    """

    site: str
    step: np.ndarray
    lower: int | tuple[int, ...]
    bits: int

    @property
    def lowest(self) -> np.ndarray:
        """``lower`` as int32 of the step's shape."""
        return np.array(self.lower, np.int32)

    @property
    def highest(self) -> np.ndarray:
        """The largest code, likewise."""
        return self.lowest + np.int32((1 << self.bits) - 1)

    @property
    def reach(self) -> int:
        """The largest magnitude of a code."""
        return int(max(np.abs(self.lowest).max(), np.abs(self.highest).max()))


@functools.partial(
    _node,
    data_fields=["kernel", "scale", "bias", "grid", "shift", "spread"],
    meta_fields=["name", "window", "reach"],
)
@dataclasses.dataclass(frozen=True)
class Layer:
    """A dense layer or a convolution, its norm folded in.

    There are four kinds: integer (``kernel`` codes and ``grid`` given), weights only (codes, no
    grid: values times dequantized weights), input only (a grid, float kernel: the input's codes
    become values again), float.

    Attributes:
      name: module path.
      kernel: codes or float32, [K, N] or [kh, kw, C, N].
      scale: float32 [N], see the module, may be negative; None with a float kernel.
      bias: [N]; int32 of an integer layer, else float32.
      grid: of the input, None = float.
      shift: float32 [K], subtracted from the input before its grid, or None.
      spread: float32 [K], what the shifted input is then divided by, or None.
      window: of a convolution.
      reach: the largest magnitude that a sum of an integer layer can have, bias included.
    """

    name: str
    kernel: Codes | np.ndarray
    scale: np.ndarray | None
    bias: np.ndarray
    grid: Grid | None = None
    shift: np.ndarray | None = None
    spread: np.ndarray | None = None
    window: Window | None = None
    reach: int = 0

    @property
    def integer(self) -> bool:
        """Whether codes are multiplied with codes."""
        return self.grid is not None and isinstance(self.kernel, Codes)

    @property
    def unit(self) -> np.ndarray:
        """float32 [N], the value of a one in the sums of an integer layer."""
        assert self.grid is not None
        assert self.scale is not None
        return self.grid.step * self.scale

    def floats(self) -> np.ndarray:
        """The kernel in float32, dequantized where it is codes."""
        if isinstance(self.kernel, Codes):
            assert self.scale is not None
            return self.kernel.values.astype(np.float32) * self.scale
        return self.kernel

    def largest_sum(self) -> int:
        """``reach`` from the codes and the bias."""
        assert isinstance(self.kernel, Codes)
        assert self.grid is not None
        weights = np.abs(self.kernel.values.astype(np.int64))
        sums = weights.sum(tuple(range(weights.ndim - 1))) * self.grid.reach
        return int((sums + np.abs(self.bias.astype(np.int64))).max())


@functools.partial(_node, data_fields=["scale", "bias"], meta_fields=["name", "groups"])
@dataclasses.dataclass(frozen=True)
class Norm:
    """A layer or group norm, which stays float.

    Attributes:
      name: module path.
      scale: float32 [C].
      bias: float32 [C].
      groups: of channels that share their statistics with all positions; 0 = each position alone.
    """

    name: str
    scale: np.ndarray
    bias: np.ndarray
    groups: int = 0
