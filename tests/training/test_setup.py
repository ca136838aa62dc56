from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from flax import traverse_util

from aqdetr_jax.training import setup
from aqdetr_jax.training.checkpoint import Checkpoints
from aqdetr_jax.training.config import DataConfig, QuantConfig
from aqdetr_jax.training.model_io import load_model, save_model

pytestmark = pytest.mark.usefixtures("quick_compile")


def flat(variables) -> dict[str, np.ndarray]:
    return traverse_util.flatten_dict(variables["params"], sep="/")


@pytest.fixture(scope="module")
def calibrated(tiny_teacher, quick_compile):
    """(configuration, module, teacher, first variables of the student, load report)."""
    config = tiny.resolved(tiny.student(tiny_teacher))
    module = setup.build_module(config)
    teacher = load_model(tiny_teacher)
    variables, report = setup.initial_variables(config, module, teacher, tiny.batches(config, 1))
    return config, module, teacher, variables, report


# --- merge ---------------------------------------------------------------------------------------


def test_merge_takes_what_fits_and_reports_the_rest():
    own = {
        "a/kernel": np.zeros(2),
        "a/kernel_step": np.zeros(1),
        "b": np.zeros(3),
        "c": np.zeros(1),
    }
    source = {"a/kernel": np.ones(2), "b": np.ones(4), "d": np.ones(1), "c": np.ones(1)}
    merged, report = setup.merge(own, source)
    assert report == setup.LoadReport(
        loaded=["a/kernel", "c"], new=["a/kernel_step"], dropped=["d"], mismatched=["b"]
    )
    np.testing.assert_array_equal(merged["a/kernel"], 1)
    np.testing.assert_array_equal(merged["b"], np.zeros(3))
    assert set(merged) == set(own)
    text = report.summary()
    assert text == "parameters: 2 loaded, 1 new (step sizes), 1 dropped (d), 1 mismatched (b)"
    np.testing.assert_array_equal(own["a/kernel"], 0)  # the input is not changed


# --- first variables -----------------------------------------------------------------------------


def test_student_has_the_teachers_parameters(calibrated):
    _, _, teacher, variables, report = calibrated
    params, given = flat(variables), flat(teacher.variables)
    assert set(report.loaded) == set(given)
    for path, value in given.items():
        np.testing.assert_array_equal(params[path], value, err_msg=path)
    new = [p for p in report.new if not p.endswith("_step")]
    assert new == ["auxiliary_queries"]
    assert tiny.digest(variables["batch_stats"]) == tiny.digest(teacher.variables["batch_stats"])


def test_auxiliary_queries_start_as_noisy_copies(calibrated):
    config, _, teacher, variables, _ = calibrated
    queries = teacher.variables["params"]["query_embed"]
    copies = np.tile(queries, (2, 1))  # 24 auxiliary queries, 12 object queries
    difference = variables["params"]["auxiliary_queries"] - copies
    assert difference.shape == (24, 32)
    wanted = config.auxiliary.noise * queries.std()
    assert difference.std() == pytest.approx(wanted, rel=0.1)
    assert abs(difference.mean()) < 0.2 * wanted


def test_calibration_sets_every_step(calibrated):
    config, module, _, variables, _ = calibrated
    images, mask = setup.example_input(config.data.buckets[0])
    default = jax.jit(module.init)(
        jax.random.fold_in(jax.random.key(config.seed), setup.INIT), images, mask
    )
    before, after = flat(default), flat(variables)
    steps = [path for path in after if path.endswith("_step")]
    assert len(steps) > 50
    untouched = []
    for path in steps:
        assert np.isfinite(after[path]).all(), path
        assert (after[path] > 0).all(), path
        # Weight steps came from other weights, activation steps from a constant.
        if np.isin(after[path], before[path]).any():
            untouched.append(path)
    # The first decoder layer's values are all zero before training (its input is), and such a site
    # keeps the default.
    dead = "decoder/layer_0/self_attention/"
    assert set(untouched) <= {
        f"{dead}{site}_step" for site in ("v_proj/input", "core/v", "out_proj/input")
    }


