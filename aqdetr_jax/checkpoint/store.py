"""What both kinds of checkpoint share: loading a tree, the name of a step, the error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from aqdetr_jax import trees

STEP = re.compile(r"step_(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be saved or restored; the message names it and the cause."""


def load_tree(folder: Path, abstract: Any) -> Any:
    """Loads the tree in a folder of Orbax's, its arrays as ``abstract`` asks (None: as saved)."""
    saved = ocp.metadata(folder).metadata
    found = {name: jax.ShapeDtypeStruct(m.shape, m.dtype) for name, m in trees.flatten(saved)}
    if abstract is None:
        requests: dict[Any, Any] = {name: np.empty(s.shape, s.dtype) for name, s in found.items()}
        return ocp.load(folder, trees.nest(requests))
    trees.check_parameters(found, abstract, source=str(folder))
    wanted = dict(trees.flatten(abstract))
    requests = {name: trees.to_request(leaf) for name, leaf in wanted.items()}
    loaded = dict(trees.flatten(ocp.load(folder, trees.nest(requests))))
    leaves = [trees.from_loaded(leaf, loaded[name]) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)
