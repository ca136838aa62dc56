from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from flax import traverse_util

from aqdetr_jax.checkpoint.model_folder import load_model
from aqdetr_jax.checkpoint.transfer import LoadReport, match_classes, merge
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.models.config import DeformableConfig
from aqdetr_jax.models.detector import example_input
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.training import initial, setup

pytestmark = pytest.mark.usefixtures("quick_compile")


# --- merge ---------------------------------------------------------------------------------------


def test_merge_takes_what_fits_and_reports_the_rest():
    own = {
        "a/kernel": np.zeros(2),
        "a/kernel_step": np.zeros(1),
        "b": np.zeros(3),
        "c": np.zeros(1),
    }
    source = {"a/kernel": np.ones(2), "b": np.ones(4), "d": np.ones(1), "c": np.ones(1)}
    merged, report = merge(own, source)
    assert report == LoadReport(
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
    params, given = tiny.flat(variables), tiny.flat(teacher.variables)
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
    images, mask = example_input(config.data.buckets[0])
    default = jax.jit(module.init)(
        jax.random.fold_in(jax.random.key(config.seed), initial.INIT), images, mask
    )
    before, after = tiny.flat(default), tiny.flat(variables)
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
    again = initial.calibrate(config, module, variables, [batch])
    assert tiny.digest(again["params"]) == tiny.digest(variables["params"])
    darker = initial.calibrate(
        config, module, variables, [{**batch, "images": batch["images"] // 4}]
    )
    site = ("backbone", "layer1_0", "conv1", "input_step")
    a, b = (traverse_util.flatten_dict(v["params"])[site] for v in (again, darker))
    assert a != b


def test_calibration_does_not_see_padding(calibrated):
    """The same images with other pixels in the padding, and with more padding: the same steps."""
    config, module, _, variables, _ = calibrated
    (batch,) = tiny.batches(config, 1)
    steps = tiny.digest(initial.calibrate(config, module, variables, [batch])["params"])
    dirty = batch["images"].copy()
    assert not batch["mask"].all()
    dirty[~batch["mask"]] = 255
    again = initial.calibrate(config, module, variables, [{**batch, "images": dirty}])
    assert tiny.digest(again["params"]) == steps


def test_calibration_batches_are_the_same_on_every_process(calibrated, monkeypatch):
    config = calibrated[0]
    dataset = open_dataset(config.data, train=True)
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
    with pytest.raises(ValueError, match=r"at least one batch: config\.quant\.calibration_batches"):
        initial.calibrate(config, module, variables, [])


def never():
    raise AssertionError("calibration data were read")
    yield


def test_steps_of_the_same_policy_are_kept_and_of_another_are_not(calibrated):
    config, module, teacher, variables, _ = calibrated
    same = dataclasses.replace(
        teacher, config=config.model, quant=config.quant, variables=variables
    )
    kept, report = initial.initial_variables(config, module, same, never())
    assert not report.new
    assert tiny.digest(kept["params"]) == tiny.digest(variables["params"])
    # The same sites at eight bits: sixteen times finer steps would cut a 4-bit grid short.
    finer = {p: v / 16 if p.endswith("_step") else v for p, v in tiny.flat(variables).items()}
    eight = dataclasses.replace(
        same,
        quant=QuantConfig("w8a8"),
        variables={**variables, "params": traverse_util.unflatten_dict(finer, sep="/")},
    )
    fresh, _ = initial.initial_variables(config, module, eight, tiny.batches(config, 1))
    assert tiny.digest(fresh["params"]) == tiny.digest(variables["params"])


def test_source_that_does_not_fit_is_refused(calibrated):
    config, module, teacher, _, _ = calibrated
    alien = {"encoder": {"strange": {"kernel": np.zeros((3, 3), np.float32)}}}
    source = dataclasses.replace(
        teacher, variables={"params": alien, "batch_stats": teacher.variables["batch_stats"]}
    )
    with pytest.raises(ValueError, match=r"init_from=.*does not fit this model: .*0 loaded"):
        initial.initial_variables(config, module, source, never())


# --- classes -------------------------------------------------------------------------------------


def test_a_source_of_other_pixels_is_refused(calibrated):
    """What the first layers have learnt is of values of another mean and spread."""
    config, module, teacher, _, _ = calibrated
    other = dataclasses.replace(teacher.config, pixel_mean=(0.5, 0.5, 0.5))
    source = dataclasses.replace(teacher, config=other)
    with pytest.raises(ValueError, match=r"set config\.model\.pixel_mean=\(0\.5, 0\.5, 0\.5\)"):
        initial.initial_variables(config, module, source, None)


def test_class_heads_of_a_two_stage_model_follow_the_names():
    options = DeformableConfig(levels=3, stages=2, norm_groups=8, box_refine=True, two_stage=True)
    model = dataclasses.replace(tiny.MODEL, family="deformable", deformable=options)
    loss = dataclasses.replace(tiny.FLOAT.loss, kind="focal")
    source = tiny.bundle(dataclasses.replace(tiny.FLOAT, model=model, loss=loss))
    names, params = source.class_names, source.variables["params"]
    wanted = (names[3], names[1])
    found = match_classes(source, wanted).variables["params"]
    for layer in range(2):
        kernel = params[f"class_head_{layer}"]["kernel"]
        np.testing.assert_array_equal(found[f"class_head_{layer}"]["kernel"], kernel[:, [3, 1]])
    # Whether there is an object at all is the first column of the proposals' head.
    proposals = params["class_head_2"]["kernel"]
    np.testing.assert_array_equal(found["class_head_2"]["kernel"], proposals[:, [0, 1]])
    # A class that the source does not know costs the other heads, not this one.
    unknown = (names[0], "zebra")
    params = match_classes(source, unknown).variables["params"]
    assert [name for name in params if name.startswith("class_head")] == ["class_head_2"]
    np.testing.assert_array_equal(params["class_head_2"]["kernel"], proposals[:, [0, 1]])
    many = (*names, "zebra", "yak")
    last = len(names) - 1
    kernel = match_classes(source, many).variables["params"]["class_head_2"]["kernel"]
    np.testing.assert_array_equal(kernel, proposals[:, [*range(last), last, last, last]])


def test_class_head_follows_the_names(tiny_teacher, caplog):
    teacher = load_model(tiny_teacher)
    names = teacher.class_names
    assert match_classes(teacher, names) is teacher
    kernel = teacher.variables["params"]["class_head"]["kernel"]
    wanted = (names[4], names[0], names[7])
    matched = match_classes(teacher, wanted).variables["params"]["class_head"]
    np.testing.assert_array_equal(matched["kernel"], kernel[:, [4, 0, 7, len(names)]])
    assert matched["bias"].shape == (4,)
    unknown = match_classes(teacher, (names[0], "zebra"))
    assert "class_head" not in unknown.variables["params"]
    assert "does not know ['zebra']" in caplog.text
    assert "class_head" in teacher.variables["params"]
