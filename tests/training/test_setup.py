from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import tiny

from aqdetr_jax.checkpoint.model_folder import (
    InputRule,
    ModelBundle,
    load_model,
    save_model,
)
from aqdetr_jax.checkpoint.steps import Checkpoints
from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.open import check_same_classes, open_dataset
from aqdetr_jax.losses.criterion import LossWeights
from aqdetr_jax.losses.distillation import DistillationWeights
from aqdetr_jax.models.config import DeformableConfig
from aqdetr_jax.models.detector import record_ops
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.quant.policy import Rule
from aqdetr_jax.training import initial, setup, sizing
from aqdetr_jax.training.config import DistillConfig

pytestmark = pytest.mark.usefixtures("quick_compile")


# --- classes -------------------------------------------------------------------------------------


def test_number_of_classes_comes_from_the_data():
    config = tiny.FLOAT
    dataset = open_dataset(config.data, train=True)
    assert sizing.with_data(config, dataset).model.num_classes == dataset.num_classes == 10
    roomy = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=91))
    assert sizing.with_data(roomy, dataset) == roomy
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=3))
    with pytest.raises(ValueError, match=r"has 10 classes.*num_classes is 3; set it to 0"):
        sizing.with_data(small, dataset)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig(kind="voc"), "config.data.root is empty"),
        (DataConfig(kind="coco"), "config.data.train_images is empty"),
        (DataConfig(kind="coco", train_images="x"), "config.data.train_annotations is empty"),
    ],
)
def test_missing_data_settings_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(data, train=True)


# --- teacher -------------------------------------------------------------------------------------


def test_teacher_is_float_while_the_student_is_quantized(calibrated):
    config, module, _, variables, _ = calibrated
    teacher = setup.load_teacher(config)
    assert module.policy.rules
    assert not teacher.module().policy.rules
    assert not [path for path in tiny.flat(teacher.variables) if path.endswith(("_step", "_zero"))]
    assert [path for path in tiny.flat(variables) if path.endswith("_step")]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"init_from": "nowhere/run"}, FileNotFoundError, r"config.init_from='nowhere/run'"),
        ({"init_from": "packaged:shape"}, FileNotFoundError, "packaged:shapes_teacher"),
        ({"init_from": ""}, ValueError, "there is no teacher: set config.distill.teacher"),
        ({"teacher": "gone"}, FileNotFoundError, r"config.distill.teacher='gone'"),
    ],
)
def test_a_teacher_that_is_not_there_is_named(calibrated, changes, error, message):
    config = calibrated[0]
    if "teacher" in changes:
        changes = {"distill": dataclasses.replace(config.distill, teacher=changes["teacher"])}
    with pytest.raises(error, match=message):
        setup.load_teacher(dataclasses.replace(config, **changes))


def test_no_distillation_needs_no_teacher(calibrated):
    config = dataclasses.replace(calibrated[0], distill=tiny.FLOAT.distill, init_from="/nowhere")
    assert setup.load_teacher(config) is None


def test_quantized_teacher_is_refused(calibrated, tmp_path):
    config, _, teacher, variables, _ = calibrated
    quantized = dataclasses.replace(
        teacher, config=config.model, quant=config.quant, variables=variables
    )
    save_model(tmp_path / "model", quantized)
    distill = dataclasses.replace(config.distill, teacher=str(tmp_path))
    with pytest.raises(ValueError, match=r"distill\.teacher=.* is quantized \(w4a4\)"):
        setup.load_teacher(dataclasses.replace(config, distill=distill))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 4}, r"has heads=2, the student has 4"),
        ({"decoder_layers": 3}, r"has decoder_layers=2, the student has 3"),
        ({"num_queries": 8}, r"has num_queries=12, the student has 8"),
        (
            {"backbone": dataclasses.replace(tiny.BACKBONE, stem_stride=2)},
            r"has backbone.output_stride=8, the student has 4",
        ),
    ],
)
def test_teacher_of_another_shape_is_refused(calibrated, changes, message):
    config = calibrated[0]
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    with pytest.raises(ValueError, match=message):
        setup.load_teacher(config)


@pytest.mark.parametrize(
    ("teacher", "student", "cross", "message"),
    [
        ({"family": "detr"}, {}, 0.0, "family=detr, the student has deformable"),
        ({"points": 2}, {}, 0.0, r"deformable\.points=2, the student has 4"),
        ({"levels": 2}, {}, 0.0, r"deformable\.levels=2, the student has 3"),
        ({"stages": 1}, {}, 0.0, r"deformable\.stages=1, the student has 2"),
        ({"two_stage": True}, {}, 1.0, r"two_stage=True, the student has False"),
        ({"two_stage": True}, {}, 0.0, None),
        # All that differs is how many stages a single level leaves unused.
        ({"levels": 1, "stages": 1}, {"levels": 1}, 0.0, None),
    ],
)
def test_deformable_teacher_must_sample_alike(monkeypatch, teacher, student, cross, message):
    def model(family="deformable", **options):
        options = {"levels": 3, "stages": 2, "box_refine": True, "norm_groups": 8, **options}
        deformable = DeformableConfig(**options)
        return dataclasses.replace(tiny.MODEL, family=family, deformable=deformable)

    variables = {"params": {"decoder": {}}}
    bundle = ModelBundle(
        model(**teacher), QuantConfig(), InputRule(((64, 64),)), ("a",), (1,), variables
    )
    monkeypatch.setattr(setup, "load_source", lambda path, key: bundle)
    config = dataclasses.replace(
        tiny.student("somewhere"),
        model=model(**student),
        loss=LossWeights(cls=2.0, kind="focal"),
        distill=DistillConfig(weights=DistillationWeights(encoder=1.0, decoder_cross=cross)),
    )
    if message is None:
        assert setup.load_teacher(config) == bundle
        return
    with pytest.raises(ValueError, match=message):
        setup.load_teacher(config)


