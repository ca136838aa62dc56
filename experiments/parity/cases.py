"""What is compared with other implementations: models by our configuration, a batch, randomness.

No torch here: the tests read recorded results without it.
"""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from aqdetr_jax.interop.names import Row
from aqdetr_jax.interop.tables import TABLES
from aqdetr_jax.models.config import DeformableConfig, DetrConfig
from aqdetr_jax.models.resnet import BackboneConfig, resnet_config

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
BUCKET, SIZES = (96, 128), ((96, 128), (60, 90))
FULL_BUCKET, FULL_SIZES = (256, 320), ((256, 320), (200, 250))


def _bottleneck(depths: tuple[int, ...], dc5: bool = False) -> BackboneConfig:
    strides, dilations = (1, 2, 2, 2), (1, 1, 1, 1)
    if dc5:
        strides, dilations = (1, 2, 2, 1), (1, 1, 1, 2)
    return BackboneConfig("bottleneck", depths, (2, 4, 4, 6), strides, dilations, stem_width=8)


_DETR = DetrConfig(
    backbone=_bottleneck((1, 1, 2, 1)),
    num_classes=5,
    num_queries=7,
    dim=32,
    heads=4,
    encoder_layers=2,
    decoder_layers=2,
    ffn=12,
    dropout=0.0,
)


def _deformable(base: DetrConfig, **changes) -> DetrConfig:
    return dataclasses.replace(base, family="deformable", deformable=DeformableConfig(**changes))


# A dilated convolution needs a second block in the last stage: the first keeps the old dilation.
_TINY_DC5 = dataclasses.replace(_DETR, backbone=_bottleneck((1, 1, 1, 2), dc5=True))

TINY: dict[str, DetrConfig] = {
    "detr_bottleneck": _DETR,
    "detr_basic": dataclasses.replace(
        _DETR,
        backbone=BackboneConfig("basic", (1, 2, 1, 2), (8, 8, 12, 16), stem_width=8),
    ),
    "detr_dc5": _TINY_DC5,
    "deformable_plain": _deformable(_DETR, points=2, sampling="gather"),
    "deformable_single_scale": _deformable(_DETR, levels=1, points=2, sampling="packed"),
    "deformable_dc5": _deformable(_TINY_DC5, levels=1, points=2),
    "deformable_refine": _deformable(_DETR, points=2, box_refine=True, sampling="dense"),
    "deformable_two_stage": _deformable(_DETR, points=2, box_refine=True, two_stage=True),
}
"""Tiny models of every kind, recorded under tests/fixtures."""

_R50 = DetrConfig(dropout=0.0)
_FULL_DEFORMABLE = dataclasses.replace(_R50, num_queries=300, ffn=1024)
_FULL_DC5 = dataclasses.replace(_R50, backbone=resnet_config("resnet50", dc5=True))
FULL: dict[str, DetrConfig] = {
    "detr_r50": _R50,
    "detr_r50_dc5": _FULL_DC5,
    "detr_r101": dataclasses.replace(_R50, backbone=resnet_config("resnet101")),
    "detr_r101_dc5": dataclasses.replace(_R50, backbone=resnet_config("resnet101", dc5=True)),
    "deformable_full": _deformable(_FULL_DEFORMABLE),
    "deformable_full_single_scale": _deformable(_FULL_DEFORMABLE, levels=1),
    "deformable_full_dc5": _deformable(
        dataclasses.replace(_FULL_DEFORMABLE, backbone=_FULL_DC5.backbone), levels=1
    ),
    "deformable_full_refine": _deformable(_FULL_DEFORMABLE, box_refine=True),
    "deformable_full_two_stage": _deformable(_FULL_DEFORMABLE, box_refine=True, two_stage=True),
}
"""The official models."""


def table_of(config: DetrConfig) -> tuple[Row, ...]:
    """The names that a model has in transformers."""
    if config.family == "detr":
        return TABLES["huggingface_detr"]
    shared = "" if config.deformable.box_refine else "_shared"
    return TABLES[f"huggingface_deformable{shared}"]


def generator(name: str) -> np.random.Generator:
    """Randomness by name, so that nothing depends on an order."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def direction(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The fixed random direction with which the gradient of a parameter is multiplied."""
    return generator(f"direction {name}").normal(size=shape)


def batch(
    bucket: tuple[int, int] = BUCKET,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    classes: int = 5,
) -> dict[str, np.ndarray]:
    """Two images of unequal size in one bucket, with two and three targets."""
    rng = np.random.default_rng(7)
    images = np.zeros((2, *bucket, 3), np.uint8)
    mask = np.zeros((2, *bucket), bool)
    for i, (height, width) in enumerate(sizes):
        # Smooth: sampling between unlike neighbours would multiply rounding errors.
        coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        images[i, :height, :width] = np.asarray(image)
        mask[i, :height, :width] = True
    boxes = rng.uniform(0.2, 0.5, (2, 3, 4)).astype(np.float32)
    labels = rng.integers(0, classes, (2, 3)).astype(np.int32)
    valid = np.array([[True, True, False], [True, True, True]])
    return {"images": images, "mask": mask, "boxes": boxes, "labels": labels, "valid": valid}
