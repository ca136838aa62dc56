"""Phases: what they keep still and what they leave float, and that a border can be stopped at."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util

from aqdetr_jax.checkpoint.steps import Checkpoints
from aqdetr_jax.config_types import ConfigError, from_dataclass, to_dataclass
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.models.detector import build_detector, record_ops
from aqdetr_jax.training import beginning, loop, setup
from aqdetr_jax.training import optimizer as optim
from aqdetr_jax.training.config import (
    DistillConfig,
    ExperimentConfig,
    MeshConfig,
    OptimizerConfig,
    PhaseConfig,
)
from aqdetr_jax.training.experiment import load_experiment
from aqdetr_jax.training.phases import Phase, check_phases, phase_of, restarted, run_phases
from aqdetr_jax.training.programs import StepPrograms
from aqdetr_jax.training.state import TrainState
from aqdetr_jax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compile")

BACKBONE_FIRST = PhaseConfig(end=0.5, quantized=("^backbone/",), trained=("^backbone/",))
STEPS_LAST = PhaseConfig(begin=0.5, trained=(r"_(step|offset)$", r"(^|/)bias$"), from_average=True)


def with_phases(config: ExperimentConfig, *phases: PhaseConfig) -> ExperimentConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, phases=phases))


# --- which steps -----------------------------------------------------------------------------


def test_phases_make_up_the_run():
    last = dataclasses.replace(STEPS_LAST, begin=0.67)
    config = with_phases(tiny.FLOAT, PhaseConfig(0.25, 0.5, trained=("a",)), last)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=12))
    phases = run_phases(config)
    assert [(p.first, p.stop) for p in phases] == [(0, 3), (3, 6), (6, 8), (8, 12)]
    assert [p.rules is None for p in phases] == [True, False, True, False]
    assert [phases.index(phase_of(phases, done)) for done in range(12)] == [
        *(0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3)
    ]
    assert run_phases(tiny.FLOAT) == (Phase(0, 6),)
    with pytest.raises(ValueError, match=r"phases\[0\] from 0 to 0.01 .* none of its 6 steps"):
        run_phases(with_phases(tiny.FLOAT, PhaseConfig(0, 0.01, trained=("a",))))


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ("{'begin': 0.5, 'end': 0.5, 'trained': ('a',)}", "0 <= begin < end <= 1"),
        ("{'end': 1.5, 'trained': ('a',)}", "0 <= begin < end <= 1"),
        ("{'begin': 0.5}", "without quantized, trained, from_average or rate is the run as it is"),
        ("{'begin': 0.5, 'rate': 0.0}", "rate must be positive, got 0.0"),
        ("{'from_average': True}", "from_average needs begin > 0"),
        ("{'quantised': ('a',)}", "has no key 'quantised'; did you mean 'quantized'"),
        ("{'trained': ('(',)}", "not a regular expression"),
        (
            "{'end': 0.5, 'trained': ('a',)}, {'begin': 0.4, 'trained': ('b',)}",
            "one ends at 0.5, the next begins at 0.4",
        ),
    ],
)
def test_phases_that_say_nothing_or_contradict_are_refused(phases, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_experiment("shapes_w4a4", (f"train.phases=({phases},)",))


def test_phases_need_what_they_name():
    quantized = "train.phases=({'end': 0.5, 'quantized': ('^backbone/',)},)"
    average = "train.phases=({'begin': 0.5, 'from_average': True},)"
    found = load_experiment("shapes_w4a4", (quantized,)).train.phases
    assert found == (PhaseConfig(end=0.5, quantized=("^backbone/",)),)
    with pytest.raises(ConfigError, match=r"has 'quantized', and quant\.policy is 'float'"):
        load_experiment("shapes_w4a4", (quantized, "quant.policy=float"))
    with pytest.raises(ConfigError, match=r"has 'from_average', and optimizer\.ema is 0"):
        load_experiment("shapes_w4a4", (average, "optimizer.ema=0"))
    with pytest.raises(ConfigError, match=r"train\.phases has no effect: a dense pretraining"):
        load_experiment("shapes_w4a4", (average,), pretrain=True)
    pretraining = from_dataclass(dataclasses.replace(tiny.FLOAT, task="pretrain"))
    pretraining["train"]["phases"] = [{"trained": ["a"]}]
    with pytest.raises(ConfigError, match="task is 'pretrain'"):
        to_dataclass(ExperimentConfig, pretraining)


def test_adam_starts_again_and_the_schedule_goes_on():
    """Of a gradient that is always the same, each update of a new Adam is one rate long."""
    params = {"a": np.float32([1.0, 2.0]), "b_step": np.float32([0.5])}
    config = OptimizerConfig(lr=0.1, weight_decay=0.0, clip_norm=0.0, schedule="cosine", final=0.0)
    optimizer = optim.make_optimizer(params, config, 1000, frozen_norms=False)
    pack = optimizer.packing.pack
    # 500 steps without a gradient.
    asleep = jax.tree.map(
        lambda x: jnp.full_like(x, 500) if x.dtype == jnp.int32 else x, optimizer.init(params)
    )

    def updates(state):
        found = []
        for _ in range(5):
            made, state = optimizer.transformation.update(
                pack(jax.tree.map(np.ones_like, params)), state, pack(params)
            )
            found.append(np.asarray(made["packed"]["rest"]))
        return np.stack(found)

    rates = 0.1 * 0.5 * (1 + np.cos(np.pi * np.arange(500, 505) / 1000))
    made = updates(restarted(asleep, True))
    np.testing.assert_allclose(made, -np.repeat(rates[:, None], 2, 1), rtol=1e-4)
    assert (updates(restarted(asleep, False))[-1] < -2 * rates[-1]).all()


def test_a_phase_has_rates_of_its_own():
    """A first update of Adam is the rate, plus the decay at that rate; of a step relative to it."""
    params = {"kernel": np.float32([[1.0, -2.0]]), "bias": np.float32([0.5])}
    params |= {"input_step": np.float32(0.25), "x_offset": np.float32(-1.0)}
    config = OptimizerConfig(
        lr=0.01, lr_steps=0.001, weight_decay=0.1, clip_norm=0.0, schedule="constant"
    )
    optimizer = optim.make_optimizer(params, config, 10, frozen_norms=False)

    def loss_fn(params, stats, teacher, batch, number, part=None):
        loss = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))
        return loss, ({"loss": loss}, stats)

    rules = PhaseConfig(rate=3.0, trained=("kernel", "_step", "_offset"))
    experiment = dataclasses.replace(tiny.FLOAT, optimizer=config)
    step = jax.jit(make_train_step(experiment, loss_fn, optimizer, Phase(0, 5, rules)))
    state = TrainState.create(params, {}, optimizer, ema=False)
    after = jax.device_get(step(state, {}, {})[0].params)
    decayed = params["kernel"] - 3 * 0.01 * (1 + 0.1 * params["kernel"])
    np.testing.assert_allclose(after["kernel"], decayed, rtol=1e-5)
    np.testing.assert_allclose(after["input_step"], 0.25 * (1 - 3 * 0.001), rtol=1e-6)
    np.testing.assert_allclose(after["x_offset"], -1 - 3 * 8 * 0.001, rtol=1e-5)
    np.testing.assert_array_equal(after["bias"], params["bias"])


# --- what a phase does to a model ------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tiny_teacher, quick_compile):
    """Configuration, module, first variables."""
    config = tiny.resolved(tiny.student(tiny_teacher))
    grid = dataclasses.replace(config.quant, grid="offset", renormalize=True)
    config = dataclasses.replace(
        config,
        quant=grid,
        model=dataclasses.replace(tiny.MODEL, decoder_layers=1),
        distill=DistillConfig(),
        train=dataclasses.replace(
            config.train,
            steps=4,
            phases=(BACKBONE_FIRST, STEPS_LAST),
            checkpoint_every=1,
            keep_checkpoints=9,
            pictures=0,
        ),
        mesh=MeshConfig(data=1),
    )
    config = tiny.resolved(config)
    module = setup.build_module(config)
    first = beginning.first_variables(config, module, open_dataset(config.data, train=True))
    return config, module, first


def test_what_is_not_quantized_yet_is_float(student):
    _, module, first = student
    rows = record_ops(Phase(0, 2, BACKBONE_FIRST).module(module), first, (64, 64))
    whole = {row.path: row for row in record_ops(module, first, (64, 64))}

    def grids(row):
        return row.weight, row.activation, row.other

    for row in rows:
        if row.path.startswith("backbone/"):
            assert grids(row) == grids(whole[row.path])
        else:
            assert grids(row) == (None, None, None)
    assert any(any(grids(row)) for row in rows)


def test_float_operations_are_the_float_models_bit_for_bit(student):
    config, module, first = student
    batch = tiny.batches(config, 1)[0]
    nothing = Phase(0, 2, PhaseConfig(quantized=("no operation",))).module(module)
    outputs = [
        jax.jit(lambda m, v, x, mask: m.apply(v, x, mask), static_argnums=0)(
            model, first, batch["images"], batch["mask"]
        )
        for model in (nothing, build_detector(config.model))
    ]
    for name in ("logits", "boxes"):
        np.testing.assert_array_equal(*(np.asarray(getattr(x, name)) for x in outputs))


@pytest.fixture(scope="module")
def train():
    """``train(config, folder)`` returns what a run says; all of them compile once."""
    made = []

    def programs(*arguments):
        made.extend([StepPrograms(*arguments)] * (not made))
        return made[0]

    def run(config, folder):
        with pytest.MonkeyPatch.context() as patch, io.StringIO() as told:
            patch.setattr(loop, "StepPrograms", programs)
            with contextlib.redirect_stdout(told):
                loop.train(config, folder)
            return told.getvalue()

    return run


@pytest.fixture(scope="module")
def straight(student, train, tmp_path_factory):
    """The folder of a run that was never stopped, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("phases") / "straight"
    told = train(student[0], folder)
    assert "steps 1 to 2; quantized: ^backbone/; trained: ^backbone/\n" in told
    assert "steps 3 to 4; from the moving average; trained: _(step|offset)$, " in told
    return folder


