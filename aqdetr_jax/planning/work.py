"""The useful arithmetic of a step, from what every operation of the model says of itself."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from aqdetr_jax.models.detector import record_ops
from aqdetr_jax.parallel.mesh import make_mesh
from aqdetr_jax.quant.record import FLOAT_PATH, OpRecord, recording
from aqdetr_jax.training import setup
from aqdetr_jax.training.assemble import (
    batch_shapes,
    loss_function,
    stand_in_teacher,
    variables_of,
)
from aqdetr_jax.training.config import ExperimentConfig

FORWARD, TRAINED = 1, 3
"""Passes over an operation: its result alone; with the gradients of its input and its kernel."""


def image_flops(config: ExperimentConfig, bucket: tuple[int, int], kind: str) -> int:
    """Useful floating-point operations of one image, two for each multiply-add.

    In training every product is counted three times (its result and two gradients), once where its
    parameters are frozen, in the teacher, and in a distillation's float path. What ``model.remat``
    computes again to save memory is not counted, nor are matcher, losses and elementwise
    operations.

    Args:
      config: with every size given.
      bucket: height and width of the image.
      kind: "train", with auxiliary queries and teacher as configured, or "eval".
    """
    module = setup.build_module(config)
    if kind == "eval":
        return 2 * _macs(_inference(module, bucket))
    total = 0
    for row in _training(config, module, bucket):
        frozen = row.path.startswith(FLOAT_PATH) or any(
            re.search(pattern, f"{row.path}/") for pattern in config.optimizer.frozen
        )
        total += row.macs * (FORWARD if frozen else TRAINED)
    teacher = stand_in_teacher(config)
    if teacher is not None:
        total += _macs(_inference(teacher, bucket)) * FORWARD
    return 2 * total


def _macs(rows: list[OpRecord]) -> int:
    return sum(row.macs for row in rows)


def _inference(module: Any, bucket: tuple[int, int]) -> list[OpRecord]:
    """The operations of one inference on one image."""
    return record_ops(module, variables_of(module, bucket), bucket)


def _training(config: ExperimentConfig, module: Any, bucket: tuple[int, int]) -> list[OpRecord]:
    """The operations of the loss of one image, traced as the step does; the teacher's apart."""
    variables, batch = variables_of(module, bucket), batch_shapes(config, bucket, 1)
    loss_fn = loss_function(config, module, None)
    with jax.set_mesh(make_mesh(data=1)), recording() as rows:
        jax.eval_shape(
            loss_fn, variables["params"], variables["batch_stats"], {}, batch, jnp.int32(0)
        )
    return rows
