"""The programs of a run: its step for every bucket."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from aqdetr_jax.parallel.compiled import Programs
from aqdetr_jax.parallel.mesh import batch_sharding
from aqdetr_jax.training.assemble import batch_shapes
from aqdetr_jax.training.config import ExperimentConfig


def step_programs(config: ExperimentConfig, step: Any, mesh: Mesh, remedies: str) -> Programs:
    """The training step as one program for each bucket; its batch is one mapping.

    Args:
      config: resolved.
      step: from ``step.jit_train_step``.
      mesh: devices.
      remedies: what helps if one does not fit, see ``remedies.for_run``.
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
        remedies=remedies,
    )
