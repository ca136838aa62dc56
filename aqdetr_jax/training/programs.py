"""The programs of a run: its step for every bucket, and what helps if one does not fit."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from aqdetr_jax.parallel.compiled import Programs
from aqdetr_jax.parallel.mesh import batch_sharding
from aqdetr_jax.training.assemble import batch_shapes
from aqdetr_jax.training.config import ExperimentConfig


def step_programs(
    config: ExperimentConfig, step: Any, mesh: Mesh, *, resumed: bool = False
) -> Programs:
    """The training step as one program for each bucket; its batch is one mapping.

    Args:
      config: resolved.
      step: from ``step.jit_train_step``.
      mesh: devices.
      resumed: whether something was trained already.
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
        remedies=remedies(config, mesh.shape["data"], resumed=resumed),
    )


def remedies(config: ExperimentConfig, devices: int, *, resumed: bool = False) -> str:
    """What makes a training step smaller, of what is not done yet, the cheapest first.

    Args:
      config: of the run, resolved.
      devices: along "data".
      resumed: the run goes on, so that only what ``resume.CHANGEABLE`` names may differ.
    """
    model, train = config.model, config.train
    unit = devices * train.accumulate
    each = train.batch_size // unit  # images on a device at a time
    found = []
    if model.dtype != "bfloat16" and not resumed:
        found.append("config.model.dtype=bfloat16")
    if each > 1:
        more = train.accumulate * next(n for n in range(2, each + 1) if each % n == 0)
        # Some losses need the whole batch at once: the configuration says which.
        with contextlib.suppress(ValueError):
            dataclasses.replace(config, train=dataclasses.replace(train, accumulate=more))
            # With the batch: of a configuration in images a chip it would grow instead.
            found.append(
                f"config.train.accumulate={more} with config.train.batch_size={train.batch_size}"
            )
    if not model.remat:
        found.append("config.model.remat=true")
    if each > 1 and not resumed:
        found.append(f"config.train.batch_size={each // 2 * unit}")
    if not found and resumed:
        return "a run that goes on keeps its batch and its dtype: take devices of more memory"
    if not found:
        return "what saves memory is set already; use smaller config.data.buckets, or more memory"
    return f"try {', or '.join(found)}"
