"""The training step of a configuration on a mesh, made from the shapes of its variables.

What a run takes (``loop``), what is timed before it (``estimate``) and what is compiled for chips
that are not there (``planning``) is made here: one program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from aqdetr_jax.checkpoint.steps import Checkpoints
from aqdetr_jax.models.dense import DensePretrainer
from aqdetr_jax.models.detector import Detector, build_detector
from aqdetr_jax.parallel.mesh import batch_sharding, replicated
from aqdetr_jax.parallel.placement import MODEL_PARALLEL, parameter_shardings
from aqdetr_jax.training import optimizer as optim
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.phases import Phase
from aqdetr_jax.training.state import TrainState
from aqdetr_jax.training.step import (
    LossFn,
    detection_loss_fn,
    make_train_step,
    pretrain_loss_fn,
)
from aqdetr_jax.trees import ParameterMismatchError, flatten

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
    """

    config: ExperimentConfig
    mesh: Mesh
    state: TrainState
    create: Callable[[Any, Any], TrainState]
    optimizer: Any

    def start(self, variables: Any) -> TrainState:
        """The state before the first step, on the mesh."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        create = jax.jit(self.create, out_shardings=shardings)
        return create(variables["params"], variables["batch_stats"])

    def step(
        self,
        module: Detector | DensePretrainer,
        teacher: Detector | None,
        phase: Phase | None = None,
    ) -> Any:
        """The jitted step, see ``step.make_train_step``.

        Args:
          module: of the run.
          teacher: its module, if there is one.
          phase: of the run; None = a step that trains and quantizes all.
        """
        loss_fn = loss_function(self.config, phase.module(module) if phase else module, teacher)
        step = make_train_step(self.config, loss_fn, self.optimizer, phase)
        return jit_train_step(step, self.state, self.mesh)


LEAST_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""XLA's default for CPUs starts whatever it can: what is computed again (``DetrConfig.remat``) all
at once, before any of it is needed. This order takes less memory without that too."""


def jit_train_step(step: Callable, state: TrainState, mesh: Mesh) -> Any:
    """``make_train_step``'s function compiled over a mesh, its state donated.

    Args:
      step: from ``make_train_step``.
      state: as it lies on the devices (or its shapes, with shardings); it stays where it is.
      mesh: the batch is split along "data"; teacher and metrics are on every device.
    """
    whole = replicated(mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        step,
        in_shardings=(shardings, whole, batch_sharding(mesh)),
        out_shardings=(shardings, whole),
        donate_argnums=0,
        compiler_options=LEAST_MEMORY if mesh.devices.flat[0].platform == "cpu" else None,
    )


def loss_function(
    config: ExperimentConfig, module: Detector | DensePretrainer, teacher: Detector | None
) -> LossFn:
    """The loss of a configuration's task."""
    if isinstance(module, DensePretrainer):
        return pretrain_loss_fn(config, module)
    return detection_loss_fn(config, module, teacher)


def variables_of(module: Any, bucket: tuple[int, int]) -> Any:
    """The shapes of a module's variables; nothing is put on a device, which may be elsewhere."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *bucket, 3), jnp.uint8)
    return jax.eval_shape(module.init, key, images, jax.ShapeDtypeStruct((1, *bucket), jnp.bool_))


def batch_shapes(config: ExperimentConfig, bucket: tuple[int, int], rows: int) -> dict[str, Any]:
    """The shapes of what a training step reads, ``TRAINED_KEYS``."""
    boxes = config.data.max_boxes

    def shape(kind: Any, *sides: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *sides), kind)

    return {
        "images": shape(jnp.uint8, *bucket, 3),
        "mask": shape(jnp.bool_, *bucket),
        "boxes": shape(jnp.float32, boxes, 4),
        "labels": shape(jnp.int32, boxes),
        "valid": shape(jnp.bool_, boxes),
    }


def assemble(
    config: ExperimentConfig, variables: Any, mesh: Mesh, split: bool | None = None
) -> Assembly:
    """Optimizer, state and placement of a run.

    Args:
      config: with its number of steps.
      variables: ``{"params", "batch_stats"}``, arrays or shapes.
      mesh: devices.
      split: the state as it is where layers are split over devices; None = as ``config.mesh`` says.
    """
    params, stats = variables["params"], variables["batch_stats"]
    frozen = config.model.backbone.norm == "frozen"
    split = config.mesh.model > 1 if split is None else split
    rules = MODEL_PARALLEL if split else ()
    optimizer = optim.make_optimizer(
        params, config.optimizer, config.train.steps, frozen_norms=frozen, rules=rules
    )

    def create(params: Any, stats: Any) -> TrainState:
        return TrainState.create(params, stats, optimizer, ema=config.optimizer.ema > 0)

    shapes = jax.eval_shape(create, params, stats)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        parameter_shardings(shapes, mesh, rules),
    )
    return Assembly(config, mesh, state, create, optimizer)


def restore(
    checkpoints: Checkpoints, assembly: Assembly, variables: Any
) -> tuple[TrainState, int] | None:
    """The state of a checkpoint on a mesh, whatever mesh it was saved from.

    What the optimizer packs depends on whether layers are split over devices; a state of the other
    kind is packed anew.

    Args:
      checkpoints: of the run.
      assembly: of the run on this mesh.
      variables: what it was assembled from.

    Returns:
      (state, step), None without a checkpoint.

    Raises:
      CheckpointError, ParameterMismatchError: see ``Checkpoints.restore``.
    """
    try:
        return checkpoints.restore(assembly.state)
    except ParameterMismatchError as error:
        mine = assembly.config.mesh.model > 1
        other = assemble(assembly.config, variables, assembly.mesh, split=not mine)
        try:
            restored = checkpoints.restore(other.state)
        except ParameterMismatchError:
            raise error from None
    assert restored is not None
    wanted = assembly.state.opt_state

    def repack(state: Any) -> Any:
        old = other.optimizer.packing
        leaves = old.repacked(dict(flatten(state)), assembly.optimizer.packing)
        ordered = [leaves[path] for path, _ in flatten(wanted)]
        return jax.tree.unflatten(jax.tree.structure(wanted), ordered)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, assembly.state)
    state, step = restored
    state = dataclasses.replace(
        jax.device_put(_without_optimizer(state), _without_optimizer(shardings)),
        opt_state=jax.jit(repack, out_shardings=shardings.opt_state)(state.opt_state),
    )
    return state, step


def _without_optimizer(state: TrainState) -> TrainState:
    return dataclasses.replace(state, opt_state=None)


def stand_in_teacher(config: ExperimentConfig) -> Detector | None:
    """A module of the teacher's sizes where the model itself is not needed; None without one."""
    if config.task == "pretrain" or not config.distill.needs_teacher:
        return None
    return build_detector(dataclasses.replace(config.model, num_auxiliary=0, auxiliary_groups=1))
