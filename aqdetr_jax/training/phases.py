"""The phases of a run: what is quantized and what is trained from which step on.

A phase is a part of the run's steps with a step program of its own; the state is the same tree in
all of them, and where one begins is a function of the step's number, so that a run goes on from any
checkpoint as if it had never stopped. At every border Adam's averages start again: what was float
or frozen has none, and with the counts of a long run its first updates would be several times too
large. The learning rates' schedule goes on.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from aqdetr_jax.models.dense import DensePretrainer
from aqdetr_jax.models.detector import Detector
from aqdetr_jax.quant.record import OpRecord
from aqdetr_jax.training.config import ExperimentConfig, PhaseConfig
from aqdetr_jax.training.optimizer import parameter_groups
from aqdetr_jax.training.packing import FROZEN, Packing
from aqdetr_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Phase:
    """Consecutive steps that are alike.

    Attributes:
      first: steps done before it.
      stop: steps done after it.
      rules: what is quantized and trained; None = all.
    """

    first: int
    stop: int
    rules: PhaseConfig | None = None

    def module(self, module: Detector | DensePretrainer) -> Detector | DensePretrainer:
        """The run's module with the operations float that are not quantized yet."""
        if self.rules is None or not self.rules.quantized:
            return module
        assert not isinstance(module, DensePretrainer)
        return module.clone(policy=module.policy.only(self.rules.quantized))

    def begun(self, state: TrainState) -> TrainState:
        """The state as the phase has it: the same but before the phase's first step."""
        if not self.first:
            return state
        now = state.step == self.first
        if self.rules is not None and self.rules.from_average:
            params, stats = (
                jax.tree.map(lambda mean, own: jnp.where(now, mean, own), state.ema[name], own)
                for name, own in (("params", state.params), ("batch_stats", state.batch_stats))
            )
            state = dataclasses.replace(state, params=params, batch_stats=stats)
        return dataclasses.replace(state, opt_state=restarted(state.opt_state, now))

    def of_trained(self, packing: Packing, new: Any, old: Any) -> Any:
        """``new`` for what is trained in this phase, ``old`` for the rest; packed trees."""
        if self.rules is None or not self.rules.trained:
            return new
        patterns = self.rules.trained

        def one(trained: bool | np.ndarray, new: Any, old: Any) -> Any:
            if isinstance(trained, bool):  # of a whole leaf: what is not needed is not computed
                return new if trained else old
            return jnp.where(trained, new, old)

        chosen = packing.mask(lambda path: any(re.search(p, path) for p in patterns))
        return jax.tree.map(one, chosen, new, old)

    def at_rate(self, updates: Any) -> Any:
        """The optimizer's updates at this phase's learning rates; they are linear in those."""
        rate = 1.0 if self.rules is None else self.rules.rate
        return updates if rate == 1 else jax.tree.map(lambda x: rate * x, updates)

    def describe(self) -> str:
        """For the progress of a run."""
        texts = [f"steps {self.first + 1} to {self.stop}"]
        if self.rules is not None:
            if self.rules.from_average:
                texts.append("from the moving average")
            for name in ("quantized", "trained"):
                if getattr(self.rules, name):
                    texts.append(f"{name}: {', '.join(getattr(self.rules, name))}")
            if self.rules.rate != 1:
                texts.append(f"learning rates x {self.rules.rate:g}")
        return "; ".join(texts)


def restarted(opt_state: Any, now: Any) -> Any:
    """An optimizer's state with Adam's averages and their count at zero where ``now`` is true."""

    def adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    def one(node: Any) -> Any:
        if not adam(node):
            return node
        return jax.tree.map(lambda x: jnp.where(now, jnp.zeros_like(x), x), node)

    return jax.tree.map(one, opt_state, is_leaf=adam)


def run_phases(config: ExperimentConfig) -> tuple[Phase, ...]:
    """The phases of a run, those between the configured ones included; they make up the whole.

    Args:
      config: with its number of steps.

    Raises:
      ValueError: a configured phase has no step.
    """
    steps, made, done = config.train.steps, [], 0
    for number, rules in enumerate(config.train.phases):
        first, stop = (round(fraction * steps) for fraction in (rules.begin, rules.end))
        if first == stop:
            raise ValueError(
                f"config.train.phases[{number}] from {rules.begin} to {rules.end} of the run has "
                f"none of its {steps} steps: move its ends, or leave it out"
            )
        if first > done:
            made.append(Phase(done, first))
        made.append(Phase(first, stop, rules))
        done = stop
    if done < steps:
        made.append(Phase(done, steps))
    return tuple(made)


def phase_of(phases: Sequence[Phase], done: int) -> Phase:
    """The phase that takes the step after ``done`` steps."""
    return next(phase for phase in phases if done < phase.stop)


def check_phases(config: ExperimentConfig, rows: Sequence[OpRecord], params: Any) -> None:
    """Every pattern of a phase must find something.

    Args:
      config: the experiment.
      rows: the operations of its model.
      params: its parameters.

    Raises:
      ValueError: one finds nothing; the message names it.
    """
    quantized = [row.path for row in rows if row.weight or row.activation or row.other]
    frozen_norms = config.model.backbone.norm == "frozen"
    groups = parameter_groups(params, config.optimizer, frozen_norms=frozen_norms)
    groups = traverse_util.flatten_dict(groups, sep="/")
    trained = [path for path, group in groups.items() if group != FROZEN]
    for number, rules in enumerate(config.train.phases):
        for name, patterns, paths, what in (
            ("quantized", rules.quantized, quantized, "operation that is quantized"),
            ("trained", rules.trained, trained, "parameter that is trained"),
        ):
            for pattern in patterns:
                if not any(re.search(pattern, path) for path in paths):
                    raise ValueError(
                        f"config.train.phases[{number}].{name}: {pattern!r} matches no {what}"
                    )