@pytest.fixture(scope="module")
def states(student, straight):
    """The state before the first step (without an optimizer's) and after each."""
    found = [{"params": student[2]["params"]}]
    with Checkpoints(straight / "checkpoints") as checkpoints:
        return found + [checkpoints.restore(step=step)[0] for step in (1, 2, 3, 4)]


def moved(before, after) -> set[str]:
    """Paths of the parameters with another bit."""
    one, other = (traverse_util.flatten_dict(tree["params"], sep="/") for tree in (before, after))
    return {path for path in one if one[path].tobytes() != other[path].tobytes()}


def test_what_is_not_trained_does_not_move_a_bit(states):
    assert len(states) == 5
    assert states[-1]["skipped"] == 0
    first = moved(states[0], states[2])
    assert {path.split("/")[0] for path in first} == {"backbone"}
    assert {path.rsplit("/", 1)[1] for path in first} >= {"kernel", "kernel_step", "input_step"}
    last = moved(states[3], states[4])
    endings = ("_step", "_offset", "bias")
    assert all(path.endswith(endings) for path in last)
    kinds = {"kernel_step", "input_step", "q_step", "probs_step", "input_offset", "q_offset"}
    assert {path.rsplit("/", 1)[1] for path in last} >= kinds | {"bias"}
    assert "encoder/layer_0/norm1/bias" in last  # a norm's shift, and not its scale