# --- model folders -------------------------------------------------------------------------------


def test_model_round_trip_is_bit_equal_and_drops_auxiliary_queries(calibrated, tmp_path):
    config, _, teacher, variables, _ = calibrated
    bundle = dataclasses.replace(
        teacher, config=config.model, quant=config.quant, variables=variables
    )
    save_model(tmp_path / "run" / "model", bundle)
    loaded = load_model(tmp_path / "run")  # the run, or its model folder
    assert loaded.config == dataclasses.replace(config.model, num_auxiliary=0, auxiliary_groups=1)
    for name in ("quant", "input", "class_names", "category_ids", "info"):
        assert getattr(loaded, name) == getattr(bundle, name)
    assert "auxiliary_queries" in variables["params"]
    kept = {k: v for k, v in variables["params"].items() if k != "auxiliary_queries"}
    assert tiny.digest(loaded.variables["params"]) == tiny.digest(kept)
    assert tiny.digest(loaded.variables["batch_stats"]) == tiny.digest(variables["batch_stats"])
    again = load_model(tmp_path / "run" / "model")
    assert tiny.digest(again.variables) == tiny.digest(loaded.variables)


def test_wrong_folders_are_explained(tiny_teacher, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="not a model folder"):
        load_model(tmp_path)  # empty
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match=r"manifest\.json, metadata\.json and params/"):
        load_model(tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"a": np.zeros(2, np.float32)}, wait=True)
    with pytest.raises(FileNotFoundError, match="training checkpoints"):
        load_model(tmp_path / "checkpoints")


def test_pretrained_backbone_is_no_detector(tiny_teacher, tmp_path):
    bundle = load_model(tiny_teacher)
    params = {k: v for k, v in bundle.variables["params"].items() if k != "decoder"}
    variables = {**bundle.variables, "params": params}
    save_model(tmp_path / "model", dataclasses.replace(bundle, variables=variables))
    with pytest.raises(ValueError, match="can only start a detector"):
        load_model(tmp_path).module()
    with pytest.raises(ValueError, match=r"config\.init_from=.* is a backbone and no teacher: st"):
        setup.load_teacher(tiny.student(tmp_path))


# --- what the data decide ------------------------------------------------------------------------


def test_calibrating_another_model_than_the_teachers_is_refused(tiny_teacher):
    from aqdetr_jax.training.bundles import calibrated_bundle

    config = tiny.student(tiny_teacher)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_queries=9))
    with pytest.raises(ValueError, match=r"query_embed.*would keep random values"):
        calibrated_bundle(config, load_model(tiny_teacher))


def test_patterns_that_match_nothing_are_named(calibrated):
    config, module, _, variables, _ = calibrated
    paths = [row.path for row in record_ops(module, variables, (64, 64))]

    def check(rules=(), frozen=(), slow=()):
        changed = dataclasses.replace(
            config,
            quant=dataclasses.replace(config.quant, rules=rules),
            optimizer=dataclasses.replace(config.optimizer, frozen=frozen, slow=slow),
        )
        setup.check_patterns(changed, paths, variables["params"])

    check((Rule("encoder/.*core", 4, 4, 8),), ("backbone/stem",))
    with pytest.raises(ValueError, match=r"config.quant.rules: 'encodr' matches no operation"):
        check((Rule("encoder", 4, 4, 8), Rule("encodr", 4, 4, 8)))
    with pytest.raises(ValueError, match=r"config.optimizer.frozen: 'bakcbone' matches no param"):
        check(frozen=("encoder", "bakcbone"))
    check(slow=("q_proj/",))
    with pytest.raises(ValueError, match=r"config.optimizer.slow: 'offsets' matches no parameter"):
        check(slow=("offsets",))


def test_sets_with_other_classes_are_refused():
    train = open_dataset(tiny.FLOAT.data, train=True)
    evaluation = open_dataset(tiny.FLOAT.data, train=False)
    check_same_classes(train, evaluation)
    for names, ids in (
        (("aardvark", *train.class_names[1:]), train.category_ids),
        (train.class_names, (99, *train.category_ids[1:])),
        (train.class_names[::-1], train.category_ids),  # the same names, shifted labels
        (train.class_names[:-1], train.category_ids[:-1]),
    ):
        other = copy.copy(evaluation)
        other.class_names, other.category_ids = names, ids
        with pytest.raises(ValueError, match="the same categories"):
            check_same_classes(train, other)


def test_frozen_without_a_source_is_refused():
    config = tiny.resolved(tiny.FLOAT)
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, frozen=("backbone",))
    )
    with pytest.raises(ValueError, match=r"frozen=.*random parameters.*config.init_from"):
        initial.initial_variables(config, setup.build_module(config), None, ())
