"""bfloat16 between the layers: which arrays are, which are not, and how near float32 that is."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from tiny_models import BUCKET, DEFORMABLE, DETR, batch, model, variables_of

from aqdetr_jax.models.detector import build_detector
from aqdetr_jax.models.dropout import drawing, row_keys
from aqdetr_jax.models.resnet import BackboneConfig
from aqdetr_jax.models.transformer import EncoderLayer
from aqdetr_jax.quant.policy import stock_policy

pytestmark = pytest.mark.usefixtures("quick_compile")

BOTTLENECK = BackboneConfig("bottleneck", (2,), (8,), (2,), (1,), 8, 3, 2, True)
FAMILIES = {"detr": dataclasses.replace(DETR, backbone=BOTTLENECK), **DEFORMABLE}

WIDE = (
    "head",  # logits and boxes
    "sampling_offsets",  # coordinates
    "attention_weights",
    "reference_points",
    "proposal",
    "query_proj",
    "query_norm",
)
"""Modules whose outputs are float32 whatever carries activations."""


def shapes_of_all(config, policy="w4a4"):
    """Every module's outputs, and the gradient of every parameter, without computing them."""
    module = build_detector(config, stock_policy(policy))
    images = jax.ShapeDtypeStruct((2, *BUCKET, 3), jnp.uint8)
    mask = jax.ShapeDtypeStruct((2, *BUCKET), bool)
    variables = jax.eval_shape(module.init, jax.random.key(0), images, mask)

    def forward(variables, images, mask):
        with drawing(row_keys(jax.random.key(0), 2)):
            return module.apply(variables, images, mask, train=True, capture_intermediates=True)

    def loss(params, rest, images, mask):
        output, _ = forward({"params": params, **rest}, images, mask)
        return jnp.sum(output.logits) + jnp.sum(output.boxes)

    _, seen = jax.eval_shape(forward, variables, images, mask)
    params = variables["params"]
    rest = {k: v for k, v in variables.items() if k != "params"}
    gradients = jax.eval_shape(jax.grad(loss), params, rest, images, mask)
    return traverse_util.flatten_dict(seen["intermediates"], sep="/"), gradients


@pytest.mark.parametrize("name", FAMILIES)
def test_activations_are_carried_in_bfloat16_and_gradients_summed_in_float32(name):
    config = dataclasses.replace(FAMILIES[name], dtype="bfloat16")
    outputs, gradients = shapes_of_all(config)
    # What a module hands on comes first; maps follow it.
    dtypes = {path: jax.tree.leaves(found)[0].dtype for path, found in outputs.items()}
    wide = {path for path, dtype in dtypes.items() if dtype == jnp.float32} - {"__call__"}
    assert not {path for path in wide if not any(word in path for word in WIDE)}
    assert sum(dtype == jnp.bfloat16 for dtype in dtypes.values()) > 20
    (output,) = outputs["__call__"]
    assert {output.logits.dtype, output.boxes.dtype} == {jnp.dtype(jnp.float32)}
    assert output.memory.dtype == output.decoder_features.dtype == jnp.bfloat16
    for maps in (*output.encoder_attention, *output.decoder_self_attention):
        assert maps.output.dtype == jnp.bfloat16
    for maps in output.decoder_self_attention:
        assert maps.scores.dtype == maps.probabilities.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


def test_in_float32_nothing_is_narrow():
    outputs, _ = shapes_of_all(FAMILIES["detr"])
    dtypes = {x.dtype for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert dtypes == {jnp.dtype(jnp.float32)}


def test_a_bfloat16_model_is_near_the_float32_one():
    variables, given = variables_of("detr"), batch()
    want = model("detr")(variables, *given)
    module = build_detector(dataclasses.replace(DETR, dtype="bfloat16"))
    found = jax.jit(module.apply)(variables, *given)
    assert 1e-6 < np.abs(found.boxes - want.boxes).max() < 0.03
    spread = np.std(np.asarray(want.logits))
    assert np.abs(found.logits - want.logits).max() < 0.15 * spread


@pytest.mark.parametrize("renormalize", [False, True])
def test_both_arithmetics_agree_in_bfloat16(renormalize):
    config = dataclasses.replace(DETR, dtype="bfloat16")
    rng = np.random.default_rng(0)
    x, position = (jnp.asarray(v, jnp.bfloat16) for v in rng.normal(size=(2, 2, 12, config.dim)))
    valid = np.arange(12) < np.array([[12], [7]])
    layers = {
        arithmetic: EncoderLayer(
            config, stock_policy("w4a4", renormalize=renormalize, arithmetic=arithmetic)
        )
        for arithmetic in ("fake", "integer")
    }
    variables = layers["fake"].init(jax.random.key(0), x, position, valid, False, False)
    fake, integer = (
        jax.jit(lambda v, layer=layer: layer.apply(v, x, position, valid, False, False))(variables)
        for layer in layers.values()
    )
    for mine, theirs in zip(jax.tree.leaves(fake), jax.tree.leaves(integer), strict=True):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_array_equal(mine, theirs)
    assert np.std(np.asarray(fake[0], np.float32)) > 0.1
