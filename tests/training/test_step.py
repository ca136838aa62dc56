from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny
from flax import traverse_util

from aqdetr_jax.training import initial, setup
from aqdetr_jax.training import optimizer as optim
from aqdetr_jax.training.loop import TRAINED_KEYS
from aqdetr_jax.training.model_io import load_model
from aqdetr_jax.training.sharding import make_mesh, put_batch, replicated
from aqdetr_jax.training.state import TrainState
from aqdetr_jax.training.step import detection_loss_fn, jit_train_step, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compile")


class Setting:
    """A student's compiled step, and its first state on the host."""

    def __init__(self, folder):
        self.config = config = tiny.resolved(tiny.student(folder))
        self.module = setup.build_module(config)
        self.teacher = setup.load_teacher(config)
        self.batches = tiny.batches(config, 4)
        first, _ = initial.initial_variables(
            config, self.module, load_model(folder), self.batches[:1]
        )
        params = first["params"]
        self.mesh = make_mesh()
        optimizer = optim.make_optimizer(
            params, config.optimizer, config.train.steps, frozen_norms=True
        )
        self.groups = optim.parameter_groups(params, config.optimizer, frozen_norms=True)
        state = TrainState.create(params, first["batch_stats"], optimizer, ema=True)
        self.state = jax.device_get(state)
        whole = replicated(self.mesh)
        self.teacher_variables = jax.device_put(self.teacher.variables, whole)
        loss_fn = detection_loss_fn(config, self.module, self.teacher.module())
        placed = jax.eval_shape(lambda s: s, state)
        placed = jax.tree.map(lambda x: x.update(sharding=whole), placed)
        step = make_train_step(config, loss_fn, optimizer, self.groups)
        self.compiled = jit_train_step(step, placed, self.mesh)

    def run(self, state, *batches):
        """Host state and metrics after some steps."""
        with jax.set_mesh(self.mesh):
            state = jax.device_put(state, replicated(self.mesh))
            for batch in batches:
                placed = put_batch({k: batch[k] for k in TRAINED_KEYS}, self.mesh)
                state, metrics = self.compiled(state, self.teacher_variables, placed)
        return jax.device_get(state), {k: float(v) for k, v in metrics.items()}


@pytest.fixture(scope="module")
def setting(tiny_teacher, quick_compile):
    return Setting(tiny_teacher)


@pytest.fixture(scope="module")
def after_one(setting):
    return setting.run(setting.state, setting.batches[0])


def parts(state) -> dict[str, str]:
    """Checksums of what a skipped step must not touch."""
    names = ("params", "batch_stats", "opt_state", "ema")
    return {name: tiny.digest(getattr(state, name)) for name in names}


# --- what a step does ----------------------------------------------------------------------------


def test_loss_is_the_weighted_sum_of_its_terms(setting, after_one):
    _, metrics = after_one
    total = 0.0
    for prefix in ("", "auxiliary_queries/"):  # lambda_aux = 1
        for layer in ("", "aux_layers/"):
            name = prefix + layer
            total += (
                metrics[f"{name}loss_ce"]
                + 5 * metrics[f"{name}loss_bbox"]
                + 2 * metrics[f"{name}loss_giou"]
            )
    total += metrics["loss_distill_encoder"]
    total += 0.5 * (metrics["loss_distill_decoder_self"] + metrics["loss_distill_decoder_cross"])
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    # The student's first attention differs from its teacher's by quantization and dropout.
    assert metrics["loss_distill_encoder"] > 0
    assert metrics["num_boxes"] == setting.batches[0]["valid"].sum()


def test_a_step_is_a_function_of_state_and_batch(setting, after_one):
    again, metrics = setting.run(setting.state, setting.batches[0])
    assert tiny.digest(again) == tiny.digest(after_one[0])
    assert metrics == after_one[1]


def test_dropout_differs_from_step_to_step(setting, after_one):
    later = setting.state.replace(step=np.int32(7))
    _, metrics = setting.run(later, setting.batches[0])
    assert metrics["loss"] != after_one[1]["loss"]
    assert metrics["num_boxes"] == after_one[1]["num_boxes"]


