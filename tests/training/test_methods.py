"""The methods that are compared: their configurations, and what their steps compute."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from aqdetr_jax.checkpoint.model_folder import load_model, save_model
from aqdetr_jax.config_types import ConfigError
from aqdetr_jax.losses.distillation import DistillationWeights
from aqdetr_jax.losses.foreground import foreground_distillation
from aqdetr_jax.models.config import DeformableConfig
from aqdetr_jax.models.detector import example_input
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.training import initial, setup
from aqdetr_jax.training import optimizer as optim
from aqdetr_jax.training.assemble import TRAINED_KEYS, stand_in_teacher
from aqdetr_jax.training.config import AuxiliaryConfig, DistillConfig, ExperimentConfig
from aqdetr_jax.training.experiment import load_experiment
from aqdetr_jax.training.state import TrainState
from aqdetr_jax.training.step import detection_loss_fn, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compile")


# --- configurations ------------------------------------------------------------------------------

GRIDS = {"lsq_plus": "offset", "qdetr": "offset"}


@pytest.mark.parametrize("file", ["shapes_w4a4", "shapes_quickstart", "custom", "bccd"])
@pytest.mark.parametrize("family", ["detr", "deformable"])
@pytest.mark.parametrize("method", ["lsq", "lsq_plus", "qdetr", "auxiliary", "distill", "aqdetr"])
def test_every_method_by_its_name(file, family, method):
    prefix = "" if family == "detr" and file != "custom" else f"{family}-"
    config = load_experiment(f"{file}:{prefix}{method}")
    assert config.model.family == family
    assert config.quant.grid == GRIDS.get(method, "centred")
    assert config.quant.align_queries == (method == "qdetr")
    assert bool(config.model.num_auxiliary) == (method in ("auxiliary", "aqdetr"))
    weights = config.distill.weights
    assert weights.maps == (method in ("distill", "aqdetr"))
    assert (weights.foreground, weights.tau) == (2.5 if method == "qdetr" else 0.0, 0.6)
    distilled = method in ("qdetr", "distill", "aqdetr")
    assert config.distill.needs_teacher == weights.active == distilled


def test_the_balance_of_detr_itself():
    """100 queries, "no object" at a tenth (facebookresearch/detr); M = 300, K = 3 for them."""
    for file in ("shapes_w4a4", "shapes_quickstart"):
        config = load_experiment(f"{file}:queries100-aqdetr")
        assert (config.model.num_queries, config.loss.eos) == (100, 0.1)
        assert (config.model.num_auxiliary, config.auxiliary.repeats) == (300, 3)
    teacher = load_experiment("shapes_teacher:queries100")
    assert (teacher.model.num_queries, teacher.loss.eos) == (100, 0.1)
    assert teacher.model.num_auxiliary == 0
    assert config.init_from.endswith(teacher.name)


def test_a_float_path_is_of_a_quantized_student_and_of_maps():
    weights = DistillationWeights(encoder=1.0, foreground=1.0)
    with pytest.raises(ValueError, match="foreground compares with another network's queries"):
        DistillConfig(source="float_path", weights=weights)
    with pytest.raises(ConfigError, match=r"float_path' compares .* quant\.policy is 'float'"):
        load_experiment("shapes_w4a4", ("distill.source=float_path", "quant.policy=float"))
    config = load_experiment("shapes_w4a4", ("distill.source=float_path",))
    assert config.distill.from_float_path
    with pytest.raises(ConfigError, match=r"distill\.source: expected one of .*'float_path'"):
        load_experiment("shapes_w4a4", ("distill.source=float",))
    # Each sees the input of its own, so that two stages have maps of the decoder too.
    two_stage = DeformableConfig(box_refine=True, two_stage=True)
    student = load_experiment("shapes_w4a4:deformable-distill", ("distill.source=float_path",))
    model = dataclasses.replace(student.model, deformable=two_stage, dim=160)
    dataclasses.replace(student, model=model)
    with pytest.raises(ValueError, match="its own proposals"):
        dataclasses.replace(
            student, model=model, distill=dataclasses.replace(student.distill, source="teacher")
        )


def test_a_float_path_needs_no_teacher_not_even_one_that_is_there(tiny_teacher):
    config = tiny.resolved(tiny.student(tiny_teacher))
    assert setup.load_teacher(config) is not None
    distill = dataclasses.replace(config.distill, source="float_path")
    config = dataclasses.replace(config, distill=distill, init_from="/nowhere")
    assert setup.load_teacher(config) is None
    assert setup.teacher_key(config) is None
    assert stand_in_teacher(config) is None


def test_foreground_features_need_the_width_and_no_common_tokens(monkeypatch):
    config = tiny.student("somewhere")
    config = dataclasses.replace(
        config, distill=DistillConfig(weights=DistillationWeights(foreground=2.5))
    )
    teacher = tiny.bundle(drawn=False)

    def load(**changes):
        model = dataclasses.replace(teacher.config, **changes)
        bundle = dataclasses.replace(teacher, config=model)
        monkeypatch.setattr(setup, "load_source", lambda path, key: bundle)
        return setup.load_teacher(config)

    assert load(encoder_layers=3, num_queries=50, decoder_layers=6, heads=8) is not None
    with pytest.raises(ValueError, match="has dim=64, the student has 32"):
        load(dim=64)


# --- steps ---------------------------------------------------------------------------------------


def configured(folder, family="detr", **changes) -> ExperimentConfig:
    """The tiny student with a part of it changed."""
    config = tiny.student(folder)
    model = dataclasses.replace(
        config.model, num_auxiliary=0, auxiliary_groups=1, dropout=0.0, decoder_layers=1
    )
    if family == "deformable":
        options = DeformableConfig(levels=2, stages=2, points=2, norm_groups=4)
        model = dataclasses.replace(model, family=family, deformable=options)
        changes["loss"] = dataclasses.replace(config.loss, kind="focal")
    changes = {"model": model, "auxiliary": AuxiliaryConfig(), **changes}
    return tiny.resolved(dataclasses.replace(config, **changes))


QUANT = QuantConfig("w4a4", grid="offset", align_queries=True, calibration_batches=1)


@pytest.fixture(scope="module")
def qdetr(tmp_path_factory, quick_compile):
    """(configuration, module, teacher, batch, first state, state and metrics after one step)."""
    folder = tmp_path_factory.mktemp("teacher")
    config = configured(
        folder,
        quant=QUANT,
        distill=DistillConfig(weights=DistillationWeights(foreground=2.5, tau=0.3)),
    )
    float_model = dataclasses.replace(tiny.FLOAT, model=config.model)
    save_model(folder, tiny.bundle(float_model, drawn=False))
    module, teacher = setup.build_module(config), setup.load_teacher(config)
    batches = tiny.batches(config, 1)
    batch = {k: batches[0][k] for k in TRAINED_KEYS}
    first, report = initial.initial_variables(config, module, load_model(folder), batches)
    params = first["params"]
    optimizer = optim.make_optimizer(params, config.optimizer, 10, frozen_norms=True)
    state = TrainState.create(params, first["batch_stats"], optimizer, ema=True)
    loss_fn = detection_loss_fn(config, module, teacher.module())
    step = jax.jit(make_train_step(config, loss_fn, optimizer))
    after = jax.device_get(step(state, teacher.variables, batch))
    return config, module, teacher, batch, jax.device_get(state), after, report


def test_the_baselines_loss_is_detection_and_foreground(qdetr):
    _, module, teacher, batch, state, (_, metrics), _ = qdetr

    @jax.jit
    def run(variables, theirs):
        outputs = (
            module.apply(variables, batch["images"], batch["mask"]),
            teacher.module().apply(theirs, batch["images"], batch["mask"]),
        )
        (student, target) = ((o.boxes[-1], o.decoder_cross_attention[-1].output) for o in outputs)
        return student, target

    variables = {"params": state.params, "batch_stats": state.batch_stats}
    (boxes, features), (their_boxes, their_features) = run(variables, teacher.variables)
    wanted = foreground_distillation(
        boxes, their_boxes, features, their_features, batch["boxes"], batch["valid"], 0.3
    )
    assert wanted > 0
    assert metrics["loss_distill_foreground"] == pytest.approx(float(wanted), rel=1e-3)
    detection = metrics["loss_ce"] + 5 * metrics["loss_bbox"] + 2 * metrics["loss_giou"]
    assert metrics["loss"] == pytest.approx(detection + 2.5 * float(wanted), rel=1e-3)
    assert not any(name.startswith("auxiliary_queries") for name in metrics)


def test_offsets_and_alignments_start_by_calibration_and_train(qdetr):
    config, _, _, _, state, (after, _), report = qdetr
    before, moved = (tiny.flat({"params": s.params}) for s in (state, after))
    offsets = [path for path in before if path.endswith("_offset")]
    assert offsets
    assert set(offsets) <= set(report.new)
    rate = optim.OFFSET_RATE * config.optimizer.lr_steps
    for path in offsets:
        assert np.all(before[path] == np.rint(before[path])), path  # calibrated: whole steps
        assert np.abs(moved[path] - before[path]).max() < 1.01 * rate, path
    assert any(np.any(before[path]) for path in offsets)
    assert sum(np.any(moved[path] != before[path]) for path in offsets) > len(offsets) / 2
    for leaf in ("scale", "bias"):
        path = f"decoder/layer_0/cross_attention/alignment/{leaf}"
        assert path in report.new
        assert np.ptp(before[path]) == 0
        assert before[path][0] not in (0, 1)
        assert np.any(moved[path] != before[path])


def test_the_loss_of_a_float_path():
    """Of Deformable DETR; no teacher and no variables of one."""
    weights = DistillationWeights(encoder=3.0, decoder_self=0.5, decoder_cross=2.0)
    config = configured(
        "/nowhere",
        "deformable",
        quant=dataclasses.replace(QUANT, grid="symmetric"),
        distill=DistillConfig(source="float_path", weights=weights),
    )
    module = setup.build_module(config)
    batches = tiny.batches(config, 1)
    batch = {k: batches[0][k] for k in TRAINED_KEYS}
    variables = tiny.random_variables(module, *example_input((64, 64)))
    loss_fn = detection_loss_fn(config, module, None)
    _, (terms, _) = jax.jit(loss_fn)(
        variables["params"], variables["batch_stats"], {}, batch, np.int32(0)
    )
    names = ("encoder", "decoder_self", "decoder_cross")
    found = [float(terms[f"loss_distill_{name}"]) for name in names]
    assert all(value > 1e-5 for value in found), found
    detection = sum(
        config.loss.cls * terms[f"{layer}loss_ce"]
        + 5 * terms[f"{layer}loss_bbox"]
        + 2 * terms[f"{layer}loss_giou"]
        for layer in ("", "aux_layers/")
    )
    distilled = 3 * found[0] + 0.5 * found[1] + 2 * found[2]
    assert float(terms["loss"]) == pytest.approx(float(detection) + distilled, rel=1e-4)


@pytest.mark.parametrize("family", ["detr", "deformable"])
def test_layers_that_are_computed_again_have_float_paths_too(family):
    config = configured(
        "/nowhere",
        family,
        distill=DistillConfig(source="float_path", weights=DistillationWeights(encoder=1.0)),
    )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=True))
    module = setup.build_module(config)
    variables = jax.eval_shape(module.init, jax.random.key(0), *example_input((64, 64)))
    batches = tiny.batches(config, 1)
    batch = {k: batches[0][k] for k in TRAINED_KEYS}
    loss_fn = detection_loss_fn(config, module, None)
    gradient, (terms, _) = jax.eval_shape(
        jax.grad(loss_fn, has_aux=True),
        variables["params"],
        variables["batch_stats"],
        {},
        batch,
        np.int32(0),
    )
    assert "loss_distill_encoder" in terms
    assert jax.tree.structure(gradient) == jax.tree.structure(variables["params"])