def test_calibration_depends_on_the_images(calibrated):
    config, module, _, variables, _ = calibrated
    (batch,) = tiny.batches(config, 1)
    again = setup.calibrate(config, module, variables, [batch])
    assert tiny.digest(again["params"]) == tiny.digest(variables["params"])
    darker = setup.calibrate(config, module, variables, [{**batch, "images": batch["images"] // 4}])
    site = ("backbone", "layer1_0", "conv1", "input_step")
    a, b = (traverse_util.flatten_dict(v["params"])[site] for v in (again, darker))
    assert a != b


def test_calibration_does_not_see_padding(calibrated):
    """The same images with other pixels in the padding, and with more padding: the same steps."""
    config, module, _, variables, _ = calibrated
    (batch,) = tiny.batches(config, 1)
    steps = tiny.digest(setup.calibrate(config, module, variables, [batch])["params"])
    dirty = batch["images"].copy()
    assert not batch["mask"].all()
    dirty[~batch["mask"]] = 255
    again = setup.calibrate(config, module, variables, [{**batch, "images": dirty}])
    assert tiny.digest(again["params"]) == steps


def test_calibration_batches_are_the_same_on_every_process(calibrated, monkeypatch):
    config = calibrated[0]
    dataset = setup.open_dataset(config.data, train=True)
    seen = []
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        batches = setup.calibration_pipeline(config, dataset)
        seen.append(next(batches))
        batches.close()
    for name in seen[0]:
        np.testing.assert_array_equal(seen[0][name], seen[1][name], err_msg=name)


def test_calibration_without_batches_is_refused(calibrated):
    config, module, _, variables, _ = calibrated
    with pytest.raises(ValueError, match=r"at least one batch \(quant\.calibration_batches\)"):
        setup.calibrate(config, module, variables, [])


def never():
    raise AssertionError("calibration data were read")
    yield


def test_steps_of_the_same_policy_are_kept_and_of_another_are_not(calibrated):
    config, module, teacher, variables, _ = calibrated
    same = dataclasses.replace(
        teacher, config=config.model, quant=config.quant, variables=variables
    )
    kept, report = setup.initial_variables(config, module, same, never())
    assert not report.new
    assert tiny.digest(kept["params"]) == tiny.digest(variables["params"])
    # The same sites at eight bits: sixteen times finer steps would cut a 4-bit grid short.
    finer = {p: v / 16 if p.endswith("_step") else v for p, v in flat(variables).items()}
    eight = dataclasses.replace(
        same,
        quant=QuantConfig("w8a8"),
        variables={**variables, "params": traverse_util.unflatten_dict(finer, sep="/")},
    )
    fresh, _ = setup.initial_variables(config, module, eight, tiny.batches(config, 1))
    assert tiny.digest(fresh["params"]) == tiny.digest(variables["params"])


def test_source_that_does_not_fit_is_refused(calibrated):
    config, module, teacher, _, _ = calibrated
    alien = {"encoder": {"strange": {"kernel": np.zeros((3, 3), np.float32)}}}
    source = dataclasses.replace(
        teacher, variables={"params": alien, "batch_stats": teacher.variables["batch_stats"]}
    )
    with pytest.raises(ValueError, match=r"init_from=.*does not fit this model: .*0 loaded"):
        setup.initial_variables(config, module, source, never())


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
    assert not [path for path in flat(teacher.variables) if path.endswith(("_step", "_zero"))]
    assert [path for path in flat(variables) if path.endswith("_step")]


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


def test_class_head_follows_the_names(tiny_teacher, caplog):
    teacher = load_model(tiny_teacher)
    names = teacher.class_names
    assert setup.match_classes(teacher, names) is teacher
    kernel = teacher.variables["params"]["class_head"]["kernel"]
    wanted = (names[4], names[0], names[7])
    matched = setup.match_classes(teacher, wanted).variables["params"]["class_head"]
    np.testing.assert_array_equal(matched["kernel"], kernel[:, [4, 0, 7, len(names)]])
    assert matched["bias"].shape == (4,)
    unknown = setup.match_classes(teacher, (names[0], "zebra"))
    assert "class_head" not in unknown.variables["params"]
    assert "does not know ['zebra']" in caplog.text
    assert "class_head" in teacher.variables["params"]


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
