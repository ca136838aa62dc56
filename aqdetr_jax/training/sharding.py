"""Placement on devices: the mesh, parameters by a table of rules, batches along ``data``.

Everything runs under one global-view ``jax.jit``: arrays carry a ``NamedSharding``, and a sum over
the batch is a sum over all devices. One CPU is a mesh of 1 x 1, a pod the same code with more.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aqdetr_jax.training.trees import flatten, path_name

logger = logging.getLogger(__name__)

AXES = ("data", "model")

Rules = Sequence[tuple[str, PartitionSpec]]

# Set by the launchers that jax.distributed.initialize() knows how to read.
_CLUSTER_VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "COORDINATOR_ADDRESS",
    "MEGASCALE_COORDINATOR_ADDRESS",
)


# Projections whose columns are heads, in order; the last three are deformable attention's.
_HEADS = "([qkv]_proj|value_proj|sampling_offsets|attention_weights)"

MODEL_PARALLEL: Rules = (
    (r"feed_forward/linear1/kernel$", PartitionSpec(None, "model")),
    (r"feed_forward/linear1/(bias|kernel_step)$", PartitionSpec("model")),
    (r"feed_forward/linear2/kernel$", PartitionSpec("model", None)),
    (rf"_attention/{_HEADS}/kernel$", PartitionSpec(None, "model")),
    (rf"_attention/{_HEADS}/(bias|kernel_step)$", PartitionSpec("model")),
    (r"_attention/out(put)?_proj/kernel$", PartitionSpec("model", None)),
)
"""How the transformer's parameters lie on a mesh with more than one device along "model": hidden
units and attention heads are shared out."""


def make_mesh(data: int | None = None, model: int = 1, *, batch_size: int | None = None) -> Mesh:
    """Makes the mesh of all devices with the axes ``('data', 'model')``, both of type ``Auto``.

    The devices of a lone CPU are its cores under another name (``host.use_every_core``): there, and
    only there, some may be left idle.

    Args:
      data: devices along the batch; all that ``model`` leaves when None.
      model: devices that share one replica's parameters.
      batch_size: on a lone CPU, ``data=None`` takes no more devices than share it evenly.

    Raises:
      ValueError: ``data * model`` is not the number of devices.
    """
    count = jax.device_count()
    cores = jax.process_count() == 1 and jax.default_backend() == "cpu"
    if model < 1 or (data is not None and data < 1):
        raise ValueError(f"mesh sizes must be at least 1, found data={data}, model={model}")
    if data is None:
        data = max(count // model, 1)
        while cores and batch_size and data > 1 and batch_size % data:
            data -= 1
    used = data * model
    if used > count or (used < count and not cores):
        raise ValueError(
            f"mesh data={data} x model={model} needs {used} devices, there are {count}"
        )
    # Explicit, the default since jax 0.9, breaks Linen's sharding constraints.
    types = (AxisType.Auto, AxisType.Auto)
    some = jax.devices()[:used] if used < count else None
    return jax.make_mesh((data, model), AXES, axis_types=types, devices=some)


def parameter_shardings(tree: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """Places every leaf by the first rule whose pattern is found in its path.

    Args:
      tree: pytree of arrays or ``jax.ShapeDtypeStruct``, such as a whole training state; leaf
        paths look like ``params/decoder/layer_0/kernel``, and those of an optimizer state end
        with the parameter's path, so that one table places both.
      mesh: from :func:`make_mesh`.
      rules: ordered pairs (regular expression, ``PartitionSpec``), matched with ``re.search``. A
        leaf without a match is replicated. A rule that matches no leaf is reported as a warning.

    Returns:
      A pytree of ``NamedSharding`` of the same structure.

    Raises:
      ValueError: a rule's spec does not fit the leaf (too many dimensions, a dimension that the
        axis does not divide, an axis that the mesh lacks); the message names leaf and rule.
    """
    used = [False] * len(rules)
    shardings = []
    for path, leaf in flatten(tree):
        spec = PartitionSpec()
        for index, (pattern, candidate) in enumerate(rules):
            if re.search(pattern, path_name(path)):
                used[index] = True
                spec = candidate
                _check_spec(path_name(path), np.shape(leaf), spec, pattern, mesh)
                break
        shardings.append(NamedSharding(mesh, spec))
    for (pattern, _), was_used in zip(rules, used, strict=True):
        if not was_used:
            logger.warning("sharding rule %r places no parameter", pattern)
    return jax.tree.unflatten(jax.tree.structure(tree), shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: the leading dimension along ``data``, the rest replicated."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays from this process's part of a batch.

    Args:
      batch: arrays ``[local_batch, ...]``; every process gives the same shapes, and the global
        batch is theirs, concatenated in process order.
      mesh: from :func:`make_mesh`.

    Returns:
      The same keys with arrays ``[local_batch * processes, ...]`` sharded along ``data``.

    Raises:
      ValueError: the global batch is not divisible by the ``data`` axis; the message says how.
    """
    sharding, devices = batch_sharding(mesh), mesh.shape["data"]
    placed = {}
    for name, value in batch.items():
        local = np.asarray(value)
        rows = local.shape[0] * jax.process_count() if local.ndim else 0
        if rows == 0 or rows % devices:
            raise ValueError(
                f"batch[{name!r}] has {rows} rows over all processes, which {devices} devices "
                f"along 'data' cannot share evenly; use a multiple of {devices}"
            )
        placed[name] = jax.make_array_from_process_local_data(sharding, local)
    return placed


def initialize_distributed(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> bool:
    """Joins the other processes of a multi-process run; does nothing in a single-process one.

    Must run before anything touches a device. Call it in every process. A cluster is recognised
    by the arguments, by a coordinator address in the environment, by more than one TPU worker
    (``TPU_WORKER_HOSTNAMES``), or by more than one Slurm or Open MPI task.

    Args:
      coordinator: ``host:port`` of process 0, where the launcher does not say it.
      processes: number of processes, with ``coordinator``.
      process: index of this process, with ``coordinator``.

    Returns:
      True if this is now part of a multi-process run.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    if coordinator is None and processes is None and not _in_cluster():
        return False
    jax.distributed.initialize(coordinator, num_processes=processes, process_id=process)
    return jax.process_count() > 1


def _in_cluster() -> bool:
    environment = os.environ
    if any(environment.get(name) for name in _CLUSTER_VARIABLES):
        return True
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    tasks = (environment.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    # An interactive Slurm allocation has the count but no task of its own.
    in_task = "SLURM_PROCID" in environment or "OMPI_COMM_WORLD_RANK" in environment
    return in_task and any(text.isdigit() and int(text) > 1 for text in tasks)


def _check_spec(
    name: str, shape: tuple[int, ...], spec: PartitionSpec, pattern: str, mesh: Mesh
) -> None:
    if len(spec) > len(shape):
        raise ValueError(
            f"sharding rule {pattern!r}: {spec} has {len(spec)} dimensions, but {name} has shape "
            f"{shape}; make the pattern narrower"
        )
    for dimension, entry in enumerate(spec):
        axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        parts = 1
        for axis in axes:
            if axis not in mesh.shape:
                known = ", ".join(mesh.axis_names)
                raise ValueError(f"sharding rule {pattern!r}: no mesh axis {axis!r} (has: {known})")
            parts *= mesh.shape[axis]
        if shape[dimension] % parts:
            raise ValueError(
                f"sharding rule {pattern!r}: dimension {dimension} of {name} (shape {shape}) is "
                f"not divisible by the {parts} devices along {'/'.join(axes)}"
            )
