"""What a training step reads and writes."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array


@flax.struct.dataclass
class TrainState:
    """Everything that a run must keep to go on exactly where it was.

    There is no random state and no data position: both are functions of (seed, step).

    Attributes:
      step: int32 scalar, number of finished steps.
      params: trained parameters, nested dict.
      batch_stats: running statistics of the backbone's norms.
      opt_state: optimizer state.
      ema: moving average of ``{"params", "batch_stats"}``, or None. Averaged weights need the
        statistics of averaged weights.
      skipped: int32 scalar, steps skipped so far for a non-finite loss or gradient.
      bad_in_a_row: int32 scalar, the last of them in a row.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any
    skipped: Array
    bad_in_a_row: Array

    @classmethod
    def create(cls, params: Any, batch_stats: Any, optimizer: Any, *, ema: bool) -> TrainState:
        """The state before the first step."""
        return cls(
            step=jnp.int32(0),
            params=params,
            batch_stats=batch_stats,
            opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, variables(params, batch_stats)) if ema else None,
            skipped=jnp.int32(0),
            bad_in_a_row=jnp.int32(0),
        )

    @property
    def evaluated(self) -> dict[str, Any]:
        """Variables for inference: the moving average if there is one."""
        return variables(self.params, self.batch_stats) if self.ema is None else self.ema


def variables(params: Any, batch_stats: Any) -> dict[str, Any]:
    """The variables dict of ``Module.apply``."""
    return {"params": params, "batch_stats": batch_stats}
