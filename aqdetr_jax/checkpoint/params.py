"""Parameters for inference as one folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from aqdetr_jax import trees
from aqdetr_jax.checkpoint.checksums import find_damage, read_manifest, write_manifest
from aqdetr_jax.checkpoint.store import STEP, CheckpointError, load_tree
from aqdetr_jax.io import (
    UNFINISHED,
    is_empty_folder,
    partial_folder,
    put_in_place,
    read_json,
    remove_folder,
    write_json_atomic,
)
from aqdetr_jax.parallel.hosts import barrier
from aqdetr_jax.paths import as_path

_PARAMS = "params"  # kind of a model folder's manifest


_FOREIGN = ("*.safetensors", "*.bin", "*.pth", "*.pt")


def check_target(path: str | Path) -> Path:
    """Where parameters are to be saved, as an absolute path.

    Raises:
      FileExistsError: ``path`` exists and is neither a model folder nor empty. (A run's work
        directory has a manifest as well.)
    """
    path = as_path(path).absolute()
    if path.exists() and not _may_be_replaced(path):
        raise FileExistsError(
            f"{path} exists and is not a model folder, which alone is replaced; choose another name"
        )
    return path


def _may_be_replaced(path: Path) -> bool:
    """Whether a new model may take a path's place: an earlier one, or an empty folder."""
    try:
        return read_manifest(path / "manifest.json").get("kind") == _PARAMS
    except (OSError, ValueError):
        return is_empty_folder(path) or (path / UNFINISHED).is_file()


def save_params(
    path: str | Path,
    params: Any,
    metadata: Mapping[str, Any],
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Saves parameters for inference, with all that is needed to use them, as one folder.

    The folder appears whole or not at all; an earlier model folder of that name is replaced.

    Args:
      path: folder to write.
      params: nested dict of arrays, on any devices.
      metadata: JSON-serialisable facts: configuration, class names, results.
      more: further JSON files for people, by file name.

    Raises:
      FileExistsError: ``path`` exists and is neither a model folder nor empty.
      ValueError: a leaf cannot be saved; the message names it.
    """
    path = check_target(path)
    leaves = {}
    for name, leaf in trees.flatten(params):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        leaves[name] = np.array(trees.to_saveable(name, leaf))
    partial = path.with_name(f".{path.name}.partial")
    if jax.process_index() == 0:
        partial_folder(path).mkdir(parents=True)
    barrier(f"params_{path.name}")
    try:
        ocp.save(partial / "params", trees.nest(leaves))
        if jax.process_index() == 0:
            # Orbax notes the folder that it wrote to; a model travels, and that path is nobody's.
            for note in partial.rglob("commit_success.txt"):
                note.write_text("committed\n", encoding="utf-8")
            for file, content in {**(more or {}), "metadata.json": metadata}.items():
                write_json_atomic(partial / file, dict(content))
            write_manifest(partial / "manifest.json", partial, {"kind": _PARAMS})
            put_in_place(partial, path, "manifest.json")
    finally:
        if jax.process_index() == 0:
            remove_folder(partial)  # there only if something failed
    barrier(f"params_done_{path.name}")


def load_params(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loads what :func:`save_params` wrote, without knowing the tree; files are verified first.

    Args:
      path: folder.

    Returns:
      ``(params, metadata)``: nested dicts of numpy arrays, bit-equal to the saved ones, and the
      metadata. Compare with a model by :func:`trees.check_parameters`.

    Raises:
      FileNotFoundError: no such folder, or it is not a model folder (what it is, is said).
      CheckpointError: a file is missing or damaged.
    """
    path = as_path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"no such folder: {path}")
    if not (path / "manifest.json").is_file() or not (path / "params").is_dir():
        raise FileNotFoundError(f"{path} is not a model folder. {_what_it_is(path)}")
    damage = find_damage(path / "manifest.json", path)
    if damage is not None:
        raise CheckpointError(f"model folder is damaged: {damage}. Restore it from a copy.")
    return load_tree(path / "params", None), read_json(path / "metadata.json")


def _what_it_is(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        kind = read_manifest(path / "manifest.json").get("format")
        if kind is not None:
            return f"It is an export ({kind}): name the run or model that it was made of."
    if not path.is_dir() or any(any(path.glob(pattern)) for pattern in _FOREIGN):
        return "If it is a published checkpoint: aqdetr convert makes a model folder of it."
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        return "It holds a run that is not finished: run its training command again."
    if any(STEP.match(child.name) for child in path.iterdir()):
        return "It holds training checkpoints; name the folder of the run's final parameters."
    inside = sorted(m.parent.relative_to(path).as_posix() for m in path.glob("*/manifest.json"))
    if inside:
        return f"Model folders inside it: {', '.join(inside)}"
    return "It should hold manifest.json, metadata.json and params/."
