"""The deployed network beside the model it was trained as: floats and codes of every grid."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import tiny_models

from aqdetr_jax.checkpoint.model_folder import InputRule, ModelBundle
from aqdetr_jax.deploy.detector import DeployedDetector, detect, image_sizes, read_out
from aqdetr_jax.deploy.freeze import freeze
from aqdetr_jax.deploy.jax_operations import JaxOperations
from aqdetr_jax.evaluation.coco import postprocess
from aqdetr_jax.quant.config import QuantConfig

pytestmark = pytest.mark.usefixtures("quick_compile")


@functools.cache
def bundle(name, policy="float", **options):
    variables = tiny_models.variables_of(name, policy, **options)
    config = dataclasses.replace(tiny_models.NAMED[name], num_auxiliary=0, auxiliary_groups=1)
    return ModelBundle(
        config,
        QuantConfig(policy=policy, **options),
        InputRule((tiny_models.BUCKET,)),
        ("a", "b", "c"),
        (1, 2, 3),
        variables,
    )


@pytest.mark.parametrize("name", tiny_models.NAMED)
def test_a_float_network_is_its_model(name):
    network = freeze(bundle(name))
    images, mask = tiny_models.batch()
    expected = tiny_models.model(name)(tiny_models.variables_of(name), images, mask)
    got = jax.jit(DeployedDetector(network.config).apply)(network, images, mask)
    for mine, theirs in ((got.logits, expected.logits), (got.boxes, expected.boxes)):
        np.testing.assert_allclose(mine[-1], theirs[-1], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_detections_within_the_network_are_those_outside(name):
    network = freeze(bundle(name))
    images, mask = tiny_models.batch()
    sizes = image_sizes(mask)

    @jax.jit
    def both(network):
        ops = JaxOperations()
        logits, boxes = detect(ops, network, images, sizes)
        kind = network.config.class_loss
        outside = postprocess(logits, boxes, sizes, kind=kind, num_classes=2)
        return read_out(ops, network, logits, boxes, sizes, 2), outside

    for mine, theirs in zip(*both(network), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
