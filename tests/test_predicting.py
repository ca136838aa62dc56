"""A batch of images: each failure is one line, and nothing that is done is lost."""

from __future__ import annotations

import errno
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aqdetr_jax import predicting
from aqdetr_jax.evaluation.predict import Prediction
from aqdetr_jax.predicting import PredictError, predict_files, target_names

NAMES = ("cat", "dog")


def detector(names=NAMES, seen=None):
    """Stands in for a model: it finds one object of the second class in every image."""

    def predict(image, *, threshold):
        if seen is not None:
            seen.append(image)
        box = np.array([[1, 1, 5, 5]], np.float32)
        label, score = np.array([1], np.int32), np.array([0.75], np.float32)
        return Prediction(box, score, label, (names[1],), image.shape[:2])

    return SimpleNamespace(class_names=names, predict=predict)


@pytest.fixture
def seen(monkeypatch):
    """The images that reach the stand-in."""
    images: list[np.ndarray] = []
    monkeypatch.setattr(predicting, "load", lambda model: detector(seen=images))
    return images


def picture(path, value: int = 128):
    Image.fromarray(np.full((8, 9, 3), value, np.uint8)).save(path, "PNG")
    return str(path)


def results(out) -> dict[str, str]:
    """Image -> name of its file of detections, where its picture is there too."""
    found = {}
    for file in os.listdir(out):
        assert file.endswith((".detections.json", ".detections.png")), file  # nothing half-written
        if file.endswith(".json"):
            path = os.path.join(out, file)
            with open(path, encoding="utf-8") as stream:
                content = json.load(stream)
            with Image.open(f"{path.removesuffix('.json')}.png") as drawn:
                drawn.load()
            assert content["detections"][0]["name"] == "dog"
            assert content["image"] not in found
            found[content["image"]] = file
    return found


def test_one_bad_image_does_not_stop_the_others(seen, tmp_path, capsys):
    images = [picture(tmp_path / f"{i}.png") for i in range(3)]
    (tmp_path / "1.png").write_bytes(b"no image")
    images.insert(0, str(tmp_path / "gone.png"))
    out = tmp_path / "out"
    with pytest.raises(PredictError, match=r"2 of 4 images failed.*; 2 are in .*out"):
        predict_files(images, out, model="m")
    said = capsys.readouterr()
    assert results(out) == {images[1]: "0.detections.json", images[3]: "2.detections.json"}
    lines = said.err.splitlines()
    assert len(lines) == 2
    assert "gone.png: no such image file" in lines[0]
    assert "1.png: not an image file" in lines[1]
    assert len(said.out.splitlines()) == 2


def test_ctrl_c_keeps_what_is_done_and_says_what_is_not(seen, tmp_path, monkeypatch, capsys):
    images = [picture(tmp_path / f"{i}.png") for i in range(9)]
    (tmp_path / "0.png").write_bytes(b"no image")
    real = predicting.as_array

    def pressed(path, **options):
        if path == images[3]:
            raise KeyboardInterrupt
        return real(path, **options)

    monkeypatch.setattr(predicting, "as_array", pressed)
    with pytest.raises(PredictError) as caught:
        predict_files(images, tmp_path / "out", model="m")
    assert set(results(tmp_path / "out")) == set(images[1:3])
    text = str(caught.value)
    assert "stopped by Ctrl-C: 2 of 9 images are in" in text
    assert "1 failed; not done: " in text
    assert text.endswith(f"{', '.join(images[3:8])} and 1 more")


def test_names_in_several_folders(seen, tmp_path):
    """Numbered in the order given, whatever else is called so, and also if one cannot be read."""
    names = ["a/x.png", "b/x.png", "b/x_2.png", "c/X.jpg", "d/x.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(tmp_path / name)
    images = [str(tmp_path / name) for name in names]
    found = target_names(images, tmp_path / "not" / "yet")
    assert found == [f"{n}.detections" for n in ("x", "x_2", "x_2_2", "X_3", "x_4")]
    predict_files(images, tmp_path / "out", model="m")
    before = results(tmp_path / "out")
    assert set(before) == set(images)
    os.remove(images[0])
    with pytest.raises(PredictError):
        predict_files(images, tmp_path / "out", model="m")
    assert results(tmp_path / "out") == before


def test_many_images_of_one_name(tmp_path):
    names = target_names([f"{i}/image.png" for i in range(20_000)], tmp_path)
    assert len(set(names)) == 20_000
    assert names[-1] == "image_20000.detections"


# Not all file systems take every byte.
ANY_NAME = st.binary(min_size=1, max_size=255).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)
LONG_NAME = st.text("a\u00e9\u732b\U0001f408", min_size=60, max_size=255).map(
    lambda text: text.encode()[:255]
)


@settings(max_examples=40, deadline=None)
@given(names=st.lists(st.one_of(ANY_NAME, LONG_NAME), min_size=1, max_size=4, unique=True))
def test_names_of_any_bytes(names, tmp_path_factory):
    """What the file system takes as a name can be read, and its results written and printed."""
    folder = tmp_path_factory.mktemp("any")
    images = []
    for name in names:
        path = os.path.join(str(folder), os.fsdecode(name))
        try:
            images.append(picture(path))
        except OSError:
            continue
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predicting, "load", lambda model: detector())
        said = []
        # What a terminal of UTF-8 would refuse fails here.
        patch.setattr(
            predicting, "print", lambda text, **_: said.append(text.encode()), raising=False
        )
        predict_files(images, folder / "out", model="m")
    assert set(results(folder / "out") if images else ()) == set(images)
    assert len(said) == len(images)
    assert all(b"\n" not in line and b"\x1b" not in line for line in said)


def test_a_picture_that_cannot_be_made_leaves_the_detections(seen, tmp_path, monkeypatch, capsys):
    image = picture(tmp_path / "a.png")
    predict_files([image], tmp_path / "out", model="m")

    def full(path, data):
        if str(path).endswith(".png"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("aqdetr_jax.viz.png.write_bytes_atomic", full)
    with pytest.raises(PredictError, match="1 of 1 images failed"):
        predict_files([image], tmp_path / "out", model="m")
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.png: the picture could not be made" in line
    assert os.strerror(errno.ENOSPC) in line
    assert "the detections are in" in line
    assert os.listdir(tmp_path / "out") == ["a.detections.json"]  # no picture of another time


def test_what_concerns_all_images_is_said_once(seen, tmp_path):
    image = picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="threshold must be in"):
        predict_files([image], tmp_path / "out", model="m", threshold=2)
    with pytest.raises(NotADirectoryError, match=r"a\.png is not a folder: name another with"):
        predict_files([image], image, model="m")
    assert not seen
    with pytest.raises(PredictError):
        predict_files([image], tmp_path / "out", model="m", max_pixels=71)
    predict_files([image], tmp_path / "out", model="m", max_pixels=72)
    assert len(seen) == 1


def test_names_that_no_font_can_draw_are_explained(seen, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("aqdetr_jax.viz.fonts._system_fonts", lambda: ())
    cat, dog = "\u732b", "\u72ac"
    monkeypatch.setattr(predicting, "load", lambda model: detector((cat, dog)))
    predict_files([picture(tmp_path / "a.png")], tmp_path / "out", model="m")
    note = capsys.readouterr().out.splitlines()[-1]
    assert note.startswith("note: ")
    assert note.endswith(f": class 1 = {dog}")  # of those that were found
