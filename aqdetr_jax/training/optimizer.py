"""AdamW in groups: backbone, step sizes, slow and frozen parameters, and the rest."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from aqdetr_jax.parallel.placement import Rules
from aqdetr_jax.quant.spec import CALIBRATED
from aqdetr_jax.training.config import OptimizerConfig
from aqdetr_jax.training.packing import FROZEN, Packing

STEP_FLOOR = 1e-9
"""Step sizes are kept above this after every update."""


def learning_rate(config: OptimizerConfig, steps: int):
    """The schedule's factor on every learning rate, as a jit-able function of the step.

    Args:
      config: warm-up, kind and drops.
      steps: length of the run.
    """

    def factor(step: Any):
        t = jnp.asarray(step, jnp.float32)
        warm: Any = jnp.minimum((t + 1) / config.warmup, 1.0) if config.warmup else 1.0
        shape: Any = 1.0
        if config.schedule == "cosine":
            span = max(steps - config.warmup, 1)
            progress = jnp.clip((t - config.warmup) / span, 0.0, 1.0)
            shape = config.final + (1 - config.final) * 0.5 * (1 + jnp.cos(math.pi * progress))
        elif config.schedule == "step":
            for fraction in config.drop_at:
                shape = shape * jnp.where(t >= fraction * steps, 0.1, 1.0)
        return warm * shape

    return factor


def group_of(path: str, config: OptimizerConfig, *, frozen_norms: bool) -> str:
    """The group of a parameter: "frozen", "steps", "backbone", "slow" or "rest".

    Args:
      path: parameter path, e.g. "encoder/layer_0/norm1/scale".
      config: ``frozen`` and ``slow`` patterns.
      frozen_norms: the backbone's norms are frozen (DETR's frozen batch norm).
    """
    leaf = path.rsplit("/", 1)[-1]
    if leaf.endswith(CALIBRATED):
        return FROZEN
    if any(re.search(pattern, path) for pattern in config.frozen):
        return FROZEN
    if path.startswith("backbone/") and frozen_norms and leaf in ("scale", "bias"):
        return FROZEN
    if leaf.endswith("_step"):
        return "steps"
    if path.startswith("backbone/"):
        return "backbone"
    return "slow" if any(re.search(pattern, path) for pattern in config.slow) else "rest"


def parameter_groups(params: Any, config: OptimizerConfig, *, frozen_norms: bool) -> Any:
    """A tree like ``params`` with the group name of every leaf."""
    return traverse_util.path_aware_map(
        lambda path, _: group_of("/".join(map(str, path)), config, frozen_norms=frozen_norms),
        params,
    )


def count_trainable(params: Any, config: OptimizerConfig, *, frozen_norms: bool) -> int:
    """Number of parameters that an update can change."""
    groups = parameter_groups(params, config, frozen_norms=frozen_norms)
    sizes = jax.tree.map(lambda p, g: 0 if g == FROZEN else p.size, params, groups)
    return sum(jax.tree.leaves(sizes))


def relative_to_parameter() -> optax.GradientTransformation:
    """Multiplies every update by its parameter: step sizes move by a fraction of themselves.

    Step sizes of one network span orders of magnitude. An Adam update of fixed size would be noise
    for one and a jump through zero for another; relative updates keep them positive and make one
    learning rate fit all [ours].
    """

    def update(updates, state, params=None):
        return jax.tree.map(lambda u, p: u * p, updates, params), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW in groups, over packed parameters.

    Attributes:
      packing: how parameters are packed.
      transformation: what is done to the packed gradients.
    """

    packing: Packing
    transformation: optax.GradientTransformation

    def init(self, params: Any) -> Any:
        """The state before the first update."""
        return self.transformation.init(self.packing.pack(params))


def make_optimizer(
    params: Any, config: OptimizerConfig, steps: int, *, frozen_norms: bool, rules: Rules = ()
) -> Optimizer:
    """The optimizer of a run.

    Gradients are clipped by their global norm over everything that is trained. Weight decay is
    decoupled (AdamW) and acts on kernels and embeddings, not on norms, biases or step sizes.

    Args:
      params: parameter tree (or its shapes).
      config: rates and groups.
      steps: length of the run, for the schedule.
      frozen_norms: see ``group_of``.
      rules: how parameters lie on the devices, see ``parameter_shardings``.
    """
    factor = learning_rate(config, steps)
    packing = Packing(params, parameter_groups(params, config, frozen_norms=frozen_norms), rules)

    def rate(base: float):
        return lambda step: -base * factor(step)

    def decayed(tree):
        return jax.tree.map(lambda p: getattr(p, "ndim", 0) > 1, tree)

    def adamw(base: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(),
            optax.add_decayed_weights(config.weight_decay, mask=decayed),
            optax.scale_by_schedule(rate(base)),
        )

    transforms = {
        "rest": adamw(config.lr),
        "backbone": adamw(config.lr_backbone),
        "slow": adamw(config.lr * config.slow_factor),
        "steps": optax.chain(
            optax.scale_by_adam(),
            relative_to_parameter(),
            optax.scale_by_schedule(rate(config.lr_steps)),
        ),
    }
    chain = [optax.partition(transforms, packing.groups)]
    if config.clip_norm:
        chain.insert(0, optax.clip_by_global_norm(config.clip_norm))
    return Optimizer(packing, optax.chain(*chain))


def keep_steps_positive(params: Any, groups: Any) -> Any:
    """Projects every step size to at least ``STEP_FLOOR``.

    Args:
      params: a tree.
      groups: a tree like it of group names.
    """
    return jax.tree.map(
        lambda leaf, group: jnp.maximum(leaf, STEP_FLOOR) if group == "steps" else leaf,
        params,
        groups,
    )


def count_bad_steps(params: Any, groups: Any) -> jax.Array:
    """Number of step sizes that are not finite and positive, int32 [].

    Args:
      params: a tree.
      groups: a tree like it of group names.
    """
    counts = [
        jnp.sum(~(jnp.isfinite(leaf) & (leaf > 0)), dtype=jnp.int32)
        for leaf, group in zip(jax.tree.leaves(params), jax.tree.leaves(groups), strict=True)
        if group == "steps"
    ]
    return sum(counts, jnp.int32(0))
