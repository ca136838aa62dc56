"""How long a run will take, measured before it starts: a few real steps on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import time

import jax

from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.data.pipeline import make_train_pipeline
from aqdetr_jax.models.detector import Detector, build_detector, example_input
from aqdetr_jax.parallel.mesh import make_mesh, put_batch, replicated
from aqdetr_jax.training import optimizer as optim
from aqdetr_jax.training import setup
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.loop import TRAINED_KEYS
from aqdetr_jax.training.sizing import devices_along_data
from aqdetr_jax.training.state import TrainState
from aqdetr_jax.training.step import (
    detection_loss_fn,
    jit_train_step,
    make_train_step,
    pretrain_loss_fn,
)

_TIMED = 2
_FORWARD = 1 / 3
"""Share of a training step's time that the forward pass of its images takes, about."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run of a configuration takes.

    Attributes:
      step: seconds of one training step.
      steps: number of them.
      evaluations: seconds of all evaluations.
      compiling: seconds until the first step was done; what is compiled is kept.
    """

    step: float
    steps: int
    evaluations: float
    compiling: float


def estimate(
    config: ExperimentConfig, train_set: DetectionDataset, eval_set: DetectionDataset
) -> Estimate:
    """Times a few steps of a resolved configuration, from random parameters.

    The step is the one that the run will make (teacher and auxiliary queries as configured, every
    device); only values differ. With several buckets the first is timed.

    Args:
      config: resolved by ``sizing.with_data``.
      train_set: read for one batch.
      eval_set: its length counts.
    """
    train, data = config.train, config.data
    mesh = make_mesh(
        devices_along_data(config, train.batch_size // train.accumulate), config.mesh.model
    )
    module = setup.build_module(config)
    frozen = config.model.backbone.norm == "frozen"
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        pipeline = dataclasses.replace(
            setup.pipeline_config(config, train=True), buckets=data.buckets[:1], prefetch=1
        )
        with contextlib.closing(make_train_pipeline(train_set, pipeline)) as batches:
            batch = next(batches)
        placed = put_batch({key: batch[key] for key in TRAINED_KEYS}, mesh)
        example = example_input(data.buckets[0])
        first = jax.jit(module.init)(jax.random.key(0), *example)
        params, stats = first["params"], first["batch_stats"]
        optimizer = optim.make_optimizer(params, config.optimizer, train.steps, frozen_norms=frozen)
        ema = config.optimizer.ema > 0
        state = jax.jit(
            lambda p, s: TrainState.create(p, s, optimizer, ema=ema), out_shardings=replicated(mesh)
        )(params, stats)
        teacher_variables = {}
        if isinstance(module, Detector):
            teacher = None
            if config.distill.weights.active:
                plain = dataclasses.replace(config.model, num_auxiliary=0, auxiliary_groups=1)
                teacher = build_detector(plain)
                teacher_variables = jax.jit(teacher.init, out_shardings=replicated(mesh))(
                    jax.random.key(1), *example
                )
            loss_fn = detection_loss_fn(config, module, teacher)
        else:
            loss_fn = pretrain_loss_fn(config, module)
        step = jit_train_step(make_train_step(config, loss_fn, optimizer), state, mesh)
        state, metrics = step(state, teacher_variables, placed)
        jax.block_until_ready(metrics)
        compiled = time.perf_counter()
        for _ in range(_TIMED):
            state, metrics = step(state, teacher_variables, placed)
        jax.block_until_ready(metrics)
        seconds = (time.perf_counter() - compiled) / _TIMED
    count = 0
    if isinstance(module, Detector):
        count = train.steps // train.eval_every if train.eval_every else 1
    images = seconds / train.batch_size * _FORWARD
    return Estimate(seconds, train.steps, count * len(eval_set) * images, compiled - start)
