"""Parameters of one model taken over by another: by name and shape, class heads by class name."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from aqdetr_jax.checkpoint.model_folder import ModelBundle
from aqdetr_jax.quant.spec import GRID_PARAMETERS

logger = logging.getLogger(__name__)


class LoadReport(NamedTuple):
    """What became of an imported tree, as lists of parameter paths.

    Attributes:
      loaded: taken over.
      new: not in the source; started afresh.
      dropped: in the source only.
      mismatched: different shape in the source; started afresh.
    """

    loaded: list[str]
    new: list[str]
    dropped: list[str]
    mismatched: list[str]

    def summary(self) -> str:
        """One line for people."""
        parts = [f"{len(self.loaded)} loaded"]
        for name in ("new", "dropped", "mismatched"):
            paths = getattr(self, name)
            if paths:
                parts.append(f"{len(paths)} {name} ({', '.join(_roots(paths))})")
        return "parameters: " + ", ".join(parts)


def _roots(paths: Iterable[str]) -> list[str]:
    """Top-level names, and the leaf name for step sizes."""
    return sorted({"step sizes" if p.endswith(GRID_PARAMETERS) else p.split("/")[0] for p in paths})


def merge(own: Mapping[str, Any], source: Mapping[str, Any]) -> tuple[dict[str, Any], LoadReport]:
    """Takes over every array of ``source`` that ``own`` has with the same shape (flat dicts)."""
    merged, report = dict(own), LoadReport([], [], [], [])
    for path, value in own.items():
        if path not in source:
            report.new.append(path)
        elif np.shape(source[path]) != np.shape(value):
            report.mismatched.append(path)
        else:
            merged[path] = source[path]
            report.loaded.append(path)
    report.dropped.extend(path for path in source if path not in own)
    return merged, report


def match_classes(source: ModelBundle, class_names: tuple[str, ...]) -> ModelBundle:
    """The source with its class heads arranged for other classes, by name.

    Heads that know every wanted class keep their columns (and "no object"); others are taken out,
    and start afresh. The head of a two-stage model's proposals says by its first column whether
    there is an object, whatever the first class is, and knows no name: that column stays first, and
    the others, all trained to say no, follow as often as there are classes.

    Args:
      source: imported model.
      class_names: the data's classes, in order.
    """
    params = dict(source.variables["params"])
    heads = [name for name in params if re.fullmatch(r"class_head(_\d+)?", name)]
    if source.class_names == class_names or not heads:
        return source
    known = set(class_names) <= set(source.class_names)
    proposals = f"class_head_{source.config.decoder_layers}"
    for name in heads:
        head = params.pop(name)
        width = np.shape(head["bias"])[0]
        if name == proposals and source.config.deformable.two_stage:
            if width == 1 < len(class_names):  # no column that says no
                continue
            columns = [min(column, width - 1) for column in range(len(class_names))]
        elif not known:
            continue
        else:
            columns = [source.class_names.index(wanted) for wanted in class_names]
            if source.config.class_loss == "softmax":
                # A head may have columns beyond its names (COCO's 91 ids); the last: "no object".
                columns.append(-1)
        params[name] = {k: np.asarray(v)[..., columns] for k, v in head.items()}
    if known:
        logger.info("class head: columns of %d classes taken over by name", len(class_names))
    else:
        new = [name for name in class_names if name not in source.class_names]
        logger.warning("class head starts afresh: the source does not know %s", new[:5])
    return dataclasses.replace(source, variables={**source.variables, "params": params})
