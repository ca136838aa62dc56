from __future__ import annotations

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from aqdetr_jax.checkpoint.model_folder import InputRule, load_model
from aqdetr_jax.data.dataset import ImageReadError
from aqdetr_jax.deploy.load import load
from aqdetr_jax.evaluation.predict import Detector

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def bundle(tiny_teacher):
    return dataclasses.replace(
        load_model(tiny_teacher), input=InputRule(((64, 64),), short_side=64, max_size=64)
    )


@pytest.fixture(scope="module")
def detector(bundle, quick_compile):
    return Detector(bundle)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """A landscape image: 48 x 100 pixels."""
    return np.random.default_rng(0).integers(0, 256, (48, 100, 3), np.uint8)


def same(a, b):
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.names, a.size) == (b.names, b.size)


def test_equals_the_model_applied_by_hand(bundle, detector, picture):
    """Resized by DETR's rule to 31 x 64, padded to the bucket; boxes in pixels of the original."""
    found = detector.predict(picture, threshold=0.0)
    resized = np.asarray(Image.fromarray(picture).resize((64, 31), Image.Resampling.BILINEAR))
    images, mask = np.zeros((1, 64, 64, 3), np.uint8), np.zeros((1, 64, 64), bool)
    images[0, :31], mask[0, :31] = resized, True
    output = jax.jit(bundle.module().apply)(bundle.variables, images, mask)
    logits = np.asarray(output.logits[-1, 0], np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = (odds / odds.sum(-1, keepdims=True))[:, :-1]
    order = np.argsort(-probabilities.max(-1), kind="stable")
    np.testing.assert_allclose(found.scores, probabilities.max(-1)[order], rtol=1e-4)
    np.testing.assert_array_equal(found.labels, probabilities.argmax(-1)[order])
    cx, cy, w, h = np.asarray(output.boxes[-1, 0], np.float64)[order].T
    boxes = np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1) * [100, 48, 100, 48]
    np.testing.assert_allclose(found.boxes, np.clip(boxes, 0, [100, 48, 100, 48]), atol=1e-2)
    assert found.size == (48, 100)
    assert found.names == tuple(bundle.class_names[k] for k in found.labels)


def test_every_kind_of_image_gives_the_same(detector, picture, tmp_path):
    wanted = detector.predict(picture, threshold=0.0)
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    data = buffer.getvalue()
    for image in (path, str(path), data, bytearray(data), Image.fromarray(picture), picture.copy()):
        same(detector.predict(image, threshold=0.0), wanted)
    same(detector.predict(jax.numpy.asarray(picture), threshold=0.0), wanted)


def test_grey_images(detector, picture):
    grey = picture[..., 0]
    wanted = detector.predict(np.stack([grey] * 3, -1), threshold=0.0)
    same(detector.predict(grey, threshold=0.0), wanted)
    same(detector.predict(Image.fromarray(grey), threshold=0.0), wanted)


def test_threshold(detector, picture):
    everything = detector.predict(picture, threshold=0.0)
    assert len(everything) == 12
    assert (np.diff(everything.scores) <= 0).all()
    limit = float(everything.scores[4])
    kept = detector.predict(picture, threshold=limit)
    assert len(kept) == int((everything.scores >= limit).sum()) >= 5
    np.testing.assert_array_equal(kept.boxes, everything.boxes[: len(kept)])
    nothing = detector.predict(picture, threshold=1.0)
    assert len(nothing) == 0
    assert nothing.boxes.shape == (0, 4)
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="threshold must be in"):
            detector.predict(picture, threshold=wrong)


def test_batches_of_any_size_give_the_same(detector, picture):
    rng = np.random.default_rng(1)
    others = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((64, 64), (90, 30), (20, 20))]
    images = [picture, *others]
    single = detector.predict_batch(images, threshold=0.0)
    batched = detector.predict_batch(images, threshold=0.0, batch_size=3)
    assert [p.size for p in batched] == [(48, 100), (64, 64), (90, 30), (20, 20)]
    for a, b in zip(single, batched, strict=True):
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4)
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-2)
    assert detector.predict_batch([]) == []


def test_prediction_as_json(detector, picture):
    found = detector.predict(picture, threshold=0.0)
    loaded = json.loads(json.dumps(found.to_dict()))
    assert loaded["size"] == [48, 100]
    assert len(loaded["detections"]) == len(found)
    first = loaded["detections"][0]
    assert first["name"] == found.names[0]
    np.testing.assert_array_equal(np.float32(first["box"]), found.boxes[0])


def test_budget_of_pixels(detector, picture, tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    with pytest.raises(ImageReadError, match=r"100x48 pixels .* budget of 4799; .*max_pixels"):
        detector.predict(path, max_pixels=4799)
    assert detector.predict(path, max_pixels=4800).size == (48, 100)


def test_unusable_images_are_named(detector, tmp_path):
    text = tmp_path / "notes.png"
    text.write_text("not an image")
    with pytest.raises(ImageReadError, match=r"notes\.png"):
        detector.predict(text)
    with pytest.raises(ImageReadError, match=r"absent\.png"):
        detector.predict(tmp_path / "absent.png")
    with pytest.raises(ImageReadError):
        detector.predict(b"not an image")


def test_load_takes_a_run_or_a_model_folder(tiny_teacher, picture):
    for folder in (tiny_teacher, tiny_teacher.parent):
        assert load(folder).class_names == load_model(tiny_teacher).class_names
