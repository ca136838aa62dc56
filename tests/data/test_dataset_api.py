"""The common dataset interface: cleaning of boxes, ground truth, loading by name."""

import math

import numpy as np
import pytest

from aqdetr_jax.data.dataset import (
    BoxCollector,
    DatasetError,
    Record,
    ground_truth_from_records,
    json_digest,
    stack_boxes,
)
from aqdetr_jax.data.open import load_dataset


def test_box_cleaning_counts_and_names_offenders():
    collector = BoxCollector()
    assert collector.clean((1, 2, 3, 4), 10, 10, "a").tolist() == [1, 2, 3, 4]
    assert collector.clean((-5, 2, 30, 4), 10, 20, "b").tolist() == [0, 2, 20, 4]
    assert collector.clean((1, 2, 1, 4), 10, 10, "c, annotation 7") is None
    assert collector.clean((3, 2, 1, 4), 10, 10, "d") is None
    assert collector.clean((1, math.nan, 2, 4), 10, 10, "e") is None
    assert collector.clean((1, 1, math.inf, 4), 10, 10, "f") is None
    assert collector.clean((50, 1, 60, 4), 10, 10, "g") is None
    assert collector.clean((1, 1, 10**400, -(10**400)), 10, 10, "h") is None
    assert collector.examples[-1] == "non_finite: h: box (1, 1, inf, -inf)"
    assert collector.clean((1, 1, 1e39, 4), 10, 10, "i") is None  # No float32.
    assert dict(collector.drops) == {
        "zero_area": 1,
        "negative": 1,
        "non_finite": 4,
        "outside": 1,
    }
    assert collector.clipped == 1
    assert collector.examples[0] == "zero_area: c, annotation 7: box (1, 2, 1, 4)"


def test_ground_truth_ids_start_at_one_and_use_original_categories():
    record = Record(
        image_id="x",
        file_name="x.png",
        height=4,
        width=6,
        boxes=stack_boxes([(0, 0, 2, 3)]),
        labels=np.array([1], np.int32),
        iscrowd=np.array([True]),
        annotations=({"bbox": (0, 0, 2, 3), "area": 6},),
    )
    truth = ground_truth_from_records([record], ["a", "b"], [3, 90])
    assert truth["annotations"] == [
        {
            "id": 1,
            "image_id": "x",
            "category_id": 90,
            "bbox": [0.0, 0.0, 2.0, 3.0],
            "area": 6.0,
            "iscrowd": 1,
            "ignore": 1,
        }
    ]
    assert json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1})
    assert stack_boxes([]).shape == (0, 4)


def test_unknown_kind_names_the_nearest():
    with pytest.raises(DatasetError, match="did you mean 'coco'"):
        load_dataset("cocco")
    with pytest.raises(DatasetError, match="unknown dataset kind 'zzz'"):
        load_dataset("zzz")


def test_wrong_parameters_are_named():
    with pytest.raises(DatasetError, match=r"'voc'.*wrong.*parameters: root, split"):
        load_dataset("voc", wrong=1, root=".")
    with pytest.raises(DatasetError, match="unknown parameter 'clutterr'"):
        load_dataset("shapes", clutterr=1)
    assert len(load_dataset("shapes", split="validation", num_images=3)) == 3
