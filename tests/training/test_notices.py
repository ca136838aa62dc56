from __future__ import annotations

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from aqdetr_jax.data import resampling
from aqdetr_jax.data.coco import CocoFolder
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.host import LostError
from aqdetr_jax.training.notices import (
    TrainingDivergedError,
    check_step,
    counts_by_image,
    in_one_line,
    say_limits,
)

FINE = {"loss": 1.0, "gradient_norm": 2.0, "bad_in_a_row": 0.0}


def with_queries(objects: int, auxiliary: int, groups: int = 1, repeats: int = 3):
    model = dataclasses.replace(
        tiny.MODEL, num_queries=objects, num_auxiliary=auxiliary, auxiliary_groups=groups
    )
    config = dataclasses.replace(tiny.FLOAT, model=model)
    return dataclasses.replace(
        config, auxiliary=dataclasses.replace(config.auxiliary, repeats=repeats)
    )


@pytest.fixture
def folder(tmp_path):
    """One image: three boxes, one of them without area."""
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "a.png")
    boxes = [[1, 1, 5, 5], [2, 2, 9, 9], [4, 4, 0, 3], [3, 3, 4, 4]]
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 20, "height": 20}],
        "annotations": [
            {"id": i, "image_id": 7, "category_id": 1, "bbox": b, "area": b[2] * b[3]}
            for i, b in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    return CocoFolder(tmp_path, tmp_path / "a.json", split="some")


def test_left_out_boxes_and_too_few_queries_are_said(folder, capsys):
    say_limits(with_queries(2, 24, groups=3), folder, folder)
    text = capsys.readouterr()
    text = text.out + text.err
    assert "1 zero_area" in text
    assert "a.png" in text
    assert "annotation 2" in text
    assert "up to 3 boxes, more than the 2 object queries" in text
    assert "3 repeats of up to 3 boxes do not fit the 8 queries of a group" in text


def test_nothing_is_said_where_all_fits(capsys, monkeypatch):
    monkeypatch.setattr(resampling, "simd", resampling.simd or object())
    data = open_dataset(tiny.FLOAT.data, train=True)
    most = data.max_boxes_per_image()
    say_limits(with_queries(most, 2 * most, repeats=2), data, data)
    text = capsys.readouterr()
    assert text.out + text.err == ""


def test_the_slow_way_to_resize_is_said(folder, capsys, monkeypatch):
    monkeypatch.setattr(resampling, "simd", None)
    say_limits(with_queries(30, 0), folder, folder)
    assert "resized by Pillow" in capsys.readouterr().out


def test_replaced_costs_and_skipped_steps_are_logged(caplog):
    check_step(4, FINE, {"a": 0, "b": 0}, 0, 3)
    assert not caplog.records
    check_step(5, FINE, {"a": 0, "b": 3}, 0, 3)
    assert "step 5: non-finite matching costs replaced, by image id: {'b': 3}" in caplog.text
    caplog.clear()
    # Skipped between two logged steps: the metrics of the last one are fine.
    check_step(20, FINE, {"a": 0}, 2, 3)
    assert "2 steps before step 20 were skipped" in caplog.text
    caplog.clear()
    bad = {**FINE, "loss": float("nan"), "bad_in_a_row": 1.0}
    check_step(21, bad, {3: 0, 4: 0}, 1, 3, bad=["loss"])
    assert "step 21 skipped: loss not finite; image ids [3, 4]" in caplog.text
    caplog.clear()
    # Those before it are told by name too, as far as they are known.
    before = [(18, ["gradient of a/kernel"], [7, 8])]
    check_step(22, FINE, {1: 0}, 3, 3, earlier=before)
    assert "step 18 skipped: gradient of a/kernel not finite; image ids [7, 8]" in caplog.text
    assert "2 steps before step 22 were skipped" in caplog.text
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_too_many_bad_steps_end_the_run():
    bad = {**FINE, "loss": float("inf"), "bad_in_a_row": 3.0}
    with pytest.raises(TrainingDivergedError, match=r"3 steps in a row up to step 9.*loss.*lr"):
        check_step(9, bad, {1: 0}, 3, 3, bad=["loss"])
    check_step(9, bad, {1: 0}, 3, 4, bad=["loss"])


def test_counts_belong_to_images_by_name(monkeypatch):
    data = open_dataset(tiny.FLOAT.data, train=True)
    index, counts = np.array([5, 2, -1, 5]), np.array([1, 0, 7, 2])
    names = [data.image_id(i) for i in (5, 2)]
    assert counts_by_image(counts, index, data) == {names[0]: 3, names[1]: 0}
    assert counts_by_image(None, index, data) == {names[0]: 0, names[1]: 0}
    # The second of two processes reads the second half of the global batch.
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    both = np.array([9, 9, 9, 9, 1, 0, 7, 2])
    assert counts_by_image(both, index, data) == {names[0]: 3, names[1]: 0}


class Ended:
    """A watch that knows who has ended."""

    def lost(self) -> str:
        return "process 1 (there) ended without a word"


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_an_exchange_that_breaks_is_a_process_that_has_ended(monkeypatch, kind):
    broken = kind("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    assert in_one_line(broken, Ended(), "") is None  # alone, there is nobody to lose
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    told = in_one_line(broken, Ended(), "")
    assert isinstance(told, LostError)
    assert "process 1 (there) ended" in str(told)
    assert "Connection reset by peer" in str(told)


def test_an_error_of_the_users_waits_for_nobody(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for text in ("config.train.steps must not be negative", "a query of UNKNOWN: kind"):
        assert in_one_line(ValueError(text), Ended(), "") is None