def test_everything_trained_moves_and_frozen_parameters_do_not(setting, after_one):
    before = traverse_util.flatten_dict(setting.state.params, sep="/")
    after = traverse_util.flatten_dict(after_one[0].params, sep="/")
    groups = traverse_util.flatten_dict(setting.groups, sep="/")
    for path, group in groups.items():
        changed = (before[path] != after[path]).any()
        if group == "frozen":
            assert not changed, path
        elif group == "steps":
            assert (after[path] > 0).all(), path
            # One Adam update changes a step by at most lr_steps of itself.
            ratio = after[path] / before[path] - 1
            assert np.abs(ratio).max() < 1.01 * setting.config.optimizer.lr_steps, path
    moved = [p for p, g in groups.items() if g != "frozen" and (before[p] != after[p]).any()]
    trained = [p for p, g in groups.items() if g != "frozen"]
    assert len(moved) > 0.95 * len(trained), sorted(set(trained) - set(moved))


def test_moving_average_starts_close_to_the_parameters(setting, after_one):
    """``d = min(0.9, (1 + t) / (10 + t))``: 0.1 after the first step."""
    state = after_one[0]

    def check(average, old, new):
        np.testing.assert_allclose(average, 0.1 * old + 0.9 * new, rtol=1e-5, atol=1e-7)

    jax.tree.map(check, state.ema["params"], setting.state.ema["params"], state.params)
    # Frozen statistics are what they were, bit for bit.
    assert tiny.digest(state.ema["batch_stats"]) == tiny.digest(setting.state.batch_stats)


# --- the teacher ---------------------------------------------------------------------------------


def test_teacher_is_bit_equal_after_training(setting):
    before = tiny.digest(setting.teacher_variables)
    assert before == tiny.digest(setting.teacher.variables)
    state, metrics = setting.run(setting.state, *setting.batches)
    assert int(state.step) == len(setting.batches)
    assert np.isfinite(metrics["loss"])
    assert tiny.digest(setting.teacher_variables) == before
    assert tiny.digest(state.params) != tiny.digest(setting.state.params)


def test_teacher_gets_no_gradient(setting):
    config = setting.config
    loss_fn = detection_loss_fn(config, setting.module, setting.teacher.module())
    batch = {k: setting.batches[0][k] for k in TRAINED_KEYS}

    def of_teacher(variables):
        state = setting.state
        return loss_fn(state.params, state.batch_stats, variables, batch, state.step)[0]

    gradient = jax.jit(jax.grad(of_teacher))(setting.teacher.variables)
    for path, leaf in traverse_util.flatten_dict(gradient, sep="/").items():
        assert not np.asarray(leaf).any(), path


# --- non-finite losses ---------------------------------------------------------------------------


def with_nan_box(batch):
    boxes = batch["boxes"].copy()
    row = int(np.flatnonzero(batch["valid"].any(1))[0])
    boxes[row, int(np.flatnonzero(batch["valid"][row])[0])] = np.nan
    return {**batch, "boxes": boxes}


def test_nan_in_a_box_changes_nothing_and_is_counted_and_named(setting, after_one):
    start = after_one[0]
    bad = with_nan_box(setting.batches[1])
    state, metrics = setting.run(start, bad)
    assert parts(state) == parts(start)
    assert int(state.step) == int(start.step) + 1
    assert int(state.bad_in_a_row) == metrics["bad_in_a_row"] == 1
    named = {name for name, value in metrics.items() if not np.isfinite(value)}
    assert {"loss", "loss_bbox", "aux_layers/loss_bbox", "gradient_norm"} <= named
    assert not named & {"loss_ce", "loss_distill_encoder", "num_boxes"}
    assert metrics["replaced_costs"] > 0

    state, metrics = setting.run(state, bad)
    assert parts(state) == parts(start)
    assert metrics["bad_in_a_row"] == 2

    state, metrics = setting.run(state, setting.batches[1])
    assert metrics["bad_in_a_row"] == 0
    assert np.isfinite(metrics["loss"])
    assert all(parts(state)[name] != parts(start)[name] for name in ("params", "opt_state", "ema"))


def test_nan_parameter_is_kept_as_it_is(setting):
    params = jax.tree.map(np.copy, setting.state.params)
    params["class_head"]["bias"][0] = np.nan
    start = setting.state.replace(params=params)
    state, metrics = setting.run(start, setting.batches[0])
    assert parts(state) == parts(start)
    assert metrics["bad_in_a_row"] == 1
    named = {name for name, value in metrics.items() if not np.isfinite(value)}
    assert {"loss", "loss_ce"} <= named
    assert "loss_distill_encoder" not in named
