"""Which library and model a state dict is of, told by its names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from aqdetr_jax.interop import names
from aqdetr_jax.interop.tables import TABLES
from aqdetr_jax.models import efficientnet_lite
from aqdetr_jax.models.layers import NORM_EPS

SHARED = "_shared"
"""Ending of the tables of a Deformable DETR with one head for all layers."""


class Kind(NamedTuple):
    """A kind of source.

    Attributes:
      table: its key in TABLES; that of a Deformable DETR with refinement where there are two.
      family: what it holds.
      title: for people.
      norm_eps: what its batch norms add to variances.
      mean, std: of the channels of its images, values 0 to 1; None = the official ones.
    """

    table: str
    family: Literal["detr", "deformable", "backbone"]
    title: str
    norm_eps: float = NORM_EPS
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


_LITE = (efficientnet_lite.NORM_EPS, efficientnet_lite.PIXEL_MEAN, efficientnet_lite.PIXEL_STD)

KINDS = (
    Kind("huggingface_detr", "detr", "DETR of Hugging Face transformers"),
    Kind("huggingface_deformable", "deformable", "Deformable DETR of Hugging Face transformers"),
    Kind("detr", "detr", "DETR of facebookresearch/detr"),
    Kind("deformable_detr", "deformable", "Deformable DETR of fundamentalvision"),
    Kind("torchvision_resnet", "backbone", "ResNet of torchvision or timm, which have one naming"),
    Kind("timm_efficientnet_lite", "backbone", "EfficientNet-Lite of timm", *_LITE),
    Kind(
        "efficientnet_lite_pytorch",
        "backbone",
        "EfficientNet-Lite0 of efficientnet-lite-pytorch",
        *_LITE,
    ),
)

ALMOST_NOTHING = 0.5
"""A source is of no kind that has rows for less than this part of its names."""


def recognise(state: Mapping[str, np.ndarray], name: str) -> tuple[str, Kind]:
    """Which table a state dict is written in.

    Args:
      state: arrays by foreign name.
      name: the source, for messages.

    Returns:
      (key in TABLES, kind).

    Raises:
      ValueError: no table explains all names; the message says which it comes closest to, and
        gives the first names that are not explained.
    """
    unknown = {kind: _unexplained(state, kind.table) for kind in KINDS}
    kind = min(KINDS, key=lambda k: len(unknown[k]))
    left = unknown[kind]
    known = "; ".join(k.title for k in KINDS)
    if len(left) == len(state):
        raise ValueError(
            f"{name}: nothing matches: none of its {len(state)} names (first: "
            f"{', '.join(left[:3])}) is one of a model that is read. Known are: {known}"
        )
    if len(left) > ALMOST_NOTHING * len(state):
        raise ValueError(
            f"{name}: almost nothing matches: it is closest to a {kind.title}, but only "
            f"{len(state) - len(left)} of its {len(state)} names are those of one (first of the "
            f"others: {', '.join(left[:3])}). Known are: {known}"
        )
    if left:
        raise ValueError(
            f"{name}: looks like a {kind.title}, but {len(left)} of its {len(state)} names are not "
            f"those of one: {', '.join(left[:5])}. It is another model, or a variant that is not "
            "read"
        )
    shared = kind.family == "deformable" and shares_heads(state)
    check_arrays(state, kind.table + SHARED * shared, name)
    return kind.table + SHARED * shared, kind


def is_known(state: Mapping[str, np.ndarray]) -> bool:
    """Whether one table explains all names of a state dict."""
    return any(all(_explains(kind.table, name) for name in state) for kind in KINDS)


def _explains(table: str, name: str) -> bool:
    try:
        names.find(name, TABLES[table])
    except ValueError:
        return False
    return True


def _unexplained(state: Mapping[str, np.ndarray], table: str) -> list[str]:
    """The names that a table has no row for."""
    return [name for name in state if not _explains(table, name)]


def check_arrays(state: Mapping[str, np.ndarray], table: str, source: str) -> None:
    """Every array that becomes ours must hold floating-point numbers, along the axes we expect.

    A kernel has as many axes as its layout turns around; all else that is ours has one or two.

    Raises:
      ValueError: one has not; the message names it.
    """
    axes = {"conv": (4,), "dense": (2,), "same": (1, 2)}
    for name, array in state.items():
        place = names.find(name, TABLES[table])
        if not place.paths:
            continue
        wanted = axes[place.layout]
        if array.ndim not in wanted:
            raise ValueError(
                f"{source}: {name} of shape {list(array.shape)} should have "
                f"{' or '.join(map(str, wanted))} axes: it is another model, or a variant that is "
                "not read"
            )
        if array.dtype != np.float32:
            raise ValueError(
                f"{source}: {name} holds {array.dtype} and should hold floating-point numbers: it "
                "is another model, or quantized"
            )


def shares_heads(state: Mapping[str, np.ndarray]) -> bool:
    """Whether one box head serves all layers of a Deformable DETR (no box refinement).

    With refinement the decoder holds the heads as well. Where a writer left out what is there
    twice, heads that differ from each other tell.
    """
    heads: dict[str, list[np.ndarray]] = {}
    for name, array in state.items():
        if re.search(r"\.decoder\.bbox_embed\.", name):
            return False
        match = re.fullmatch(r"bbox_embed\.\d+\.(.+)", name)
        if match:
            heads.setdefault(match[1], []).append(array)
    return all(np.array_equal(arrays[0], a) for arrays in heads.values() for a in arrays[1:])


def dropped_names(state: Mapping[str, np.ndarray], table: str) -> list[str]:
    """The names that a table knows and has no use for (counters, ImageNet's classifier)."""
    return [name for name in state if not names.find(name, TABLES[table]).paths]


def tied_heads(params: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """Parameters with one class head a layer, where a writer kept only the first of equal ones.

    transformers 5 shares the class head among the layers of a refining Deformable DETR and writes
    what is shared once.

    Args:
      params: path -> parameter; one class head at least.
      layers: heads wanted.
    """
    found = {path.split("/")[0] for path in params if re.match(r"class_head_\d+/", path)}
    if found != {"class_head_0"}:
        return params
    first = {path: v for path, v in params.items() if path.startswith("class_head_0/")}
    copies = {
        path.replace("class_head_0", f"class_head_{layer}", 1): value
        for layer in range(1, layers)
        for path, value in first.items()
    }
    return {**params, **copies}
