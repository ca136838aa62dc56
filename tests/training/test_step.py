from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util

from aqdetr_jax.checkpoint.model_folder import load_model, without_auxiliary
from aqdetr_jax.losses.distillation import DistillationWeights
from aqdetr_jax.models.detector import example_input
from aqdetr_jax.models.detr import Detr
from aqdetr_jax.parallel.mesh import make_mesh, put_batch, replicated
from aqdetr_jax.training import initial, setup
from aqdetr_jax.training import optimizer as optim
from aqdetr_jax.training.assemble import TRAINED_KEYS, jit_train_step
from aqdetr_jax.training.config import DistillConfig
from aqdetr_jax.training.state import TrainState
from aqdetr_jax.training.step import (
    detection_loss_fn,
    distillation_loss,
    make_train_step,
    targets_of,
)

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
        step = make_train_step(config, loss_fn, optimizer)
        self.compiled = jit_train_step(step, placed, self.mesh)

    def run(self, state, *batches):
        """Host state and metrics after some steps."""
        with jax.set_mesh(self.mesh):
            state = jax.device_put(state, replicated(self.mesh))
            for batch in batches:
                placed = put_batch({k: batch[k] for k in TRAINED_KEYS}, self.mesh)
                state, metrics = self.compiled(state, self.teacher_variables, placed)
        return jax.device_get(state), jax.device_get(metrics)


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


def detection_part(metrics) -> float:
    """``L_det + λ_aux L_aux`` from its terms."""
    total = 0.0
    for prefix in ("", "auxiliary_queries/"):  # lambda_aux = 1
        for layer in ("", "aux_layers/"):
            name = prefix + layer
            total += (
                metrics[f"{name}loss_ce"]
                + 5 * metrics[f"{name}loss_bbox"]
                + 2 * metrics[f"{name}loss_giou"]
            )
    return total


@pytest.mark.accelerator
def test_loss_is_the_weighted_sum_of_its_terms(setting, after_one):
    _, metrics = after_one
    total = detection_part(metrics) + metrics["loss_distill_encoder"]
    total += 0.5 * (metrics["loss_distill_decoder_self"] + metrics["loss_distill_decoder_cross"])
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    # The student's first attention differs from its teacher's by quantization and dropout.
    assert metrics["loss_distill_encoder"] > 0
    assert metrics["num_boxes"] == setting.batches[0]["valid"].sum()


@pytest.mark.accelerator
def test_a_step_is_a_function_of_state_and_batch(setting, after_one):
    again, metrics = setting.run(setting.state, setting.batches[0])
    assert tiny.digest(again) == tiny.digest(after_one[0])
    assert tiny.digest(metrics) == tiny.digest(after_one[1])


def test_dropout_differs_from_step_to_step(setting, after_one):
    later = setting.state.replace(step=np.int32(7))
    _, metrics = setting.run(later, setting.batches[0])
    assert metrics["loss"] != after_one[1]["loss"]
    assert metrics["num_boxes"] == after_one[1]["num_boxes"]


@pytest.mark.accelerator
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


@pytest.mark.accelerator
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


# --- distillation ---------------------------------------------------------------------------------

WEIGHTS = DistillationWeights(encoder=0.7, decoder_self=0.3, decoder_cross=1.9)
DISTILLED = (
    "loss_distill_encoder",
    "loss_distill_decoder_self",
    "loss_distill_decoder_cross",
)


class Pair:
    """A float student of a float teacher, the wiring of the loss between them, and a batch."""

    def __init__(self, folder):
        config = tiny.resolved(tiny.student(folder))
        self.config = config = dataclasses.replace(
            config,
            quant=tiny.FLOAT.quant,
            model=dataclasses.replace(config.model, encoder_layers=2, dropout=0.0),
            distill=DistillConfig(weights=WEIGHTS),
        )
        module = setup.build_module(config)
        # A teacher that dropped anything would differ from its student.
        teacher = Detr(
            dataclasses.replace(config.model, num_auxiliary=0, auxiliary_groups=1, dropout=0.5)
        )
        (batch,) = tiny.batches(config, 1)
        self.batch = {k: batch[k] for k in TRAINED_KEYS}
        first = jax.jit(module.init)(jax.random.key(0), *example_input((64, 64)))
        rng = np.random.default_rng(0)

        def noisy(x):
            return np.float32(x + 0.1 * rng.normal(size=x.shape))

        # Biases too: before them, the first decoder layer mixes values that are all zero.
        self.params = jax.tree.map(noisy, first["params"])
        self.perturbed = jax.tree.map(noisy, self.params)
        self.teacher = {**first, "params": without_auxiliary(self.params)}
        self.loss_fn = jax.jit(detection_loss_fn(config, module, teacher))
        self.forward = jax.jit(lambda v, *batch: module.apply(v, *batch, auxiliary=True))

    def terms(self, params):
        """The loss and its terms for the student's parameters."""
        stats = self.teacher["batch_stats"]
        _, (terms, _) = self.loss_fn(params, stats, self.teacher, self.batch, np.int32(0))
        return jax.device_get(terms)

    def output(self, params):
        """The float model's output; auxiliary queries do not touch the object queries."""
        variables = {**self.teacher, "params": params}
        return jax.device_get(self.forward(variables, self.batch["images"], self.batch["mask"]))


