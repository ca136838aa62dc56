"""Backbones of other libraries: which one it is, by its shapes, and what it is here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from aqdetr_jax.interop.source import shown
from aqdetr_jax.models.backbone import AnyBackboneConfig
from aqdetr_jax.models.efficientnet_lite import VARIANTS, EfficientNetLiteConfig
from aqdetr_jax.models.layers import NORM_EPS
from aqdetr_jax.models.resnet import BackboneConfig

DEPTHS: Mapping[tuple[str, tuple[int, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}
"""ResNets by their blocks."""

LITE_DEPTHS: Mapping[str, tuple[int, ...]] = {
    name: tuple(x.depth for x in EfficientNetLiteConfig("efficientnet_lite", *sizes).layers)
    for name, sizes in VARIANTS.items()
}
"""EfficientNet-Lites by name."""


class GapError(ValueError):
    """Numbers that do not follow each other: a model of so many layers is not to be built."""


def count(shapes: Mapping[str, Any], before: str, after: str, first: int = 0) -> int:
    """How many numbers stand between two texts at the beginning of the paths.

    Raises:
      GapError: they do not count from ``first`` without a gap.
    """
    pattern = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}")
    numbers = {int(match[1]) for path in shapes if (match := pattern.match(path))}
    if numbers and (min(numbers), max(numbers)) != (first, first + len(numbers) - 1):
        odd = shown(f"{before}{max(numbers)}")
        raise GapError(f"has what is our {odd!r}, but not all that come before it")
    return len(numbers)


def backbone_facts(
    shapes: Mapping[str, tuple[int, ...]], shape: Callable[..., tuple[int, ...]]
) -> dict[str, Any]:
    """What the shapes of a backbone show, see ``variant``; of an EfficientNet-Lite which it is.

    Args:
      shapes: path -> shape of a source's parameters under our names.
      shape: that of a path which must be there, with so many axes.

    Raises:
      GapError: blocks are missing in between, or there is no such EfficientNet-Lite.
    """
    stem = shape("backbone/stem/kernel", 4)
    if "backbone/layer1_0/depthwise/kernel" in shapes:
        return _lite_facts(shapes)
    bottleneck = "backbone/layer1_0/conv3/kernel" in shapes
    # Every stage begins with block 0.
    stages = range(1, 1 + count(shapes, "backbone/layer", "_0/conv1/", first=1))
    return {
        "block": "bottleneck" if bottleneck else "basic",
        "depths": tuple(count(shapes, f"backbone/layer{i}_", "/") for i in stages),
        "widths": tuple(shape(f"backbone/layer{i}_0/conv1/kernel", 4)[-1] for i in stages),
        "stem_width": stem[-1],
        "stem_kernel": stem[0],
    }


def _lite_facts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    layers = range(1, 1 + count(shapes, "backbone/layer", "_0/project/", first=1))
    depths = tuple(count(shapes, f"backbone/layer{i}_", "/") for i in layers)
    widths = tuple(shapes[f"backbone/layer{i}_0/project/kernel"][-1] for i in layers)
    for name, (width, depth) in VARIANTS.items():
        config = EfficientNetLiteConfig("efficientnet_lite", width, depth)
        if (depths, widths) == tuple(
            zip(*((x.depth, x.width) for x in config.layers), strict=True)
        ):
            return {"efficientnet_lite": name, "depths": depths}
    raise GapError(
        f"has the names of an EfficientNet-Lite, but depths={depths} and widths={widths}, which "
        f"none has of {', '.join(VARIANTS)}"
    )


def backbone_config(facts: Mapping[str, Any]) -> AnyBackboneConfig:
    """A backbone from its facts."""
    if "efficientnet_lite" in facts:
        return EfficientNetLiteConfig("efficientnet_lite", *VARIANTS[facts["efficientnet_lite"]])
    last = len(facts["depths"]) - 1
    dilated = facts.get("dilation", False)
    return BackboneConfig(
        facts["block"],
        facts["depths"],
        facts["widths"],
        strides=tuple(1 if i == 0 or (dilated and i == last) else 2 for i in range(last + 1)),
        dilations=tuple(2 if dilated and i == last else 1 for i in range(last + 1)),
        stem_width=facts["stem_width"],
        stem_kernel=facts["stem_kernel"],
    )


def backbone_name(backbone: AnyBackboneConfig) -> str:
    """A name like ``resnet50-dc5``."""
    if isinstance(backbone, EfficientNetLiteConfig):
        return backbone.variant
    known = DEPTHS.get((backbone.block, backbone.depths))
    name = known or f"resnet-{'-'.join(map(str, backbone.depths))}"
    return name + ("-dc5" if backbone.output_stride < 32 else "")


def with_our_eps(stats: Mapping[str, np.ndarray], eps: float) -> dict[str, np.ndarray]:
    """Running statistics whose variances, plus our norms' eps, are theirs plus their own."""
    if eps == NORM_EPS:
        return dict(stats)
    return {
        path: (value.astype(np.float64) + eps - NORM_EPS).astype(np.float32)
        if path.endswith("/var")
        else value
        for path, value in stats.items()
    }
