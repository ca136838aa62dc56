"""What the report's pictures are made of: the right boxes under the right titles."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny

from aqdetr_jax import reporting
from aqdetr_jax.training import setup


@pytest.fixture(scope="module")
def dataset():
    return setup.open_dataset(tiny.FLOAT.data, train=False)


def as_results(dataset, shift: float = 0.0) -> list[dict]:
    """The ground truth as a model's detections in COCO's form (x, y, w, h)."""
    return [
        {
            "image_id": row["image_id"],
            "category_id": row["category_id"],
            "bbox": [row["bbox"][0] + shift, *row["bbox"][1:]],
            "score": 0.75,
        }
        for row in dataset.coco_ground_truth()["annotations"]
    ]


def test_detections_equal_to_the_truth_are_drawn_on_it(dataset, monkeypatch):
    drawn = []
    monkeypatch.setattr(reporting, "detection_grid", lambda rows, *_, **__: drawn.extend(rows))
    models = {"teacher": as_results(dataset), "student": as_results(dataset, shift=3.0)}
    reporting.detection_picture(dataset, models, 2)
    assert len(drawn) == 2
    for _, panels in drawn:
        assert [panel[0] for panel in panels] == ["ground truth", "teacher", "student"]
        (_, truth, labels, no_scores), teacher, student = panels
        assert len(truth) > 0
        assert no_scores is None
        np.testing.assert_allclose(teacher[1], truth, atol=1e-3)
        np.testing.assert_allclose(student[1], np.add(truth, [3, 0, 3, 0]), atol=1e-3)
        for _, _, found, scores in (teacher, student):
            np.testing.assert_array_equal(found, labels)
            np.testing.assert_array_equal(scores, 0.75)


def test_attention_maps_stand_under_their_own_titles(dataset, monkeypatch):
    calls = []
    monkeypatch.setattr(
        reporting, "attention_grid", lambda image, *maps, titles, **_: calls.append((maps, titles))
    )
    teacher = tiny.bundle(seed=0)
    student = dataclasses.replace(tiny.bundle(seed=1), info={})
    pictures = reporting.attention_pictures(dataset, teacher, student, 1, ("float", "4-bit"))
    assert len(pictures) == 1
    ((teacher_map, student_map), titles) = calls[0]
    assert titles == ("float", "4-bit")
    with_objects = next(i for i in range(len(dataset)) if len(dataset[i].boxes))
    assert dataset.file_name(with_objects) in pictures[0]["title"]
    image = dataset[with_objects].image[None]
    for bundle, found in ((teacher, teacher_map), (student, student_map)):
        output = bundle.module().apply(bundle.variables, image, np.ones(image.shape[:3], bool))
        wanted = output.encoder_attention[-1].probabilities[0]
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(teacher_map - student_map).max() > 1e-4
