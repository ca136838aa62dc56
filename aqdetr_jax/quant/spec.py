"""What a quantizer is: the grid of integers, and how many elements share a step size."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

Granularity = Literal["tensor", "channel", "head"]

SUPPORTED_BITS = (2, 3, 4, 5, 6, 7, 8)

CALIBRATED = ("_zero", "_shift", "_scale")
"""Endings of names of parameters that only calibration sets."""

ALIGNMENT = "alignment"
"""Name of the module that aligns a co-attention's query, see ``Policy.align_queries``."""

GRID_PARAMETERS = (
    "_step",
    "_offset",
    *CALIBRATED,
    f"/{ALIGNMENT}/scale",
    f"/{ALIGNMENT}/bias",
)
"""Endings of the names of all parameters that a quantized model has and its float model has not."""


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """The integer grid of one operand and the sharing of its step size.

    Attributes:
      bits: word length b, one of ``SUPPORTED_BITS``.
      signed: two's complement grid ``[-2^(b-1), 2^(b-1) - 1]`` if True, else ``[0, 2^b - 1]``.
      granularity: "tensor" (one step), "channel" (one step per output channel of a weight) or
        "head" (one step per attention head). The axis is fixed by the operation that uses the
        operand and is never guessed from array shapes.
      zero_point: asymmetric grid: the real value 0 sits on an integer code found by calibration,
        so that the grid covers ``[-z, 2^b - 1 - z]``. Activations only.
      offset: a signed grid that a learned whole number of steps moves (LSQ+). Activations only.
    """

    bits: int
    signed: bool = True
    granularity: Granularity = "tensor"
    zero_point: bool = False
    offset: bool = False

    def __post_init__(self):
        if self.offset and (self.zero_point or not self.signed):
            raise ValueError("a grid with a learned offset is signed and has no zero point")
        if self.bits not in SUPPORTED_BITS:
            raise ValueError(f"bits must be one of {SUPPORTED_BITS}, got {self.bits!r}")

    @property
    def lower(self) -> int:
        """Smallest code: ``-Qn`` of LSQ (for a zero point of 0)."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def upper(self) -> int:
        """Largest code: ``Qp`` of LSQ (for a zero point of 0)."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def levels(self) -> int:
        """Number of codes, ``2^b``."""
        return 2**self.bits

    def describe(self) -> str:
        """Short text for tables, e.g. ``s4/channel``, ``u8+z`` or ``s4+o``."""
        text = f"{'s' if self.signed else 'u'}{self.bits}"
        if self.granularity != "tensor":
            text += f"/{self.granularity}"
        return text + "+z" * self.zero_point + "+o" * self.offset


def packed_size(count: int, bits: int) -> int:
    """Bytes of ``count`` codes of ``bits`` bits each, one after the other."""
    return -(-count * bits // 8)


def default_step(spec: QuantSpec, size: float = 1.0) -> float:
    """A step where data say nothing (before calibration, or all zeros): LSQ's for mean|v| = size.

    Args:
      spec: the grid.
      size: 1 for features; for weights see ``weight_size``.
    """
    return 2.0 * size / math.sqrt(spec.upper)


def weight_size(fan_in: int) -> float:
    """mean|w| of a layer's usual start, U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    Layers that start at zero (the sampling offsets of Deformable DETR) will have weights of that
    size: with a step for features they would round to zero for thousands of updates.
    """
    return 0.5 / math.sqrt(fan_in)
