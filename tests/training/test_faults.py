"""Steps that must not be taken: skipped, counted, named; what is wrong with quantizers by name."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from aqdetr_jax.training import optimizer as optim
from aqdetr_jax.training.config import OptimizerConfig
from aqdetr_jax.training.faults import Recent, bad_parameters, culprits, in_words
from aqdetr_jax.training.state import TrainState
from aqdetr_jax.training.step import is_loss, make_train_step

PARAMS = {
    "encoder": {"kernel": np.ones((2, 3), np.float32), "bias": np.zeros(3, np.float32)},
    "decoder": {"kernel": np.ones((3, 2), np.float32), "kernel_step": np.full(2, 0.5, np.float32)},
    "backbone": {"scale": np.ones(4, np.float32), "input_step": np.float32(0.25)},
}


@jax.custom_vjp
def nothing(parameter, gradient):
    """0, with a gradient of our choice."""
    return jnp.float32(0)


nothing.defvjp(lambda p, g: (jnp.float32(0), g), lambda g, _: (g, jnp.zeros_like(g)))


@pytest.fixture(scope="module")
def step():
    """The step of a loss whose gradients are in the batch, and its first state."""
    optimizer = optim.make_optimizer(PARAMS, OptimizerConfig(), 10, frozen_norms=False)

    def loss_fn(params, stats, teacher, batch, number, part=None):
        zeros = jax.tree.leaves(jax.tree.map(nothing, params, batch["gradients"]))
        terms = {"loss": batch["loss"] + sum(zeros), **batch["terms"]}
        return terms["loss"], (terms, stats)

    config = dataclasses.replace(tiny.FLOAT, optimizer=OptimizerConfig(ema=0.9))
    function = jax.jit(make_train_step(config, loss_fn, optimizer))
    state = TrainState.create(PARAMS, {"mean": np.zeros(2, np.float32)}, optimizer, ema=True)
    return function, jax.device_get(state), optimizer.packing.names


def batch(path=None, value=0.0, loss=1.0, **terms):
    gradients = jax.tree.map(np.ones_like, PARAMS)
    if path:
        node = gradients[path[0]]
        node[path[1]] = np.full_like(node[path[1]], value)
    found = {"loss_ce": 1.0, "aux_layers/loss_bbox": 1.0, "class_error": 1.0, **terms}
    plain = {name: np.float32(term) for name, term in found.items()}
    return {"gradients": gradients, "loss": np.float32(loss), "terms": plain}


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("faulty", "named"),
    [
        (batch(loss=NAN), ["loss"]),
        (batch(loss=INF), ["loss"]),
        # A term that is no part of the sum (or of weight 0).
        (batch(loss_ce=NAN), ["loss_ce"]),
        (batch(**{"aux_layers/loss_bbox": -INF}), ["aux_layers/loss_bbox"]),
        (batch(("encoder", "kernel"), NAN), ["gradient of encoder/kernel"]),
        (batch(("decoder", "kernel"), INF), ["gradient of decoder/kernel"]),
        (batch(("decoder", "kernel_step"), NAN), ["gradient of a step size"]),
        (batch(("backbone", "scale"), INF), ["gradient of a bias or norm of the backbone"]),
        # Its square is infinite, and the whole update would be divided by it.
        (batch(("encoder", "kernel"), 1e30), ["gradient of encoder/kernel"]),
    ],
)
def test_a_fault_changes_nothing_and_is_counted_and_named(step, faulty, named):
    function, state, parts = step
    after, metrics = jax.device_get(function(state, {}, faulty))
    assert culprits(metrics, parts) == named
    for name in ("params", "batch_stats", "opt_state", "ema"):
        assert tiny.digest(getattr(after, name)) == tiny.digest(getattr(state, name)), name
    assert (int(after.step), int(after.skipped), int(after.bad_in_a_row)) == (1, 1, 1)
    again, _ = jax.device_get(function(after, {}, faulty))
    assert (int(again.skipped), int(again.bad_in_a_row)) == (2, 2)
    good, metrics = jax.device_get(function(again, {}, batch()))
    assert (int(good.skipped), int(good.bad_in_a_row)) == (2, 0)
    assert culprits(metrics, parts) == []
    assert tiny.digest(good.params) != tiny.digest(state.params)


def test_what_is_no_loss_may_be_anything(step):
    function, state, parts = step
    after, metrics = jax.device_get(function(state, {}, batch(class_error=NAN)))
    assert int(after.skipped) == 0
    assert culprits(metrics, parts) == []
    assert [name for name in ("loss", "aux_layers/loss_ce", "class_error") if is_loss(name)] == [
        "loss",
        "aux_layers/loss_ce",
    ]


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_step_size_that_is_no_number_is_named(step, value):
    function, state, parts = step
    params = jax.tree.map(np.copy, state.params)
    params["decoder"]["kernel_step"][1] = value
    after, metrics = jax.device_get(function(state.replace(params=params), {}, batch()))
    assert int(after.skipped) == 1
    assert int(metrics["bad_step_sizes"]) >= 1
    assert culprits(metrics, parts)
    assert bad_parameters(after.params) == ["decoder/kernel_step"]


def test_a_step_size_below_zero_is_bad_and_a_weight_is_not():
    params = {"a": {"kernel": -np.ones(2), "kernel_step": np.float32([0.1, -0.1])}}
    assert bad_parameters(params) == ["a/kernel_step"]
    params["a"]["kernel_step"][1] = 0.0
    assert bad_parameters(params) == ["a/kernel_step"]
    params["a"]["kernel_step"][1] = 0.1
    assert bad_parameters(params) == []


ANY = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(ANY, ANY, ANY), min_size=1, max_size=6))
def test_step_sizes_stay_positive_and_finite_whatever_the_gradients_are(step, gradients):
    function, state, _ = step
    for first, second, third in gradients:
        given_batch = batch()
        given_batch["gradients"]["decoder"]["kernel_step"] = np.float32([first, second])
        given_batch["gradients"]["backbone"]["input_step"] = np.float32(third)
        state, _ = function(state, {}, given_batch)
        for tree in (state.params, state.ema["params"]):
            assert bad_parameters(tree) == []


def test_recent_steps_are_fetched_in_order_and_once(step):
    function, state, parts = step
    recent, index = Recent(), np.arange(2)
    for done in range(1, 101):
        faulty = batch(loss=NAN) if done in (40, 97) else batch()
        recent.add(done, function(state, {}, faulty)[1], index)
    taken = recent.take(100)
    assert [done for done, _, _ in taken] == list(range(37, 100))
    assert [done for done, metrics, _ in taken if culprits(metrics, parts)] == [40, 97]
    assert recent.take(101) == []


def test_long_lists_are_cut():
    assert in_words(["a", "b"]) == "a, b"
    assert in_words([str(i) for i in range(11)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"
