"""Where parameters lie: an ordered table of (pattern, spec), checked against mesh and shapes."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aqdetr_jax.trees import flatten, path_name

logger = logging.getLogger(__name__)


Rules = Sequence[tuple[str, PartitionSpec]]


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
                f"not divisible by the {parts} devices along {'/'.join(axes)}: choose another "
                "config.mesh.model"
            )
