from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from aqdetr_jax.checkpoint.model_folder import load_model
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.evaluation.coco import METRIC_NAMES, evaluate_detections
from aqdetr_jax.evaluation.evaluator import Evaluator
from aqdetr_jax.parallel.compiled import DoesNotFitError
from aqdetr_jax.parallel.mesh import make_mesh
from aqdetr_jax.training import setup

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def evaluated(tiny_teacher, quick_compile):
    """(bundle, dataset, evaluator, metrics, detections) of six images in batches of four."""
    bundle = load_model(tiny_teacher)
    dataset = open_dataset(tiny.FLOAT.data, train=False)
    pipeline = setup.pipeline_config(tiny.FLOAT, train=False)
    assert len(dataset) % pipeline.batch_size == 2
    evaluator = Evaluator(bundle.module(), dataset, pipeline, make_mesh())
    return bundle, dataset, evaluator, *evaluator.evaluate(bundle.variables)


def manual(bundle, dataset):
    """The same detections image by image, post-processing in NumPy."""
    module = bundle.module()
    forward = jax.jit(module.apply)
    results = []
    for index in range(len(dataset)):
        image = dataset[index].image
        output = forward(bundle.variables, image[None], np.ones((1, *image.shape[:2]), bool))
        logits = np.asarray(output.logits[-1, 0], np.float64)
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities = (odds / odds.sum(-1, keepdims=True))[:, :-1]
        height, width = image.shape[:2]
        boxes = np.asarray(output.boxes[-1, 0], np.float64) * [width, height, width, height]
        for row, (cx, cy, w, h) in zip(probabilities, boxes, strict=True):
            results.append(
                {
                    "image_id": dataset.image_id(index),
                    "category_id": dataset.category_ids[int(row.argmax())],
                    "bbox": [cx - w / 2, cy - h / 2, w, h],
                    "score": row.max(),
                }
            )
    return results


def test_detections_are_those_of_a_plain_loop(evaluated):
    """Fillers of the last batch leave no trace, and every image is there once, in order."""
    bundle, dataset, _, _, detections = evaluated
    expected = manual(bundle, dataset)
    assert len(detections.results) == len(expected) == 6 * 12
    for found, wanted in zip(detections.results, expected, strict=True):
        assert found["image_id"] == wanted["image_id"]
        assert found["category_id"] == wanted["category_id"]
        np.testing.assert_allclose(found["bbox"], wanted["bbox"], rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(found["score"], wanted["score"], rtol=1e-4)


def test_numbers_are_those_of_the_detections(evaluated):
    _, dataset, _, metrics, detections = evaluated
    direct = evaluate_detections(dataset.coco_ground_truth(), detections.results)
    assert {name: metrics[name] for name in METRIC_NAMES} == {
        name: direct[name] for name in METRIC_NAMES
    }
    assert list(metrics["per_class"]) == list(dataset.class_names)
    assert detections.seconds > 0


def test_an_evaluator_can_be_used_again_and_reports_progress(evaluated):
    bundle, _, evaluator, metrics, _ = evaluated
    seen = []
    again, _ = evaluator.evaluate(bundle.variables, lambda *done: seen.append(done))
    assert again == metrics
    assert seen == [(1, 2), (2, 2)]


def test_on_accelerators_every_bucket_in_use_is_compiled_first(evaluated, monkeypatch):
    bundle, dataset, _, _, detections = evaluated
    monkeypatch.setattr("aqdetr_jax.evaluation.evaluator.on_accelerators", lambda mesh: True)
    pipeline = setup.pipeline_config(tiny.FLOAT, train=False)
    pipeline = dataclasses.replace(pipeline, buckets=((64, 64), (640, 640)))
    evaluator = Evaluator(bundle.module(), dataset, pipeline, make_mesh())
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        evaluator.compile(bundle.variables)
        assert len(compiled) == 1  # no image is large enough for the other
        assert evaluator.detect(bundle.variables).results == detections.results
        assert len(compiled) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    ("batch_size", "remedy"),
    [
        (4, r": try config\.train\.eval_batch_size=2$"),
        (1, r": one image a device is too large already: use smaller config\.data\.eval_buckets,"),
    ],
)
def test_what_does_not_fit_says_what_helps(evaluated, monkeypatch, batch_size, remedy):
    bundle, dataset, *_ = evaluated
    monkeypatch.setattr("aqdetr_jax.evaluation.evaluator.on_accelerators", lambda mesh: True)
    monkeypatch.setattr("aqdetr_jax.parallel.compiled.device_bytes", lambda: 2**10)
    pipeline = dataclasses.replace(
        setup.pipeline_config(tiny.FLOAT, train=False), batch_size=batch_size
    )
    with pytest.raises(DoesNotFitError, match=remedy):
        Evaluator(bundle.module(), dataset, pipeline, make_mesh()).compile(bundle.variables)


def test_non_finite_parameters_are_reported_with_the_image(evaluated):
    bundle, _, evaluator, _, _ = evaluated
    broken = jax.tree.map(np.copy, bundle.variables)
    broken["params"]["class_head"]["bias"][:] = np.nan
    with pytest.raises(ValueError, match=r"image .* not finite; look for NaN in the parameters"):
        evaluator.evaluate(broken)


def test_a_batch_is_never_larger_than_the_set(evaluated):
    """The official batch of 64 large images would take all memory for a folder of four."""
    bundle, dataset, _, _, detections = evaluated
    pipeline = dataclasses.replace(setup.pipeline_config(tiny.FLOAT, train=False), batch_size=64)
    evaluator = Evaluator(bundle.module(), dataset, pipeline, make_mesh())
    found = evaluator.detect(bundle.variables)
    assert [len(batch["images"]) for batch in evaluator._batches] == [len(dataset)]
    assert [r["image_id"] for r in found.results] == [r["image_id"] for r in detections.results]
