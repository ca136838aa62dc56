"""The programs of a run: its step for every bucket, and what helps if one does not fit."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from aqdetr_jax.parallel.compiled import Programs
from aqdetr_jax.parallel.mesh import batch_sharding
from aqdetr_jax.training.assemble import batch_shapes
from aqdetr_jax.training.config import ExperimentConfig


def step_programs(config: ExperimentConfig, step: Any, mesh: Mesh) -> Programs:
    """The training step as one program for each bucket; its batch is one mapping.

    Args:
      config: resolved.
      step: from ``step.jit_train_step``.
      mesh: devices.
    """
    split = batch_sharding(mesh)

    def batch(bucket: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = batch_shapes(config, bucket, config.train.batch_size)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), shapes
        )

    return Programs(
        step,
        [(batch(bucket),) for bucket in config.data.buckets],
        name="training step",
        remedies=remedies(config, mesh.shape["data"]),
    )


def remedies(config: ExperimentConfig, devices: int) -> str:
    """What makes a training step smaller, of what is not done yet, the cheapest first.

    Args:
      config: of the run.
      devices: along "data".
    """
    model, rows, micro = config.model, config.train.batch_size, config.train.accumulate
    found = []
    if model.dtype != "bfloat16":
        found.append("config.model.dtype=bfloat16")
    own = rows // devices // micro
    if own > 1:
        more = micro * next(n for n in range(2, own + 1) if own % n == 0)
        found.append(f"config.train.accumulate={more}")
        smaller = max(own // 2, 1) * devices * micro
        found.append(f"config.train.batch_size={smaller}")
    if not model.remat:
        found.append("config.model.remat=true")
    if not found:
        return "what saves memory is set already; use smaller config.data.buckets, or more memory"
    return f"try {', or '.join(found)}"
