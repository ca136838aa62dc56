"""Named leaves of a pytree: paths, comparison with what a model expects, kinds of leaves."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

Path = tuple[str, ...]

_SHOWN = 10  # names listed per kind of mismatch


class ParameterMismatchError(ValueError):
    """Saved parameters do not fit the model: names, shapes or dtypes differ, all are listed."""


def flatten(tree: Any) -> list[tuple[Path, Any]]:
    """Lists the leaves of any pytree with their paths, such as ``("params", "conv1", "kernel")``.

    Dict keys, attribute names and positions all become strings, in the order of
    ``jax.tree.leaves``.
    """
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(tuple(_key_name(key) for key in path), leaf) for path, leaf in pairs]


def digest(tree: Any) -> str:
    """SHA-256 over the bytes of every leaf, its path, shape and dtype included, hex."""
    total = hashlib.sha256()
    for path, leaf in sorted(flatten(jax.device_get(tree)), key=lambda item: item[0]):
        array = np.asarray(leaf)
        total.update(f"{path_name(path)} {array.shape} {array.dtype}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def path_name(path: Path) -> str:
    """Joins a path for people and for regular expressions: ``params/conv1/kernel``."""
    return "/".join(path)


def nest(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """Builds nested dicts from ``{path: leaf}``, the inverse of :func:`flatten` for dicts.

    Raises:
      ValueError: one path is the beginning of another.
    """
    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path_name(path)}: {key!r} is both a leaf and a group")
        if not path or path[-1] in node:
            raise ValueError(f"two leaves are named {path_name(path)!r}")
        node[path[-1]] = leaf
    return root


def check_parameters(found: Any, expected: Any, source: str) -> None:
    """Checks that two trees have the same names, shapes and dtypes.

    Args:
      found: what a checkpoint holds: a pytree, or ``{path: leaf}``; leaves have shape and dtype.
      expected: pytree of what the model has; Python numbers match any scalar.
      source: where ``found`` comes from, for the message.

    Raises:
      ParameterMismatchError: every missing and unexpected name (with the nearest one on the other
        side) and every different shape or dtype, ten of each kind at most.
    """
    if not (isinstance(found, dict) and all(isinstance(key, tuple) for key in found)):
        found = dict(flatten(found))
    have = {path_name(path): leaf for path, leaf in found.items()}
    want = {path_name(path): leaf for path, leaf in flatten(expected)}
    missing = [name for name in want if name not in have]
    unexpected = [name for name in have if name not in want]
    lines = _list_names("missing from the checkpoint", missing, unexpected)
    lines += _list_names("in the checkpoint but not in the model", unexpected, missing)
    different = []
    for name in (name for name in want if name in have):
        shape, dtype = np.shape(want[name]), getattr(want[name], "dtype", None)
        if tuple(have[name].shape) != tuple(shape):
            different.append(
                f"{name} has shape {tuple(have[name].shape)} in the checkpoint, "
                f"{tuple(shape)} in the model"
            )
        elif dtype is not None and np.dtype(have[name].dtype) != np.dtype(dtype):
            different.append(
                f"{name} has dtype {have[name].dtype} in the checkpoint, {dtype} in the model"
            )
    lines += _shorten(different)
    if lines:
        raise ParameterMismatchError("\n  ".join([f"{source} does not fit the model:", *lines]))


def to_saveable(path: Path, leaf: Any) -> Any:
    """Returns a leaf as a jax array or a private numpy copy, ready to be written.

    Raises:
      ValueError: the leaf is empty, a typed PRNG key, or not numeric; the message names it.
    """
    name = path_name(path)
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float):
        raise ValueError(f"{name} is a {type(leaf).__name__}; only arrays and numbers are saved")
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError(f"{name} is a typed PRNG key; save jax.random.key_data(key) instead")
    # A copy, because the caller may overwrite a numpy array while it is being written.
    array = leaf if isinstance(leaf, jax.Array) else np.array(leaf)
    if array.dtype.kind in "OUS":
        raise ValueError(f"{name} has dtype {array.dtype}; only numbers are saved")
    if array.size == 0:
        raise ValueError(f"{name} is empty (shape {array.shape}); leave it out of the checkpoint")
    return array


def to_request(leaf: Any) -> Any:
    """Turns a leaf of an abstract tree into a request for the array: on a device, or numpy.

    Raises:
      ValueError: a multi-process run gives a leaf without a sharding.
    """
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        sharding = leaf.sharding
        if sharding is None:
            if jax.process_count() > 1:
                raise ValueError("give every leaf a sharding to restore in a multi-process run")
            sharding = SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    value = np.asarray(leaf)
    return np.empty(value.shape, value.dtype)


def from_loaded(leaf: Any, loaded: Any) -> Any:
    """Gives a loaded array the kind of the abstract leaf that asked for it."""
    if isinstance(leaf, bool | int | float) and not isinstance(leaf, np.generic):
        return type(leaf)(loaded)
    return loaded[()] if isinstance(leaf, np.generic) else loaded


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _list_names(what: str, names: list[str], others: list[str]) -> list[str]:
    lines = []
    for name in names:
        close = difflib.get_close_matches(name, others, n=1, cutoff=0.6)
        lines.append(f"{what}: {name}" + (f" (nearest: {close[0]})" if close else ""))
    return _shorten(lines)


def _shorten(lines: list[str]) -> list[str]:
    more = len(lines) - _SHOWN
    return [*lines[:_SHOWN], f"... and {more} more"] if more > 0 else lines