def test_the_last_phase_begins_from_the_average(states):
    trees = states[2]["ema"]["params"], states[2]["params"], states[3]["params"]
    ema, own, after = (traverse_util.flatten_dict(tree, sep="/") for tree in trees)
    kernels = [path for path in after if path.endswith("/kernel")]
    assert kernels
    for path in kernels:
        np.testing.assert_array_equal(after[path], ema[path])
    assert any((after[path] != own[path]).any() for path in kernels)


def test_the_average_is_of_steps_and_offsets_too(states):
    """By hand: e + (p - e) (1 - d), d = (1 + t) / (10 + t) while the average is young."""
    before, after = states[2:4]
    keep = min(0.9, (1 + 2) / (10 + 2))
    old, new, mean = (
        traverse_util.flatten_dict(tree, sep="/")
        for tree in (before["ema"]["params"], after["params"], after["ema"]["params"])
    )
    found = [path for path in new if path.endswith(("_step", "_offset"))]
    assert any(path.endswith("q_offset") for path in found)
    for path in found:
        np.testing.assert_allclose(
            mean[path], old[path] * keep + new[path] * (1 - keep), rtol=1e-5, atol=1e-7
        )
    assert any((mean[path] != new[path]).any() for path in found)


def test_patterns_that_match_nothing_are_named(student):
    config, module, first = student
    rows = record_ops(module, first, (64, 64))
    check_phases(config, rows, first["params"])
    for phase, message in (
        (PhaseConfig(quantized=("class_head",)), "'class_head' matches no operation that is quant"),
        (PhaseConfig(trained=("_zero$",)), "'_zero\\$' matches no parameter that is trained"),
        (PhaseConfig(trained=("^backbone/stem_norm/",)), "matches no parameter that is trained"),
    ):
        with pytest.raises(ValueError, match=message):
            check_phases(with_phases(config, phase), rows, first["params"])


# --- a run ------------------------------------------------------------------------------------


def test_a_run_that_goes_on_at_a_border_equals_the_straight_one(student, train, straight, tmp_path):
    folder = tmp_path / "resumed"
    shutil.copytree(straight, folder)
    (folder / "results.json").unlink()
    shutil.rmtree(folder / "model")
    for path in (folder / "checkpoints").glob("step_*"):
        if int(re.search(r"\d+", path.name)[0]) > 2:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "going on from step 2" in train(student[0], folder)
    found = []
    for each in (straight, folder):
        with Checkpoints(each / "checkpoints") as checkpoints:
            tree, step = checkpoints.restore()
        assert step == 4
        found.append(tiny.digest(tree))
    assert found[0] == found[1]
