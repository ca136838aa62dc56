"""Sizes that follow from the training set, against hand-computed ones."""

from __future__ import annotations

import dataclasses
import math

import pytest
import tiny
from sized import Sized

from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.training import sizing
from aqdetr_jax.training.config import ExperimentConfig, TrainConfig


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
    assert config.model.num_auxiliary == max(2 * queries, 3 * boxes)  # K = 3 repeats
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
    for part in (
        "10 images (median 640x480)",
        "up to 4 boxes",
        "1 class (a)",
        "128x96",
        "20 obj",
        "4 boxes;",
    ):
        assert part in text
