"""Parameters as the optimizer sees them: matrices one by one, everything small in a few vectors.

A quantized detector has hundreds of step sizes, biases and norm vectors. Updated one by one they
are most of the instructions of a step and none of its work; side by side in one vector a group,
they are one.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from aqdetr_jax.parallel.placement import Rules
from aqdetr_jax.trees import Path

FROZEN = "frozen"
"""Group of the parameters that are left out."""


class Packing:
    """Which leaves of a parameter tree are trained, and which of them share a vector.

    A leaf of at most one dimension is packed with those of its group, and so is every step size
    and offset, unless a rule splits it over devices.

    Attributes:
      groups: a packed tree of group names.
    """

    def __init__(self, params: Any, groups: Any, rules: Rules = ()):
        """Plans.

        Args:
          params: tree of parameters, or of their shapes.
          groups: tree of group names; ``FROZEN`` is left out.
          rules: how parameters lie on the devices, see ``parameter_shardings``.
        """
        shapes = {path: np.shape(leaf) for path, leaf in flatten_dict(params).items()}
        self._alone: list[tuple[str, ...]] = []
        self._packed: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        alone = {}
        # In the order of the names: the same whether the tree was made, read or merged.
        for path, group in sorted(flatten_dict(groups).items()):
            split = any(re.search(pattern, "/".join(path)) for pattern, _ in rules)
            if group == FROZEN:
                continue
            if split or (len(shapes[path]) > 1 and group not in ("steps", "offsets")):
                self._alone.append(path)
                alone[path] = group
            else:
                self._packed[group].append(path)
        self._shapes = shapes
        self.groups = {"alone": unflatten_dict(alone), "packed": {g: g for g in self._packed}}

    @property
    def names(self) -> list[str]:
        """What the leaves of a packed tree are, in their order: a parameter, or a group of them."""
        paths = jax.tree_util.tree_leaves_with_path(self.groups)
        return [_name([key.key for key in path]) for path, _ in paths]

    def repacked(self, leaves: dict[Path, Any], other: Packing) -> dict[Path, Any]:
        """Leaves of a tree that holds packed ones, as another packing would have them.

        Args:
          leaves: by path; those below a packed tree of group g end in ("alone", *parameter) or in
            ("packed", g).
          other: the same groups of parameters, packed otherwise.
        """
        made: dict[Path, Any] = {}
        vectors: dict[Path, dict[tuple[str, ...], Any]] = defaultdict(dict)
        for path, value in leaves.items():
            if "alone" in path:
                at = path.index("alone")
                vectors[path[:at]][path[at + 1 :]] = value
            elif "packed" in path:
                at = path.index("packed")
                start = 0
                for parameter in self._packed[path[at + 1]]:
                    stop = start + math.prod(self._shapes[parameter])
                    piece = value[start:stop].reshape(self._shapes[parameter])
                    vectors[path[:at]][parameter] = piece
                    start = stop
            else:
                made[path] = value
        for prefix, found in vectors.items():
            packed: dict[str, list[Any]] = defaultdict(list)
            groups = {path: group for group, paths in other._packed.items() for path in paths}
            for parameter in sorted(found):
                if parameter in groups:
                    packed[groups[parameter]].append(jnp.ravel(found[parameter]))
                else:
                    made[(*prefix, "alone", *parameter)] = found[parameter]
            for group, parts in packed.items():
                made[(*prefix, "packed", group)] = jnp.concatenate(parts)
        return made

    def pack(self, tree: Any) -> dict[str, Any]:
        """A tree like the parameters' as ``{"alone": tree, "packed": {group: vector}}``."""
        leaves = flatten_dict(tree)
        return {
            "alone": unflatten_dict({path: leaves[path] for path in self._alone}),
            "packed": {
                group: jnp.concatenate([jnp.ravel(leaves[path]) for path in paths])
                for group, paths in self._packed.items()
            },
        }

    def mask(self, chosen: Callable[[str], bool]) -> dict[str, Any]:
        """A packed tree of which parameters are chosen.

        Args:
          chosen: of a parameter's path.

        Returns:
          For each leaf True or False, or, for a vector with some of each, bool as long as it.
        """

        def vector(paths: list[tuple[str, ...]]) -> bool | np.ndarray:
            each = [chosen("/".join(path)) for path in paths]
            if all(each) or not any(each):
                return each[0]
            return np.repeat(each, [math.prod(self._shapes[path]) for path in paths])

        return {
            "alone": unflatten_dict({path: chosen("/".join(path)) for path in self._alone}),
            "packed": {group: vector(paths) for group, paths in self._packed.items()},
        }

    def unpack(self, packed: dict[str, Any], tree: Any) -> Any:
        """The inverse of :meth:`pack`; frozen leaves are taken from ``tree``."""
        leaves = dict(flatten_dict(tree))
        leaves |= flatten_dict(packed["alone"])
        for group, paths in self._packed.items():
            start = 0
            for path in paths:
                shape = self._shapes[path]
                stop = start + math.prod(shape)
                leaves[path] = _slice(packed["packed"][group], start, stop).reshape(shape)
                start = stop
        return unflatten_dict(leaves)


def _name(keys: list[str]) -> str:
    if keys[0] == "alone":
        return "/".join(keys[1:])
    return {
        "steps": "a step size",
        "offsets": "a grid's offset",
        "backbone": "a bias or norm of the backbone",
        "slow": "a slow bias or norm",
    }.get(keys[1], "a bias or norm")


def _slice(vector: Array, start: int, stop: int) -> Array:
    """``vector[start:stop]``.

    XLA compiles a kernel for every slice on a CPU, 10 ms each; a gather's indices are an operand,
    so that all leaves of one size share one.
    """

    def gather(vector: Array) -> Array:
        indices = np.arange(start, stop, dtype=np.int32)
        return vector.at[indices].get(mode="promise_in_bounds", indices_are_sorted=True)

    def sliced(vector: Array) -> Array:
        return jax.lax.slice(vector, (start,), (stop,))

    return jax.lax.platform_dependent(vector, cpu=gather, default=sliced)
