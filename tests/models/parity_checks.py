"""What both tests of parity share: recorded results, our own, and the checks of each stage.

With ``AQDETR_PARITY=live`` (``make test-parity``) transformers' results are computed anew.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from aqdetr_jax.interop import names
from aqdetr_jax.models.detector import build_detector

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import parity_cases  # noqa: E402
import parity_ours  # noqa: E402
import parity_store  # noqa: E402

FIXTURES = parity_cases.FIXTURES
ATOL = 1e-5
DETR = tuple(name for name, c in parity_cases.TINY.items() if c.family == "detr")
DEFORMABLE = tuple(name for name, c in parity_cases.TINY.items() if c.family == "deformable")


@functools.cache
def batch():
    with np.load(FIXTURES / parity_store.BATCH) as stored:
        return dict(stored)


@functools.cache
def theirs(name):
    if os.environ.get("AQDETR_PARITY") == "live":
        compute = importlib.import_module("parity_theirs").compute
        return compute(parity_cases.TINY[name], batch())
    return parity_store.load(FIXTURES / f"{name}.npz")


@functools.cache
def ours(name):
    return parity_ours.compute(parity_cases.TINY[name], batch(), theirs(name), table(name))


def table(name):
    return parity_cases.table_of(parity_cases.TINY[name])


def check_names_and_shapes(name):
    """Every foreign array is one of our parameters, and every parameter has one."""
    module, given = build_detector(parity_cases.TINY[name]), batch()
    shapes = jax.eval_shape(module.init, jax.random.key(0), given["images"], given["mask"])
    params, stats = names.translate(theirs(name)["state"], table(name))
    for found, group in ((params, "params"), (stats, "batch_stats")):
        wanted = traverse_util.flatten_dict(shapes[group], sep="/")
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}


def check_stages(name):
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


def check_losses(name):
    own, want = ours(name)["loss"], theirs(name)["loss"]
    two_stage = parity_cases.TINY[name].deformable.two_stage
    groups = ("", "aux_layers/", *(("proposals/",) if two_stage else ()))
    terms = {f"{g}loss_{term}" for g in groups for term in ("ce", "bbox", "giou")}
    assert own.keys() == want.keys() == terms | {"total"}
    for key in want:
        np.testing.assert_allclose(own[key], want[key], rtol=1e-5, err_msg=key)


def check_gradients(name):
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
