"""The numbers that put an operand of a product on its grid, and those that its sums are worth."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from aqdetr_jax.quant import lsq


class Quantizer(NamedTuple):
    """The numbers that put one operand on its grid.

    Attributes:
      step: float32 step size ``s > 0``; broadcastable to the operand *and* to the product's output
        (scalar per tensor; ``[1, .., N]`` per output channel; ``[H, 1, 1]`` per head).
      lower: float32 scalar or per-site array, the smallest code.
      upper: the largest code.
      gradient_scale: LSQ's factor on the step's gradient (float32 scalar, no gradient).
      offset: whole steps, of the step's shape, that both ends are moved by (``lsq.whole_offset``,
        which takes its gradient); None = no such number.
    """

    step: Array
    lower: Array
    upper: Array
    gradient_scale: Array
    offset: Array | None = None

    @property
    def ends(self) -> tuple[Array, Array]:
        """The smallest and the largest code."""
        if self.offset is None:
            return self.lower, self.upper
        return self.lower + self.offset, self.upper + self.offset

    def codes(self, x: Array) -> Array:
        """See ``lsq.codes``."""
        return lsq.codes(x, self.step, *self.ends)

    def cotangent(self, step: Array, offset: Array | None) -> Quantizer:
        """A cotangent of these numbers: only step and offset take one."""
        lower, upper, factor = (jnp.zeros_like(x) for x in self[1:4])
        return Quantizer(step, lower, upper, factor, offset)


class SumSteps(NamedTuple):
    """The steps that make the unit of a layer's integer sums.

    Attributes:
      input: float32 [], step of the input.
      weight: float32 [N], steps of the output channels' weights.
    """

    input: Array
    weight: Array

    def unit(self, factor: Array | float = 1.0) -> Array:
        """The value of a one in the sums, float32 [N].

        Multiplied in this order wherever biases are rounded: another order is another last bit.

        Args:
          factor: of the norm that follows, [N].
        """
        return self.input * (self.weight * factor)
