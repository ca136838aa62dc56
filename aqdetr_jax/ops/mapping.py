"""What XLA must not split over the devices of a mesh, or cannot: each runs it on its own images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

__all__ = ["axis_to_map", "on_each_device"]


def _automatic(mesh: Mesh | AbstractMesh) -> set[str]:
    """The axes that no ``shard_map`` around this is over."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind != AxisType.Manual}


def axis_to_map(axis: str, batch: int) -> Mesh | AbstractMesh | None:
    """The mesh over which to map a batch by hand, or None where it is one device's anyway.

    Args:
        axis: name of the mesh axis that shares the batch.
        batch: its size, which the axis must divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or axis not in _automatic(mesh) or batch % mesh.shape[axis]:
        return None
    return mesh


def on_each_device(
    function: Callable[..., Any],
    batch: int,
    *,
    batch_axis: int = 0,
    mesh: Mesh | AbstractMesh | None = None,
    axis: str = "data",
) -> Callable[..., Any]:
    """``function`` of each device's own part of a batch.

    Every axis of the mesh is mapped that is not mapped yet, whatever it is for: XLA splits no
    kernel of a TPU by itself, not even over an axis of one device.

    Args:
        function: of arrays that all have the batch at one place, as its results.
        batch: its size.
        batch_axis: its place.
        mesh: default: the mesh set by ``jax.set_mesh``. Without one, or where all its axes are
            mapped, this is ``function`` itself.
        axis: name of the mesh axis that shares the batch, if it divides it; over the others, and
            over this one if it does not, all devices do the same.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    names = set() if mesh.empty else _automatic(mesh)
    if not names:
        return function
    shared = axis in names and batch % mesh.shape[axis] == 0
    spec = PartitionSpec(*([None] * batch_axis), axis) if shared else PartitionSpec()
    # check_vma=False: neither kernels nor loops that start from constants say what varies.
    return jax.shard_map(
        function, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=names, check_vma=False
    )
