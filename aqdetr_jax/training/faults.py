"""What was at fault in a step that was skipped, by name."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqdetr_jax.training.step import is_loss
from aqdetr_jax.trees import flatten, path_name

KEPT_STEPS = 64
"""Of the steps since the last line, so many can be told by name if they were skipped."""

_NAMED = 8


def culprits(metrics: Mapping[str, np.ndarray], parts: Sequence[str]) -> list[str]:
    """What is not finite in the metrics of a step, [] of a step that was not skipped.

    Args:
      metrics: of ``make_train_step``, on the host.
      parts: ``Packing.names``, in the order of ``gradient_squares``.
    """
    bad = [name for name, value in metrics.items() if is_loss(name) and not np.isfinite(value)]
    if not bad:  # else every gradient follows from them
        squares = np.ravel(metrics["gradient_squares"])
        named = zip(parts, np.isfinite(squares), strict=True)
        bad = [f"gradient of {name}" for name, good in named if not good]
    if not bad and not np.isfinite(metrics["gradient_norm"]):
        bad = ["gradient"]
    count = int(metrics["bad_step_sizes"])
    # After a gradient that is not finite none of them would be.
    return bad or ([f"{count} step sizes after the update"] if count else [])


def bad_parameters(params: Any) -> list[str]:
    """Paths of parameters that are not finite, and of step sizes that are not positive either."""
    found = []
    for path, leaf in flatten(params):
        name = path_name(path)
        good = jnp.isfinite(leaf)
        if name.endswith("_step"):
            good &= leaf > 0
        if not bool(jnp.all(good)):
            found.append(name)
    return found


def in_words(names: Sequence[str]) -> str:
    """The first of some names."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


class Recent:
    """The metrics of the latest steps, still on the devices; fetched only if one was skipped."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, Mapping[str, jax.Array], np.ndarray]]
        self._steps = deque(maxlen=KEPT_STEPS)

    def add(self, done: int, metrics: Mapping[str, jax.Array], index: np.ndarray) -> None:
        """Notes a step.

        Args:
          done: steps done.
          metrics: of the last one.
          index: int ``[B / processes]``, dataset indices of this process's part of its batch.
        """
        self._steps.append((done, metrics, index))

    def take(self, before: int) -> list[tuple[int, dict[str, np.ndarray], np.ndarray]]:
        """The steps noted before one, fetched; nothing is kept."""
        taken = [item for item in self._steps if item[0] < before]
        self._steps.clear()
        return [(done, jax.device_get(dict(metrics)), index) for done, metrics, index in taken]

    def clear(self) -> None:
        """Forgets what was noted."""
        self._steps.clear()
