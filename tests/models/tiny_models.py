"""Small models of both families that the tests of this folder share, and so their compilations."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax import traverse_util

from aqdetr_jax.models.config import DeformableConfig, DetrConfig
from aqdetr_jax.models.detector import build_detector
from aqdetr_jax.models.efficientnet_lite import EfficientNetLiteConfig
from aqdetr_jax.models.resnet import BackboneConfig
from aqdetr_jax.quant.policy import stock_policy

DETR = DetrConfig(
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
PLAIN = dataclasses.replace(
    DETR,
    family="deformable",
    backbone=BackboneConfig("basic", (1, 1), (8, 8), (1, 2), (1, 1), 8, 3, 2, False),
    deformable=DeformableConfig(levels=3, stages=2, points=2, norm_groups=4),
)
DEFORMABLE = {
    "plain": PLAIN,
    "two_stage": dataclasses.replace(
        PLAIN,
        deformable=dataclasses.replace(PLAIN.deformable, box_refine=True, two_stage=True),
    ),
}
CONFIGS = {"detr": DETR, **DEFORMABLE}
LITE = dataclasses.replace(
    PLAIN,
    backbone=EfficientNetLiteConfig("efficientnet_lite", width=0.25, depth=0.4),
    deformable=dataclasses.replace(PLAIN.deformable, levels=2),
)
"""On an EfficientNet-Lite; for what is done with a backbone."""
NAMED = {**CONFIGS, "lite": LITE}
BUCKET = (24, 32)


def batch(fill=0, bucket=BUCKET, sizes=((24, 20), (16, 32))):
    """Random images with ``fill`` (or noise) in the padding, and their masks."""
    rng = np.random.default_rng(0)
    images = np.full((len(sizes), *bucket, 3), fill, np.uint8)
    mask = np.zeros((len(sizes), *bucket), bool)
    for i, (h, w) in enumerate(sizes):
        images[i, :h, :w] = rng.integers(0, 256, (h, w, 3))
        mask[i, :h, :w] = True
    return images, mask


@functools.cache
def variables_of(name, policy="float", **options):
    """Random values in every variable, whatever its initialiser says."""
    module = build_detector(NAMED[name], stock_policy(policy, **options))
    return tiny.random_variables(module, *batch())


@functools.cache
def model(name, policy="float", auxiliary=False, arithmetic="fake", **options):
    """Jitted inference, (variables, images, mask) -> DetrOutput."""
    module = build_detector(NAMED[name], stock_policy(policy, arithmetic=arithmetic, **options))
    return jax.jit(lambda v, images, mask: module.apply(v, images, mask, auxiliary=auxiliary))


@functools.cache
def shapes_of(config, policy=None):
    """Flat shapes of all variables."""
    image = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.uint8)
    mask = jax.ShapeDtypeStruct((1, 128, 128), bool)
    module = build_detector(config, policy)
    return jax.eval_shape(module.init, jax.random.key(0), image, mask)


def flat(tree):
    return {k: v.shape for k, v in traverse_util.flatten_dict(tree, sep="/").items()}
