from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny

from aqdetr_jax.training import setup
from aqdetr_jax.training.checkpoint import Checkpoints
from aqdetr_jax.training.config import DataConfig
from aqdetr_jax.training.model_io import load_model, save_model

pytestmark = pytest.mark.usefixtures("quick_compile")


# --- classes -------------------------------------------------------------------------------------


def test_number_of_classes_comes_from_the_data():
    config = tiny.FLOAT
    dataset = setup.open_dataset(config.data, train=True)
    assert setup.with_data(config, dataset).model.num_classes == dataset.num_classes == 10
    roomy = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=91))
    assert setup.with_data(roomy, dataset) == roomy
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=3))
    with pytest.raises(ValueError, match=r"has 10 classes.*num_classes is 3; set it to 0"):
        setup.with_data(small, dataset)


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
        setup.open_dataset(data, train=True)


# --- teacher -------------------------------------------------------------------------------------


def test_teacher_is_float_while_the_student_is_quantized(calibrated):
    config, module, _, variables, _ = calibrated
    teacher = setup.load_teacher(config)
    assert module.policy.rules
    assert not teacher.module().policy.rules
    assert not [path for path in tiny.flat(teacher.variables) if path.endswith(("_step", "_zero"))]
    assert [path for path in tiny.flat(variables) if path.endswith("_step")]


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
            r"has output stride 8, the student 4",
        ),
    ],
)
def test_teacher_of_another_shape_is_refused(calibrated, changes, message):
    config = calibrated[0]
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
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
    with pytest.raises(FileNotFoundError, match="not a parameter folder"):
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


# --- what the data decide ------------------------------------------------------------------------


def test_epochs_become_steps():
    config = dataclasses.replace(
        tiny.FLOAT, train=dataclasses.replace(tiny.FLOAT.train, epochs=2.5, batch_size=6)
    )
    dataset = setup.open_dataset(config.data, train=True)  # 16 images
    resolved = setup.with_data(config, dataset)
    assert resolved.train.steps == 7  # ceil(40 / 6)
    assert setup.with_data(resolved, dataset) == resolved


def test_calibrating_another_model_than_the_teachers_is_refused(tiny_teacher):
    from aqdetr_jax.training.bundles import calibrated_bundle

    config = tiny.student(tiny_teacher)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_queries=9))
    with pytest.raises(ValueError, match=r"query_embed.*would keep random values"):
        calibrated_bundle(config, load_model(tiny_teacher))
