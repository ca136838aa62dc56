"""Sizes that follow from the training set, against hand-computed ones."""

from __future__ import annotations

import dataclasses
import math

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.dataset import Record, RecordDataset, stack_boxes
from aqdetr_jax.training import sizing
from aqdetr_jax.training.config import ExperimentConfig, TrainConfig


class Sized(RecordDataset):
    """Images of given (height, width), each with boxes of one side, never read."""

    def __init__(self, sizes, side=40.0, boxes=1):
        box = (0.0, 0.0, side, side)
        truth = {"bbox": box, "area": side * side}
        records = [
            Record(
                i,
                f"{i}.png",
                *size,
                stack_boxes([box] * boxes),
                [0] * boxes,
                sizing.np.zeros(boxes, bool),
                (truth,) * boxes,
            )
            for i, size in enumerate(sizes, 1)
        ]
        super().__init__(name="sized", class_names=("a",), category_ids=(1,), records=records)

    def _load_image(self, index):
        raise NotImplementedError


def fit(dataset, most=320):
    return sizing.fitted(DataConfig(kind="auto", fit=most), dataset)


def test_photographs_of_blood_cells():
    """640 x 480 with boxes of 100 pixels: 16 of 0.18 of the root of the area, so the least size."""
    found = fit(Sized([(480, 640)] * 10, side=100.0))
    # 192 x 256 pixels are 221.7 squared, the most below 224 that three to four fills.
    assert found.buckets == found.eval_buckets == ((192, 256),)
    assert (found.eval_short_side, found.eval_max_size, found.fit) == (192, 256, 0)
    assert found.augment.scales == (160, 176, 192)
    assert found.augment.crop_resize == (192, 224, 256)
    assert found.augment.crop_size == (144, 192)


def test_small_boxes_ask_for_more_pixels_up_to_the_limit():
    # 16 / (30 / 640) = 341 pixels.
    square = [(640, 640)] * 4
    assert fit(Sized(square, side=30.0)).buckets == ((320, 320),)
    assert fit(Sized(square, side=30.0), most=640).buckets == ((320, 320),)  # 341 rounded down
    assert fit(Sized(square, side=20.0), most=640).buckets == ((512, 512),)
    assert fit(Sized(square, side=20.0), most=320).buckets == ((320, 320),)


def test_small_images_are_not_enlarged():
    assert fit(Sized([(100, 100)] * 4, side=5.0)).buckets == ((96, 96),)
    assert fit(Sized([(20, 20)] * 4, side=5.0)).buckets == ((32, 32),)


def test_every_frequent_orientation_has_a_bucket():
    mixed = [(480, 640)] * 60 + [(640, 480)] * 35 + [(600, 600)] * 5
    found = fit(Sized(mixed, side=100.0))
    assert found.buckets == ((192, 256), (256, 192))  # one square in twenty gets none
    assert (found.eval_short_side, found.eval_max_size) == (192, 256)


@given(
    ratio=st.floats(0.02, 50, allow_nan=False),
    side=st.integers(32, 1400),
)
def test_a_bucket_is_within_the_area_and_no_better_one_exists(ratio, side):
    height, width = sizing._bucket(ratio, side)
    assert height % 32 == width % 32 == 0
    assert 32 * 32 <= height * width <= max(side, 32) ** 2
    filled = min(height, width / ratio)
    for h in range(32, side**2 // 32 + 1, 32):  # brute force
        w = 32 * (side**2 // (32 * h))
        assert min(h, w / ratio) <= filled + 1e-9


def resolved(dataset, **model):
    config = ExperimentConfig(
        data=DataConfig(kind="auto", root="x", fit=320, max_boxes=0),
        model=dataclasses.replace(tiny.MODEL, num_classes=0, **model),
        train=TrainConfig(steps=10),
    )
    return sizing.with_data(config, dataset)


@pytest.mark.parametrize(
    ("boxes", "queries"),
    [(1, 20), (10, 20), (11, 30), (29, 60), (150, 300), (200, 300), (400, 400)],
)
def test_queries_have_room_for_twice_the_boxes(boxes, queries):
    config = resolved(Sized([(64, 64)], boxes=boxes), num_queries=0, num_auxiliary=-1)
    assert config.data.max_boxes == boxes
    assert config.model.num_queries == queries
    assert config.model.num_auxiliary == 2 * queries
    assert config.model.num_classes == 1


def test_what_is_pinned_stays():
    dataset = Sized([(64, 64)], boxes=5)
    config = resolved(dataset, num_queries=7, num_auxiliary=14)
    assert (config.model.num_queries, config.model.num_auxiliary) == (7, 14)
    assert sizing.with_data(config, dataset) == config  # a resolved configuration is one


@pytest.mark.parametrize(
    ("steps", "epochs", "wanted"),
    [(0, 2.5, 7), (5, 2.5, 5), (100, 2.5, 7), (9, 0.0, 9), (0, 0.001, 1)],
)
def test_steps_and_epochs_what_ends_first(steps, epochs, wanted):
    dataset = Sized([(64, 64)] * 16)
    config = ExperimentConfig(
        model=dataclasses.replace(tiny.MODEL, num_classes=1),
        train=TrainConfig(steps=steps, epochs=epochs, batch_size=6),
    )
    assert sizing.with_data(config, dataset).train.steps == wanted
    assert math.ceil(2.5 * 16 / 6) == 7


def test_neither_steps_nor_epochs():
    with pytest.raises(ValueError, match=r"train\.steps and config\.train\.epochs are both 0"):
        sizing.with_data(ExperimentConfig(model=tiny.MODEL), Sized([(64, 64)]))


def test_the_paragraph_says_what_was_chosen():
    dataset = Sized([(480, 640)] * 10, side=100.0, boxes=4)
    text = sizing.describe(resolved(dataset, num_queries=0, num_auxiliary=-1), dataset)
    for part in ("10 images (median 640x480)", "up to 4 boxes", "1 class (a)", "256x192", "20 obj"):
        assert part in text
