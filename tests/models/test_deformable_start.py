"""Deformable DETR before any training: sizes, first values, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest
import tiny
from tiny_models import DEFORMABLE, PLAIN, batch, flat, shapes_of

from aqdetr_jax.models.config import DeformableConfig, DetrConfig
from aqdetr_jax.models.deformable_attention import offset_bias_init
from aqdetr_jax.models.detector import build_detector
from aqdetr_jax.models.resnet import resnet_config
from aqdetr_jax.training.config import ExperimentConfig, OptimizerConfig
from aqdetr_jax.training.optimizer import count_trainable, group_of

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize(
    ("options", "learnable", "trainable", "state"),
    [
        ({}, 40_069_665, 39_847_265, 40_175_905),
        ({"levels": 1}, 34_066_593, 33_844_193, 34_172_833),
        ({"box_refine": True}, 40_849_660, 40_627_260, 40_955_900),
        ({"box_refine": True, "two_stage": True}, 41_181_529, 40_959_129, 41_287_769),
    ],
)
def test_parameter_counts(options, learnable, trainable, state):
    config = DetrConfig(
        family="deformable",
        backbone=resnet_config("resnet50"),
        num_queries=50,  # of 300: a small image has no more tokens
        ffn=1024,
        deformable=DeformableConfig(**options),
    )
    missing = 0 if options.get("two_stage") else 250 * 512
    variables = shapes_of(config)
    params = variables["params"]
    early = OptimizerConfig(frozen=(r"backbone/(stem|layer1_)",))
    assert count_trainable(params, OptimizerConfig(), frozen_norms=True) + missing == learnable
    assert count_trainable(params, early, frozen_norms=True) + missing == trainable
    assert sum(x.size for x in jax.tree.leaves(variables)) + missing == state


def test_slow_parameters():
    slow = OptimizerConfig(slow=(r"sampling_offsets/", r"reference_points/"))
    paths = flat(shapes_of(PLAIN)["params"])
    found = {p for p in paths if group_of(p, slow, frozen_norms=True) == "slow"}
    assert found == {p for p in paths if "sampling_offsets" in p or "reference_points" in p}
    assert len(found) == 2 * (1 + 2) + 2


def test_families_and_losses_must_fit():
    with pytest.raises(ValueError, match="must be 'focal'"):
        ExperimentConfig(model=PLAIN)
    with pytest.raises(ValueError, match="two_stage=True needs box_refine=True"):
        DeformableConfig(two_stage=True)
    with pytest.raises(ValueError, match=r"width 16 does not split into .*=32 groups"):
        dataclasses.replace(PLAIN, deformable=DeformableConfig())


def test_more_proposals_than_tokens_are_refused():
    config = dataclasses.replace(DEFORMABLE["two_stage"], num_queries=6000)
    with pytest.raises(ValueError, match="6006 proposals wanted of 5376 tokens"):
        shapes_of(config)


def test_the_first_offsets_look_around():
    bias = offset_bias_init(8, 2, 3)(None, (8 * 2 * 3 * 2,)).reshape(8, 2, 3, 2)
    # torch: eight heads, the neighbours on a square; point k is k + 1 cells away.
    around = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for k in range(3):
        for level in range(2):
            np.testing.assert_allclose(bias[:, level, k], (k + 1) * np.array(around), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "first_size"),
    [({}, -2.0), ({"box_refine": True}, -2.0), ({"box_refine": True, "two_stage": True}, 0.0)],
)
def test_official_start(options, first_size):
    """Of the heads, the attentions, the embeddings and the reference points."""
    config = dataclasses.replace(
        PLAIN, deformable=dataclasses.replace(PLAIN.deformable, **options), num_queries=40
    )
    module = build_detector(config)
    start = tiny.flat(jax.jit(module.init)(jax.random.key(0), *batch()))
    heads = sorted(path.split("/")[0] for path in start if "class_head" in path and "bias" in path)
    count = 2 + options.get("two_stage", 0)
    assert len(heads) == (count if options else 1)
    for number, name in enumerate(heads):
        np.testing.assert_allclose(start[f"{name}/bias"], -math.log(99), rtol=1e-6)
        assert np.abs(start[f"{name}/kernel"]).max() == pytest.approx(0.25, rel=0.2)  # 1/sqrt(16)
        last = f"{name.replace('class', 'box')}/layer_2"
        assert not np.any(start[f"{last}/kernel"])
        size = 0.0 if number else first_size
        np.testing.assert_array_equal(start[f"{last}/bias"], [0, 0, size, size])
    for path, x in start.items():
        if path.endswith(("sampling_offsets/kernel", "attention_weights/kernel")):
            assert not np.any(x), path
        if path.endswith(("value_proj/kernel", "output_proj/kernel")):
            assert np.abs(x).max() == pytest.approx(math.sqrt(6 / 32), rel=0.1), path
        if path.endswith("sampling_offsets/bias"):
            np.testing.assert_array_equal(x, offset_bias_init(2, 3, 2)(None, x.shape))
        if path.endswith(("attention_weights/bias", "value_proj/bias", "output_proj/bias")):
            assert not np.any(x), path
    embeddings = {"level_embed", "query_embed", "auxiliary_queries"} & set(start)
    assert len(embeddings) == (1 if options.get("two_stage") else 3)
    for path in embeddings:
        assert np.std(start[path]) == pytest.approx(1, abs=0.25), path
    if not options.get("two_stage"):
        kernel = start["reference_points/kernel"]
        assert np.abs(kernel).max() == pytest.approx(math.sqrt(6 / 18), rel=0.15)
        assert not np.any(start["reference_points/bias"])
