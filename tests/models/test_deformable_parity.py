"""Deformable DETR against transformers' own: outputs, losses and gradients that it once computed.

The fixtures are written by ``experiments/record_parity.py``: tiny models whose parameters and
statistics are all random, one batch of two images of unequal size. With ``AQDETR_PARITY=live``
(``make test-parity``) they are computed anew.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from aqdetr_jax.interop import names
from aqdetr_jax.losses.auxiliary import AuxiliaryLossConfig, aqdetr_detection_loss
from aqdetr_jax.losses.criterion import LossWeights
from aqdetr_jax.losses.proposals import proposal_loss
from aqdetr_jax.losses.targets import Predictions, Targets
from aqdetr_jax.models.config import DeformableConfig, DetrConfig
from aqdetr_jax.models.detector import build_detector
from aqdetr_jax.models.resnet import BackboneConfig

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
VARIANTS = {
    "deformable_plain": DeformableConfig(points=2, sampling="gather"),
    "deformable_single_scale": DeformableConfig(levels=1, points=2, sampling="packed"),
    "deformable_refine": DeformableConfig(points=2, box_refine=True, sampling="dense"),
    "deformable_two_stage": DeformableConfig(points=2, box_refine=True, two_stage=True),
}
CONFIG = DetrConfig(
    family="deformable",
    backbone=BackboneConfig(
        "bottleneck", (1, 1, 2, 1), (2, 4, 4, 6), (1, 2, 2, 2), (1, 1, 1, 1), stem_width=8
    ),
    num_classes=5,
    num_queries=7,
    dim=32,
    heads=4,
    encoder_layers=2,
    decoder_layers=2,
    ffn=12,
    dropout=0.0,
)
WEIGHTS = LossWeights(cls=2.0, l1=5.0, giou=2.0, kind="focal")
each_variant = pytest.mark.parametrize("name", VARIANTS)
pytestmark = pytest.mark.usefixtures("quick_compile")


def config_of(name):
    return DetrConfig(**{**CONFIG.__dict__, "deformable": VARIANTS[name]})


def rows_of(name):
    shared = not VARIANTS[name].box_refine
    return names.HUGGING_FACE_DEFORMABLE_SHARED if shared else names.HUGGING_FACE_DEFORMABLE


@functools.cache
def fixture(name):
    """{group: {name: array}}."""
    if os.environ.get("AQDETR_PARITY") == "live":
        path = FIXTURES.parents[1] / "experiments" / "record_parity.py"
        spec = importlib.util.spec_from_file_location("record_parity", path)
        record_parity = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(record_parity)
        arrays = record_parity.record(name, record_parity.VARIANTS[name])
    else:
        with np.load(FIXTURES / f"{name}.npz") as stored:
            arrays = dict(stored)
    groups = {}
    for key, array in arrays.items():
        group, _, rest = key.partition("/")
        groups.setdefault(group, {})[rest] = array
    return groups


@functools.cache
def computed(name):
    """Our (output, terms, total, gradients by path), in one compilation."""
    data, module = fixture(name), build_detector(config_of(name))
    params, stats = names.translate(data["state"], rows_of(name))
    variables = {
        "params": traverse_util.unflatten_dict(params, sep="/"),
        "batch_stats": traverse_util.unflatten_dict(stats, sep="/"),
    }
    given = data["input"]
    targets = Targets(given["boxes"], given["labels"], given["valid"])

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        output = module.apply({**variables, "params": params}, given["images"], given["mask"])
        total, terms, _ = aqdetr_detection_loss(
            Predictions(output.logits, output.boxes),
            None,
            targets,
            WEIGHTS,
            AuxiliaryLossConfig(),
        )
        if output.proposal_logits is not None:
            found = Predictions(output.proposal_logits, output.proposal_boxes)
            more, proposed, _ = proposal_loss(found, targets, WEIGHTS)
            total, terms = total + more, terms | proposed
        return total, (output, terms)

    (total, (output, terms)), gradients = jax.jit(loss)(variables["params"])
    return output, terms, total, traverse_util.flatten_dict(gradients, sep="/")


@each_variant
def test_every_parameter_is_named_and_has_its_shape(name):
    data, module = fixture(name), build_detector(config_of(name))
    given = data["input"]
    shapes = jax.eval_shape(module.init, jax.random.key(0), given["images"], given["mask"])
    params, stats = names.translate(data["state"], rows_of(name))
    for found, group in ((params, "params"), (stats, "batch_stats")):
        wanted = traverse_util.flatten_dict(shapes[group], sep="/")
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}


@each_variant
def test_stages(name):
    output, want = computed(name)[0], fixture(name)["output"]
    valid = np.asarray(output.memory_valid)
    assert not valid.all()
    np.testing.assert_allclose(output.memory[valid], want["memory"][valid], atol=1e-5)
    np.testing.assert_allclose(output.decoder_features, want["decoded"], atol=1e-5)
    np.testing.assert_allclose(output.logits, want["logits"], atol=1e-5)
    np.testing.assert_allclose(output.boxes, want["boxes"], atol=1e-5)
    assert np.ptp(want["boxes"]) > 0.3
    if VARIANTS[name].two_stage:
        np.testing.assert_allclose(output.proposal_logits[0], want["proposal_logits"], atol=1e-5)
        np.testing.assert_allclose(output.proposal_boxes[0], want["proposal_boxes"], atol=1e-5)


@each_variant
def test_attention_maps(name):
    output, want = computed(name)[0], fixture(name)["output"]
    valid = np.asarray(output.memory_valid)
    for i in range(2):
        own = np.asarray(output.encoder_attention[i].probabilities).transpose(0, 2, 1, 3)
        theirs = want[f"encoder_weights_{i}"].reshape(own.shape)
        np.testing.assert_allclose(own[valid], theirs[valid], atol=1e-5)
        own = np.asarray(output.decoder_cross_attention[i].probabilities).transpose(0, 2, 1, 3)
        theirs = want[f"cross_weights_{i}"].reshape(own.shape)
        np.testing.assert_allclose(own, theirs, atol=1e-5)
        own = output.decoder_self_attention[i].probabilities
        np.testing.assert_allclose(own, want[f"self_weights_{i}"], atol=1e-5)


@each_variant
def test_losses(name):
    _, terms, total, _ = computed(name)
    want = fixture(name)["loss"]
    for term in ("loss_ce", "loss_bbox", "loss_giou"):
        np.testing.assert_allclose(terms[term], want[term], rtol=1e-5)
        np.testing.assert_allclose(terms[f"aux_layers/{term}"], want[f"{term}_0"], rtol=1e-5)
        if VARIANTS[name].two_stage:
            np.testing.assert_allclose(terms[f"proposals/{term}"], want[f"{term}_enc"], rtol=1e-5)
    np.testing.assert_allclose(total, want["total"], rtol=1e-5)


@each_variant
def test_gradients(name):
    """Norm, and product with a fixed random direction, of the gradient of every parameter."""
    gradients, rows = computed(name)[3], rows_of(name)
    want = fixture(name)["gradient"]
    trained = {p for p in gradients if not ("backbone" in p and p.endswith(("scale", "bias")))}
    # A bias before a norm or under a softmax has no gradient but rounding.
    rounding = 1e-6 * np.sqrt(sum(norm**2 for norm, _ in want.values()))
    # A bias before a norm or under a softmax has no gradient but rounding.
    rounding = 1e-6 * np.sqrt(sum(norm**2 for norm, _ in want.values()))
    seen = set()
    for key, (norm, product) in want.items():
        path, layout = names.find(key, rows)
        if path not in trained:
            continue
        seen.add(path)
        own = names.to_theirs(np.asarray(gradients[path], np.float64), layout)
        direction = np.random.default_rng(zlib.crc32(f"direction {key}".encode()))
        direction = direction.normal(size=own.shape)
        atol = 1e-3 * norm + rounding
        np.testing.assert_allclose(np.linalg.norm(own), norm, atol=atol, err_msg=key)
        np.testing.assert_allclose(np.sum(direction * own), product, atol=4 * atol, err_msg=key)
    missing = trained - seen
    assert not missing, missing
    assert jnp.isfinite(sum(jnp.sum(g) for g in gradients.values()))
