"""The training step of a configuration on a mesh, made from the shapes of its variables.

What a run takes (``loop``), what is timed before it (``estimate``) and what is compiled for chips
that are not there (``planning``) is made here: one program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from aqdetr_jax.models.dense import DensePretrainer
from aqdetr_jax.models.detector import Detector, build_detector
from aqdetr_jax.parallel.placement import MODEL_PARALLEL, parameter_shardings
from aqdetr_jax.training import optimizer as optim
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.state import TrainState
from aqdetr_jax.training.step import (
    detection_loss_fn,
    jit_train_step,
    make_train_step,
    pretrain_loss_fn,
)

TRAINED_KEYS = ("images", "mask", "boxes", "labels", "valid")
"""The entries of a batch that the training step reads; the rest stays on the host."""


@dataclasses.dataclass(frozen=True)
class Assembly:
    """What a run's variables become on a mesh, and the step over them.

    Attributes:
      config: the experiment.
      mesh: its devices.
      state: shapes of the training state, each with its sharding.
      create: the state from (params, batch_stats).
      optimizer: of the run.
      groups: each parameter's group, see ``optimizer.parameter_groups``.
    """

    config: ExperimentConfig
    mesh: Mesh
    state: TrainState
    create: Callable[[Any, Any], TrainState]
    optimizer: Any
    groups: Any

    def start(self, variables: Any) -> TrainState:
        """The state before the first step, on the mesh."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        create = jax.jit(self.create, out_shardings=shardings)
        return create(variables["params"], variables["batch_stats"])

    def step(self, module: Detector | DensePretrainer, teacher: Detector | None) -> Any:
        """The jitted step, see ``step.make_train_step``; ``teacher``: its module, if there is."""
        if isinstance(module, DensePretrainer):
            loss_fn = pretrain_loss_fn(self.config, module)
        else:
            loss_fn = detection_loss_fn(self.config, module, teacher)
        step = make_train_step(self.config, loss_fn, self.optimizer, self.groups)
        return jit_train_step(step, self.state, self.mesh)


def assemble(config: ExperimentConfig, variables: Any, mesh: Mesh) -> Assembly:
    """Optimizer, state and placement of a run.

    Args:
      config: with its number of steps.
      variables: ``{"params", "batch_stats"}``, arrays or shapes.
      mesh: devices.
    """
    params, stats = variables["params"], variables["batch_stats"]
    frozen = config.model.backbone.norm == "frozen"
    optimizer = optim.make_optimizer(
        params, config.optimizer, config.train.steps, frozen_norms=frozen
    )
    groups = optim.parameter_groups(params, config.optimizer, frozen_norms=frozen)

    def create(params: Any, stats: Any) -> TrainState:
        return TrainState.create(params, stats, optimizer, ema=config.optimizer.ema > 0)

    shapes = jax.eval_shape(create, params, stats)
    rules = MODEL_PARALLEL if config.mesh.model > 1 else ()
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        parameter_shardings(shapes, mesh, rules),
    )
    return Assembly(config, mesh, state, create, optimizer, groups)


def stand_in_teacher(config: ExperimentConfig) -> Detector | None:
    """A module of the teacher's sizes where the model itself is not needed; None without one."""
    if config.task == "pretrain" or not config.distill.weights.active:
        return None
    return build_detector(dataclasses.replace(config.model, num_auxiliary=0, auxiliary_groups=1))
