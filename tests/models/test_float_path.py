"""The float path of an attention: its own weights and input, unquantized."""

import functools

import jax
import numpy as np
import pytest
import tiny
from test_transformer_layers import DIM, HEADS, VALID, arrays, randomized
from tiny_models import CONFIGS, batch

from aqdetr_jax.losses.distillation import layer_by_layer_loss
from aqdetr_jax.models.attention import MultiHeadAttention
from aqdetr_jax.models.detector import build_detector
from aqdetr_jax.quant.policy import Policy, Rule, stock_policy
from aqdetr_jax.quant.record import FLOAT_PATH, recording
from aqdetr_jax.training.step import float_targets

pytestmark = pytest.mark.usefixtures("quick_compile")

FIELDS = ("scores", "probabilities", "output")


def test_it_is_the_same_attention_without_grids():
    query, key, value = arrays((2, 5, DIM), (2, 6, DIM), (2, 6, DIM))
    policy = stock_policy("w3a3", grid="centred", align_queries=True)
    low, plain = (
        MultiHeadAttention(DIM, HEADS, policy, dropout=rate, co_attention=True)
        for policy, rate in ((policy, 0.5), (Policy(), 0.0))
    )
    variables = randomized(low.init, query, key, value, VALID)
    _, maps = low.apply(variables, query, key, value, VALID, float_path=True)
    _, wanted = plain.apply(variables, query, key, value, VALID)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(maps.float_path, name), getattr(wanted, name))
        assert np.any(getattr(maps, name) != getattr(wanted, name))
    few = maps.of_first(3)
    assert few.float_path.scores.shape == few.scores.shape == (2, HEADS, 3, 6)
    assert low.apply(variables, query, key, value, VALID)[1].float_path is None


def test_it_sees_the_first_query_set_alone():
    x = arrays((2, 7, DIM))[0]
    module = MultiHeadAttention(DIM, HEADS, stock_policy("w4a4"))
    variables = randomized(module.init, x, x, x)
    options = {"float_path": True}
    _, maps = module.apply(variables, x, x, x, query_sets=(3, 2, 2), **options)
    _, alone = module.apply(variables, x[:, :3], x[:, :3], x[:, :3], **options)
    for name in FIELDS:
        got, wanted = getattr(maps.float_path, name), getattr(alone.float_path, name)
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


ENCODER = Policy("encoder", (Rule(r"encoder/layer_0/self_attention/", 2, 2, 2),))
"""Nothing but this attention is quantized, so that its input is the float model's."""


@functools.cache
def encoder_run(name):
    """(module, variables, jitted forward with float paths) of a model of that policy."""
    module = build_detector(CONFIGS[name], ENCODER)
    variables = tiny.random_variables(module, *batch())
    run = jax.jit(lambda v, *x: module.apply(v, *x, auxiliary=True, float_path=True))
    return module, variables, run


@pytest.mark.parametrize("name", ["detr", "plain"])
def test_the_target_of_an_encoder_layer_is_its_own(name):
    _, variables, run = encoder_run(name)
    output = run(variables, *batch())
    plain = build_detector(CONFIGS[name])
    wanted = jax.jit(lambda v, *x: plain.apply(v, *x).encoder_attention[0])(variables, *batch())
    (target,) = float_targets(output).encoder_attention
    for field in (*FIELDS, *(("locations",) if name == "plain" else ())):
        np.testing.assert_allclose(
            getattr(target, field), getattr(wanted, field), rtol=1e-4, atol=1e-5, err_msg=field
        )
    own = output.encoder_attention
    assert layer_by_layer_loss("kl", [target], own, output.memory_valid, 0.1) > 1e-4
    # Attentions that are not quantized are their own float path.
    for mine, theirs in (
        (output.decoder_self_attention, float_targets(output).decoder_self_attention),
        (output.decoder_cross_attention, float_targets(output).decoder_cross_attention),
    ):
        count = CONFIGS[name].num_queries
        mine = [maps.of_first(count) for maps in mine]
        theirs = [maps.of_first(count) for maps in theirs]
        assert abs(layer_by_layer_loss("kl", theirs, mine, None, 0.1)) < 1e-5


def test_targets_take_no_gradient_and_the_student_does():
    query, key, value = arrays((2, 5, DIM), (2, 6, DIM), (2, 6, DIM))
    module = MultiHeadAttention(DIM, HEADS, stock_policy("w2a2"))
    variables = randomized(module.init, query, key, value)

    def loss(variables, of):
        _, maps = module.apply(variables, query, key, value, float_path=True)
        return of(maps)

    slopes = jax.grad(loss)(variables, lambda maps: maps.float_path.scores.sum())
    assert not any(np.any(slope) for slope in jax.tree.leaves(slopes))
    slopes = jax.grad(loss)(
        variables, lambda maps: layer_by_layer_loss("kl", [maps.float_path], [maps])
    )["params"]
    assert np.any(slopes["q_proj"]["kernel"])
    assert np.any(slopes["core"]["k_step"])


def test_its_operations_are_recorded_apart():
    module, variables, _ = encoder_run("detr")
    with recording() as rows:
        jax.eval_shape(lambda v, *x: module.apply(v, *x, float_path=True), variables, *batch())
    apart = [row for row in rows if row.path.startswith(FLOAT_PATH)]
    with recording() as others:
        jax.eval_shape(lambda v, *x: module.apply(v, *x), variables, *batch())
    assert [row for row in rows if row not in apart] == others
    prefix = f"{FLOAT_PATH}/encoder/layer_0/self_attention"
    found = {row.path: row for row in apart if row.path.startswith(prefix)}
    names = {f"{prefix}/{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj", "core")}
    assert found.keys() == names
    assert all(row.weight is row.activation is None for row in apart)
