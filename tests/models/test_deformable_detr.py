"""Deformable DETR beyond parity: sizes, auxiliary queries, padding, its two arithmetics."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util

from aqdetr_jax.models.config import DeformableConfig, DetrConfig
from aqdetr_jax.models.deformable_attention import DeformableAttention, offset_bias_init
from aqdetr_jax.models.detector import build_detector
from aqdetr_jax.models.quantized import OBSERVED
from aqdetr_jax.models.resnet import BackboneConfig, resnet_config
from aqdetr_jax.quant.policy import Policy, stock_policy
from aqdetr_jax.training.config import ExperimentConfig, OptimizerConfig
from aqdetr_jax.training.optimizer import count_trainable, group_of

PLAIN = DetrConfig(
    family="deformable",
    backbone=BackboneConfig("basic", (1, 1), (8, 8), (1, 2), (1, 1), 8, 3, 2, False),
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
    deformable=DeformableConfig(levels=3, stages=2, points=2, norm_groups=4),
)
CONFIGS = {
    "plain": PLAIN,
    "two_stage": dataclasses.replace(
        PLAIN,
        deformable=dataclasses.replace(PLAIN.deformable, box_refine=True, two_stage=True),
    ),
}
BUCKET = (24, 32)
each_config = pytest.mark.parametrize("name", CONFIGS)
pytestmark = pytest.mark.usefixtures("quick_compile")


def batch(fill=0):
    """Random images with ``fill`` in the padding, and their masks."""
    rng = np.random.default_rng(0)
    images = np.full((2, *BUCKET, 3), fill, np.uint8)
    mask = np.zeros((2, *BUCKET), bool)
    for i, (h, w) in enumerate([(24, 20), (16, 32)]):
        images[i, :h, :w] = rng.integers(0, 256, (h, w, 3))
        mask[i, :h, :w] = True
    return images, mask


@functools.cache
def variables_of(name, policy="float", **options):
    module = build_detector(CONFIGS[name], stock_policy(policy, **options))
    return tiny.random_variables(module, *batch())


@functools.cache
def model(name, policy="float", auxiliary=False, arithmetic="fake", **options):
    """Jitted inference."""
    module = build_detector(CONFIGS[name], stock_policy(policy, arithmetic=arithmetic, **options))
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


# --- sizes ---


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
    config = dataclasses.replace(CONFIGS["two_stage"], num_queries=6000)
    with pytest.raises(ValueError, match="6006 proposals wanted of 5376 tokens"):
        shapes_of(config)


def test_the_first_offsets_look_around():
    bias = offset_bias_init(8, 2, 3)(None, (8 * 2 * 3 * 2,)).reshape(8, 2, 3, 2)
    # torch: eight heads, the neighbours on a square; point k is k + 1 cells away.
    around = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for k in range(3):
        for level in range(2):
            np.testing.assert_allclose(bias[:, level, k], (k + 1) * np.array(around), atol=1e-6)


# --- auxiliary queries ---


@each_config
def test_auxiliary_queries_do_not_touch_the_object_queries(name):
    variables, given = variables_of(name, "w4a4"), batch()
    alone = model(name, "w4a4")(variables, *given)
    together = model(name, "w4a4", auxiliary=True)(variables, *given)
    assert alone.auxiliary_logits is None
    assert together.auxiliary_logits.shape == (2, 2, 6, 3)
    assert together.auxiliary_boxes.shape == (2, 2, 6, 4)
    np.testing.assert_allclose(together.logits, alone.logits, atol=1e-5)
    np.testing.assert_allclose(together.boxes, alone.boxes, atol=1e-5)
    assert np.ptp(np.asarray(together.auxiliary_logits), axis=2).min() > 0


def test_auxiliary_proposals_are_the_next_best():
    """With two stages the best N + M tokens become queries, the first N the object queries."""
    variables, given = variables_of("two_stage"), batch()
    output = model("two_stage", auxiliary=True)(variables, *given)
    order = np.argsort(-np.asarray(output.proposal_logits)[0, :, :, 0], axis=1)[:, :11]
    best = np.take_along_axis(np.asarray(output.proposal_boxes)[0], order[..., None], axis=1)
    maps = output.decoder_cross_attention[0]
    # Where the first layer looks: offsets of boxes scale with their width and height.
    located = np.asarray(maps.locations)  # [B, N + M, heads, levels, points, 2]
    assert located.shape[1] == 11
    ratios = np.stack([np.asarray(given[1])[:, 0].mean(-1), np.asarray(given[1])[:, :, 0].mean(-1)])
    centres = best[..., :2] * ratios.T[:, None]
    finite = np.abs(best[..., :2] - 1).max(-1) > 1e-3  # tokens that may propose
    distance = np.abs(located[:, :, :, 0].mean((2, 3)) - centres).max(-1)
    print(distance[finite].max())
    assert distance[finite].max() < 0.15
    assert "auxiliary_queries" not in variables["params"]


@each_config
def test_inference_does_not_read_auxiliary_parameters(name):
    variables = variables_of(name)
    params = {k: v for k, v in variables["params"].items() if k != "auxiliary_queries"}
    a = model(name)({**variables, "params": params}, *batch())
    b = model(name)(variables, *batch())
    np.testing.assert_array_equal(a.logits, b.logits)


# --- padding ---


@each_config
def test_pixels_in_the_padding_are_not_seen(name):
    variables, run = variables_of(name), model(name)
    images, mask = batch()
    noise = np.random.default_rng(1).integers(0, 256, images.shape).astype(np.uint8)
    a = run(variables, images, mask)
    b = run(variables, np.where(mask[..., None], images, noise), mask)
    np.testing.assert_array_equal(a.logits, b.logits)
    np.testing.assert_array_equal(a.boxes, b.boxes)


def test_padded_tokens_are_sampled_as_zero():
    """Whatever stands where there is no image, the attention does not see it."""
    rng = np.random.default_rng(2)
    shapes = ((4, 6), (2, 3))
    layer = DeformableAttention(16, 2, 2, 2)
    memory = rng.normal(size=(1, 30, 16)).astype(np.float32)
    valid = np.ones((1, 30), bool)
    valid[:, 5:24:6] = valid[:, 26:30:3] = False
    query = rng.normal(size=(1, 3, 16)).astype(np.float32)
    reference = rng.uniform(size=(1, 3, 2, 2)).astype(np.float32)
    bound = functools.partial(layer.init, shapes=shapes)
    variables = tiny.random_like(
        jax.eval_shape(bound, jax.random.key(0), query, reference, memory, valid)
    )
    one, maps = layer.apply(variables, query, reference, memory, valid, shapes)
    other = np.where(valid[..., None], memory, 100 * rng.normal(size=memory.shape))
    two, _ = layer.apply(variables, query, reference, other.astype("f4"), valid, shapes)
    np.testing.assert_array_equal(one, two)
    three, _ = layer.apply(variables, query, reference, memory, np.ones_like(valid), shapes)
    assert np.abs(np.asarray(one) - three).max() > 1e-3
    assert maps.sizes.tolist() == [[6, 4], [3, 2]]


# --- low bits ---


@each_config
def test_both_arithmetics_agree_on_the_whole_model(name):
    options = {"zero_point": True, "renormalize": True, "center": True}
    variables, given = variables_of(name, "w4a4", **options), batch()
    fake = model(name, "w4a4", **options)(variables, *given)
    integer = model(name, "w4a4", arithmetic="integer", **options)(variables, *given)
    np.testing.assert_array_equal(fake.logits, integer.logits)
    np.testing.assert_array_equal(fake.boxes, integer.boxes)
    assert np.all(np.isfinite(fake.logits))
    assert np.min(np.std(np.asarray(fake.logits), axis=2).max((1, 2))) > 0.01


@each_config
def test_a_quantized_model_only_adds_step_sizes(name):
    plain, low = (flat(shapes_of(CONFIGS[name], p)) for p in (Policy(), stock_policy("w4a4")))
    assert {k: s for k, s in low.items() if k in plain} == plain
    more = {k.removeprefix("params/") for k in low if k not in plain}
    assert all(k.endswith("_step") for k in more)
    sites = {k.rsplit("/", 1)[1] for k in more if "/core/" in k and "cross" in k}
    assert sites == {"probs_step", "samples_step"}
    # Heads and coordinates stay float; the projections of offsets and weights do not.
    assert not [k for k in more if "head" in k or "reference_points" in k]
    assert "encoder/layer_0/self_attention/sampling_offsets/kernel_step" in more
    assert "encoder/layer_0/self_attention/attention_weights/input_step" in more


@each_config
def test_calibration_sees_the_float_model(name):
    observer = build_detector(CONFIGS[name], stock_policy("w4a4", arithmetic="observe"))
    variables, given = variables_of(name, "w4a4"), batch()
    out, seen = jax.jit(lambda v: observer.apply(v, *given, mutable=[OBSERVED]))(variables)
    want = model(name)(variables, *given)
    np.testing.assert_allclose(out.logits, want.logits, atol=1e-5)
    seen = traverse_util.flatten_dict(seen[OBSERVED], sep="/")
    assert seen["decoder/layer_1/cross_attention/core/samples"].shape[0] == PLAIN.heads
    assert seen["decoder/layer_1/cross_attention/core/probs"].min() >= 0


def test_recomputing_layers_changes_nothing():
    variables, given = variables_of("plain", "w4a4"), batch()
    module = build_detector(dataclasses.replace(PLAIN, remat=True), stock_policy("w4a4"))
    out = jax.jit(module.apply)(variables, *given)
    np.testing.assert_allclose(
        out.logits, model("plain", "w4a4")(variables, *given).logits, atol=1e-5
    )