@pytest.fixture(scope="module")
def pair(tiny_teacher, quick_compile):
    return Pair(tiny_teacher)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def restated(kind, teacher, student, counted):
    """The "kl" or "output" term of one layer over the queries that count [B, Q], in float64."""
    if kind == "output":
        t, s = (m.output[counted].astype(float) for m in (teacher, student))
        return np.mean((t - s) ** 2) / np.mean(t**2)
    # [B, H, Q, K] -> [queries, H, K]; a padded key has no probability in either.
    t, s = (log_softmax(m.scores.swapaxes(1, 2)[counted].astype(float)) for m in (teacher, student))
    return np.mean(np.sum(np.exp(t) * (t - s), -1))


def restated_terms(kind, teacher, student, num_queries):
    """The three terms from two outputs of the whole model."""
    valid = student.memory_valid
    everything = np.ones((len(valid), num_queries), bool)
    queries = student.decoder_cross_attention[0].output.shape[1]
    objects = np.broadcast_to(np.arange(queries) < num_queries, (len(valid), queries))
    counted = {"encoder": valid, "decoder_self": everything, "decoder_cross": objects}
    attention = ("encoder_attention", "decoder_self_attention", "decoder_cross_attention")
    terms = {}
    for (name, which), maps in zip(counted.items(), attention, strict=True):
        layers = zip(getattr(teacher, maps), getattr(student, maps), strict=True)
        each = [restated(kind, t, s, which) for t, s in layers]
        assert len(each) == 2
        terms[f"loss_distill_{name}"] = np.mean(each)
    return terms


def test_a_student_that_is_its_teacher_has_nothing_to_distil(pair):
    terms = pair.terms(pair.params)
    for name in DISTILLED:
        assert abs(terms[name]) < 1e-6, name
    assert terms["loss"] == pytest.approx(detection_part(terms), rel=1e-5)


def test_distilled_terms_and_their_weights_against_numpy(pair):
    terms, n = pair.terms(pair.perturbed), pair.config.model.num_queries
    teacher, student = pair.output(pair.params), pair.output(pair.perturbed)
    padded = ~student.memory_valid
    assert padded.any()
    assert not padded.all(1).any()
    wanted = restated_terms("kl", teacher, student, n)
    assert min(wanted.values()) > 1e-2
    for name in DISTILLED:
        assert terms[name] == pytest.approx(wanted[name], rel=1e-4), name
    encoder, decoder_self, decoder_cross = (wanted[name] for name in DISTILLED)
    total = 0.7 * encoder + 0.3 * decoder_self + 1.9 * decoder_cross
    assert terms["loss"] - detection_part(terms) == pytest.approx(total, rel=1e-2)

    # Another kind, which looks at the mixed values, by the same way.
    other = dataclasses.replace(WEIGHTS, kind="output")
    found, terms = distillation_loss(other, teacher, student, n, targets_of(pair.batch))
    wanted = restated_terms("output", teacher, student, n)
    for name in DISTILLED:
        assert float(terms[name]) == pytest.approx(wanted[name], rel=1e-4), name
    encoder, decoder_self, decoder_cross = (wanted[name] for name in DISTILLED)
    total = 0.7 * encoder + 0.3 * decoder_self + 1.9 * decoder_cross
    assert float(found) == pytest.approx(total, rel=1e-4)


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
    named = {name for name, value in metrics.items() if not np.isfinite(value).all()}
    assert {"loss", "loss_bbox", "aux_layers/loss_bbox", "gradient_norm"} <= named
    assert not named & {"loss_ce", "loss_distill_encoder", "num_boxes"}
    culprit = np.flatnonzero(np.isnan(bad["boxes"]).any((1, 2)))
    assert np.flatnonzero(metrics["replaced_costs"]).tolist() == culprit.tolist()

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
    named = {name for name, value in metrics.items() if not np.isfinite(value).all()}
    assert {"loss", "loss_ce"} <= named
    assert "loss_distill_encoder" not in named


def test_computing_again_saves_memory_on_a_cpu_too():
    """The insides of one layer are there at a time, not of all (as in XLA's own order of 0.10)."""
    mesh = make_mesh(data=1)
    whole = replicated(mesh)

    @jax.checkpoint
    def layer(x, w):
        return jnp.tanh(jnp.tanh(x[:, None] * w) @ jnp.sin(w.T))[:, 0]

    def step(state, teacher, batch):
        def loss(ws):
            x = batch["x"]
            for w in ws:
                x = layer(x, w)
            return jnp.sum(x * teacher)

        gradient = jax.grad(loss)(state)
        return jax.tree.map(jnp.subtract, state, gradient), gradient

    def array(*shape, sharding=whole):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    state = [array(1, 64) for _ in range(8)]
    needed = []
    for jitted in (jax.jit(step, donate_argnums=0), jit_train_step(step, state, mesh)):
        compiled = jitted.lower(state, array(), {"x": array(4096, 1)}).compile()
        needed.append(compiled.memory_analysis().temp_size_in_bytes)
    inside = 4096 * 64 * 4  # bytes of one of the arrays inside a layer, of which there are three
    assert needed[1] < 5 * inside, needed
    assert needed[1] < needed[0], needed
