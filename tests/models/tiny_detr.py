"""A small DETR that the tests of this folder share, and so its compilations."""

from __future__ import annotations

import functools

import jax
import numpy as np
import tiny

from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.detr import Detr
from aqdetr_jax.models.resnet import BackboneConfig
from aqdetr_jax.quant.policy import stock_policy

CONFIG = DetrConfig(
    BackboneConfig("basic", (1,), (8,), (2,), (1,), 8, 3, 2, False),
    num_classes=3,
    num_queries=5,
    num_auxiliary=6,
    auxiliary_groups=2,
    dim=16,
    heads=2,
    encoder_layers=1,
    decoder_layers=2,
    ffn=8,
    dropout=0.2,
)
STRIDE = 4
SIZES = [(16, 12), (12, 16)]
BUCKET = (32, 32)


def padded(bucket, fill=0, sizes=SIZES):
    """Random images with ``fill`` (or noise) in the padding, and their masks."""
    rng = np.random.default_rng(0)
    images = np.full((len(sizes), *bucket, 3), fill, np.uint8)
    mask = np.zeros((len(sizes), *bucket), bool)
    for i, (h, w) in enumerate(sizes):
        images[i, :h, :w] = rng.integers(0, 256, (h, w, 3))
        mask[i, :h, :w] = True
    return images, mask


@functools.cache
def variables_of(policy="float", **options):
    """Random values in every variable, whatever its initialiser says."""
    return tiny.random_variables(Detr(CONFIG, stock_policy(policy, **options)), *padded(BUCKET))


@functools.cache
def model(policy="float", auxiliary=False, arithmetic="fake", **options):
    """Jitted inference, (variables, images, mask) -> DetrOutput."""
    module = Detr(CONFIG, stock_policy(policy, arithmetic=arithmetic, **options))
    return jax.jit(lambda v, images, mask: module.apply(v, images, mask, auxiliary=auxiliary))
