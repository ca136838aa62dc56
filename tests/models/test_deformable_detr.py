"""Deformable DETR beyond parity: auxiliary queries, padding, low bits."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import tiny
from flax import traverse_util
from tiny_models import DEFORMABLE, PLAIN, batch, flat, model, shapes_of, variables_of

from aqdetr_jax.losses.distillation import DistillationWeights
from aqdetr_jax.models.deformable_attention import DeformableAttention
from aqdetr_jax.models.detector import build_detector
from aqdetr_jax.models.quantized import OBSERVED
from aqdetr_jax.quant.policy import Policy, stock_policy
from aqdetr_jax.training.step import distillation_loss

each_config = pytest.mark.parametrize("name", DEFORMABLE)
pytestmark = pytest.mark.usefixtures("quick_compile")


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
    given = batch()
    # Offsets that no query moves: where the first layer looks says what its boxes are.
    variables = jax.tree.map(np.copy, variables_of("two_stage"))
    offsets = variables["params"]["decoder"]["layer_0"]["cross_attention"]["sampling_offsets"]
    offsets["kernel"][:] = 0
    output = model("two_stage", auxiliary=True)(variables, *given)
    order = np.argsort(-np.asarray(output.proposal_logits)[0, :, :, 0], axis=1, kind="stable")
    best = np.take_along_axis(
        np.asarray(output.proposal_boxes)[0], order[:, :11, None], axis=1
    )  # [B, N + M, 4]
    ratios = np.stack([given[1][:, 0].mean(-1), given[1][:, :, 0].mean(-1)], -1)[
        :, None, None, None
    ]
    bias = offsets["bias"].reshape(2, 3, 2, 2)[:, 0]  # [heads, points, 2] of the first level
    centre, size = best[:, :, None, None, :2], best[:, :, None, None, 2:]
    found = np.asarray(output.decoder_cross_attention[0].locations)[:, :, :, 0]
    np.testing.assert_allclose(found, (centre + bias / 2 * size / 2) * ratios, atol=1e-5)
    # The queries differ, or their order would say nothing.
    assert np.abs(np.diff(best[..., :2], axis=1)).max(-1).min() > 0.01
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


def test_padded_positions_are_not_distilled():
    """Whatever a student attends to from the padding of one image costs nothing."""
    variables, given = variables_of("plain", "w4a4"), batch()
    teacher = model("plain")(variables, *given)
    student = model("plain", "w4a4")(variables, *given)
    weights = DistillationWeights(encoder=1.0)

    def loss(where):
        rng = np.random.default_rng(3)
        (maps,) = student.encoder_attention
        heads, places = where[:, None, :, None], where[:, :, None, None, None, None]
        changed = maps._replace(
            scores=np.where(heads, rng.normal(size=maps.scores.shape), maps.scores),
            locations=np.where(places, rng.normal(size=maps.locations.shape), maps.locations),
        )
        output = student._replace(encoder_attention=(changed,))
        return float(distillation_loss(weights, teacher, output, 5, None)[0])

    valid = np.asarray(teacher.memory_valid)
    assert 0 < valid.sum() < valid.size
    before = loss(np.zeros_like(valid))
    assert before > 1e-3
    assert loss(~valid) == before
    assert abs(loss(valid) - before) > 0.1


# --- low bits ---


@each_config
def test_a_quantized_model_only_adds_step_sizes(name):
    plain, low = (flat(shapes_of(DEFORMABLE[name], p)) for p in (Policy(), stock_policy("w4a4")))
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
    observer = build_detector(DEFORMABLE[name], stock_policy("w4a4", arithmetic="observe"))
    variables, given = variables_of(name, "w4a4"), batch()
    out, seen = jax.jit(lambda v: observer.apply(v, *given, mutable=[OBSERVED]))(variables)
    want = model(name)(variables, *given)
    np.testing.assert_allclose(out.logits, want.logits, atol=1e-5)
    seen = traverse_util.flatten_dict(seen[OBSERVED], sep="/")
    assert seen["decoder/layer_1/cross_attention/core/samples"].shape[0] == PLAIN.heads
    assert seen["decoder/layer_1/cross_attention/core/probs"].min() >= 0
