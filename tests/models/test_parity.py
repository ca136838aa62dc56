"""Both families against transformers' own: every stage, losses and gradients.

The fixtures are written by ``experiments/record/parity.py``: tiny models whose parameters and
statistics are all random, one batch of two images of unequal size. With ``AQDETR_PARITY=live``
(``make test-parity``) transformers' results are computed anew.
"""

from __future__ import annotations

import functools
import importlib
import os

import jax
import numpy as np
import pytest
from flax import traverse_util

from aqdetr_jax.interop import names
from aqdetr_jax.models.detector import build_detector
from experiments.parity import cases as parity_cases
from experiments.parity import ours as parity_ours
from experiments.parity import store as parity_store

FIXTURES = parity_cases.FIXTURES
ATOL = 1e-5

each = pytest.mark.parametrize("name", parity_cases.TINY)
pytestmark = pytest.mark.usefixtures("quick_compile")


@functools.cache
def batch():
    with np.load(FIXTURES / parity_store.BATCH) as stored:
        return dict(stored)


@functools.cache
def theirs(name):
    if os.environ.get("AQDETR_PARITY") == "live":
        compute = importlib.import_module("experiments.parity.theirs").compute
        return compute(parity_cases.TINY[name], batch())
    return parity_store.load(FIXTURES / f"{name}.npz")


@functools.cache
def ours(name):
    return parity_ours.compute(parity_cases.TINY[name], batch(), theirs(name), table(name))


def table(name):
    return parity_cases.table_of(parity_cases.TINY[name])


@each
def test_every_parameter_is_named_and_has_its_shape(name):
    """Every foreign array is one of our parameters, and every parameter has one."""
    module, given = build_detector(parity_cases.TINY[name]), batch()
    shapes = jax.eval_shape(module.init, jax.random.key(0), given["images"], given["mask"])
    params, stats = names.translate(theirs(name)["state"], table(name))
    for found, group in ((params, "params"), (stats, "batch_stats")):
        wanted = traverse_util.flatten_dict(shapes[group], sep="/")
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}


@each
def test_stages(name):
    """Every stage that is recorded, and that all are."""
    own, want = ours(name)["output"], theirs(name)["output"]
    config = parity_cases.TINY[name]
    expected = {"valid", "position", "decoded", "logits", "boxes"}
    expected |= {f"backbone_{i + 1}" for i in range(len(config.backbone.depths))}
    expected |= {f"encoder{w}_{i}" for i in range(config.encoder_layers) for w in ("", "_weights")}
    for part in ("decoder", "self_weights", "cross_weights"):
        expected |= {f"{part}_{i}" for i in range(config.decoder_layers)}
    if config.deformable.two_stage:
        expected |= {"proposal_logits", "proposal_boxes"}
    assert own.keys() == want.keys() == expected
    assert 0 < want["valid"].sum() < want["valid"].size
    for key in want:
        np.testing.assert_allclose(own[key], want[key], rtol=0, atol=ATOL, err_msg=key)
        # A stage that is the same everywhere would say nothing.
        assert key == "valid" or np.ptp(want[key]) > 0.1, key


@each
def test_losses(name):
    own, want = ours(name)["loss"], theirs(name)["loss"]
    two_stage = parity_cases.TINY[name].deformable.two_stage
    groups = ("", "aux_layers/", *(("proposals/",) if two_stage else ()))
    terms = {f"{g}loss_{term}" for g in groups for term in ("ce", "bbox", "giou")}
    assert own.keys() == want.keys() == terms | {"total"}
    for key in want:
        np.testing.assert_allclose(own[key], want[key], rtol=1e-5, err_msg=key)


@each
def test_gradients(name):
    """Norm, and product with a fixed random direction, of the gradient of every parameter."""
    own, want = ours(name)["gradient"], theirs(name)["gradient"]
    assert own.keys() == want.keys()
    assert len(want) > 50
    # A bias before a norm or under a softmax has no gradient but rounding.
    rounding = 1e-6 * np.sqrt(sum(norm**2 for norm, _ in want.values()))
    for key, (norm, product) in want.items():
        atol = 1e-3 * norm + rounding
        np.testing.assert_allclose(own[key][0], norm, rtol=0, atol=atol, err_msg=key)
        np.testing.assert_allclose(own[key][1], product, rtol=0, atol=4 * atol, err_msg=key)


def test_variants_differ_as_they_should():
    """DC5 has four times the tokens of the same images; basic blocks have two convolutions."""
    tokens = {name: theirs(name)["output"]["valid"].shape[1] for name in ("detr_dc5", "detr_basic")}
    assert tokens == {"detr_dc5": 48, "detr_basic": 12}
    state = theirs("detr_basic")["state"]
    assert not [key for key in state if "layer.2.convolution" in key]
    dilated = theirs("detr_dc5")["output"]["backbone_4"]
    assert dilated.shape[1:3] == (6, 8)
    assert np.isfinite(dilated).all()
