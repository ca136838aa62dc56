"""The programs of a run: its step for every bucket, and what helps if one does not fit."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aqdetr_jax.parallel.compiled import Programs
from aqdetr_jax.parallel.mesh import batch_sharding
from aqdetr_jax.training.config import ExperimentConfig

TRAINED_KEYS = ("images", "mask", "boxes", "labels", "valid")
"""The entries of a batch that the training step reads; the rest stays on the host."""


def batch_shapes(
    config: ExperimentConfig, bucket: tuple[int, int], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of a training batch, over all devices.

    Args:
      config: resolved: ``data.max_boxes`` is a number.
      bucket: (height, width).
      mesh: devices.
    """
    boxes = config.data.max_boxes
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "images": ((*bucket, 3), np.uint8),
        "mask": (bucket, np.bool_),
        "boxes": ((boxes, 4), np.float32),
        "labels": ((boxes,), np.int32),
        "valid": ((boxes,), np.bool_),
    }
    rows, split = config.train.batch_size, batch_sharding(mesh)
    return {
        key: jax.ShapeDtypeStruct((rows, *shapes[key][0]), shapes[key][1], sharding=split)
        for key in TRAINED_KEYS
    }


def step_programs(config: ExperimentConfig, step: Any, mesh: Mesh) -> Programs:
    """The training step as one program for each bucket; its batch is one mapping.

    Args:
      config: resolved.
      step: from ``step.jit_train_step``.
      mesh: devices.
    """
    return Programs(
        step,
        [(batch_shapes(config, bucket, mesh),) for bucket in config.data.buckets],
        name="training step",
        remedies=remedies(config, mesh.shape["data"]),
    )


def remedies(config: ExperimentConfig, devices: int) -> str:
    """What makes a training step smaller, of what is not done yet, the cheapest first.

    Args:
      config: of the run.
      devices: along "data".
    """
    model, rows = config.model, config.train.batch_size
    found = []
    if model.dtype != "bfloat16":
        found.append("config.model.dtype=bfloat16")
    if rows > devices:
        smaller = max(rows // 2 // devices, 1) * devices
        found.append(f"config.train.batch_size={smaller}")
    if not model.remat:
        found.append("config.model.remat=true")
    if not found:
        return "what saves memory is set already; use smaller config.data.buckets, or more memory"
    return f"try {', or '.join(found)}"
