"""How well quantizers use their grids, on request: a forward pass that leaves counts."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from aqdetr_jax.quant import lsq
from aqdetr_jax.quant.spec import QuantSpec

USAGE = "usage"
"""Variable collection of how each grid is used: of every site a ``GridUse``."""

SAMPLES = 32768
"""Values that a site (a head) is judged by."""

ROUNDING = 1e-6
"""Of values that should be alike, in parts of them."""


class GridUse(NamedTuple):
    """How an operand uses its grid; one row for each step of an activation, one of a weight.

    Attributes:
      clipped: float32 [H], share of the values that are beyond the grid's ends.
      used: float32 [H], share of the codes that some value has.
      constant: float32 [H], whether values that differ all have one code (0 or 1); of a weight, the
        share of its channels in which they do.
    """

    clipped: Array
    used: Array
    constant: Array


def watched(module: nn.Module) -> bool:
    """Whether somebody wants to know how the grids of this call are used."""
    return module.is_mutable_collection(USAGE) and not module.is_initializing()


def differ(values: Array, axis: int) -> Array:
    """Whether values differ along an axis by more than rounding, bool."""
    spread = jnp.max(values, axis) - jnp.min(values, axis)
    return spread > ROUNDING * jnp.max(jnp.abs(values), axis)


def of_values(
    ratio: Array, lower: Array, upper: Array, spec: QuantSpec, *, rectified: bool = False
) -> GridUse:
    """The use of a grid by values.

    Args:
      ratio: float32 [H, n], values in units of their step.
      lower: smallest codes, [H, 1] or [].
      upper: largest codes.
      spec: the grid.
      rectified: what is below the grid is no loss: a ReLU would have made it 0.
    """
    over = ratio > upper + 0.5
    if not rectified:
        over |= ratio < lower - 0.5
    codes = lsq.codes(ratio, jnp.ones(()), lower, upper) - lower
    rows = jnp.arange(len(ratio))[:, None]
    seen = jnp.zeros((len(ratio), spec.levels)).at[rows, codes.astype(jnp.int32)].max(1.0)
    used = jnp.sum(seen, axis=1)
    constant = ((used <= 1) & differ(ratio, 1)).astype(jnp.float32)
    return GridUse(jnp.mean(over, axis=1, dtype=jnp.float32), used / spec.levels, constant)


def note_activation(
    module: nn.Module,
    name: str,
    values: Array,
    spec: QuantSpec,
    grid: tuple[Array, Array, Array],
    channels: Array | None = None,
) -> None:
    """Leaves the use of an activation's grid.

    Args:
      module: the layer that owns the site.
      name: of the site.
      values: a sample of them, [n], or [H, n] where each head has its step.
      spec: the grid.
      grid: step, smallest and largest code, [] or [H, 1, 1].
      channels: [K, n], samples of each channel before it was centred: a channel that never moves
        (the first decoder layer's queries attend to values that are all alike) is the bias's.
    """
    values = jnp.atleast_2d(values).astype(jnp.float32)
    # To a column: one row of values for each step.
    step, lower, upper = (jnp.reshape(x, (-1, 1)) if x.ndim else x for x in grid)
    rectified = not spec.signed and not spec.zero_point
    use = of_values(values / step, lower, upper, spec, rectified=rectified)
    if channels is not None:
        use = use._replace(constant=use.constant * jnp.any(differ(channels, 1)))
    module.variable(USAGE, name, lambda: use).value = use


def note_weight(
    module: nn.Module,
    name: str,
    kernel: Array,
    spec: QuantSpec,
    grid: tuple[Array, Array, Array],
) -> None:
    """Leaves the use of a weight's grid.

    Args:
      module: the layer.
      name: of the weight.
      kernel: [..., N].
      spec: the grid.
      grid: step [N], smallest and largest code [].
    """
    step, lower, upper = grid
    ratio = kernel.reshape(-1, kernel.shape[-1]) / step
    whole = of_values(ratio.reshape(1, -1), lower, upper, spec)
    codes = lsq.codes(ratio, jnp.ones(()), lower, upper)
    dead = (jnp.max(codes, 0) == jnp.min(codes, 0)) & differ(ratio, 0)
    constant = jnp.mean(dead, dtype=jnp.float32)
    use = whole._replace(constant=constant.reshape(1))
    module.variable(USAGE, name, lambda: use).value = use
