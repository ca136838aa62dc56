"""Placement on devices: the mesh, parameters by a table of rules, batches along ``data``.

Everything runs under one global-view ``jax.jit``: arrays carry a ``NamedSharding``, and a sum over
the batch is a sum over all devices. One CPU is a mesh of 1 x 1, a pod the same code with more.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

logger = logging.getLogger(__name__)

AXES = ("data", "model")


class Device(Protocol):
    """What a mesh's shape depends on: a JAX device, or one of a slice that is planned for."""

    @property
    def platform(self) -> str:
        """Such as "tpu"."""


def mesh_shape(
    data: int | None = None,
    model: int = 1,
    *,
    batch_size: int | None = None,
    devices: Sequence[Device] | None = None,
) -> tuple[int, int]:
    """The sizes of :func:`make_mesh`'s axes, which has the arguments and errors."""
    known: Sequence[Device] = jax.devices() if devices is None else devices
    count = len(known)
    # Of a slice that is not here nothing is asked of this machine's devices.
    cores = known[0].platform == "cpu" and jax.process_count() == 1
    if model < 1 or (data is not None and data < 1):
        raise ValueError(f"mesh sizes must be at least 1, found data={data}, model={model}")
    if data is None:
        data = max(count // model, 1)
        if data * model > count or (data * model < count and not cores):
            raise ValueError(
                f"config.mesh.model={model} does not divide the {count} devices: set it to one of "
                f"{', '.join(str(n) for n in range(1, count + 1) if count % n == 0)}"
            )
        while cores and batch_size and data > 1 and batch_size % data:
            data -= 1
    used = data * model
    if used > count or (used < count and not cores):
        raise ValueError(
            f"mesh data={data} x model={model} needs {used} devices, there are {count}: "
            "config.mesh.data=-1 takes what config.mesh.model leaves, which must divide them"
        )
    return data, model


def make_mesh(
    data: int | None = None,
    model: int = 1,
    *,
    batch_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Makes the mesh of all devices with the axes ``('data', 'model')``, both of type ``Auto``.

    The devices of a lone CPU are its cores under another name (``host.use_every_core``): there, and
    only there, some may be left idle.

    Args:
      data: devices along the batch; all that ``model`` leaves when None.
      model: devices that share one replica's parameters.
      batch_size: on a lone CPU, ``data=None`` takes no more devices than share it evenly.
      devices: of another machine, to compile for it; this one's when None.

    Raises:
      ValueError: ``data * model`` is not the number of devices; the message says what would be.
    """
    known = jax.devices() if devices is None else devices
    shape = mesh_shape(data, model, batch_size=batch_size, devices=known)
    # Explicit, the default since jax 0.9, breaks Linen's sharding constraints.
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=list(known)[: math.prod(shape)])


def on_accelerators(mesh: Mesh) -> bool:
    """Whether a mesh's devices are other than CPUs."""
    return mesh.devices.flat[0].platform != "cpu"


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: the leading dimension along ``data``, the rest replicated."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def bytes_a_device(tree: Any) -> int:
    """Bytes that a tree of arrays takes on the first of this process's devices."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


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
                f"along 'data' cannot share evenly: use a multiple of {devices} "
                "(config.train.batch_size, eval_batch_size), or another config.mesh.data"
            )
        # Asked for, which JAX does not see in a run of several processes.
        with jax.transfer_guard_host_to_device("allow"):
            placed[name] = jax.make_array_from_process_local_data(sharding, local)
    return placed
