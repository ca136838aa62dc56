"""Sizes that follow from the training set and the devices, against hand-computed ones."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import tiny
from sized import Sized

from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.training import sizing
from aqdetr_jax.training.config import ExperimentConfig, MeshConfig, OptimizerConfig, TrainConfig
from aqdetr_jax.training.experiment import load_experiment


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
    ("platform", "capability", "wanted"),
    [
        ("tpu", None, "bfloat16"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "12.0", "bfloat16"),
        ("gpu", "7.5", "float32"),
        ("cpu", None, "float32"),
    ],
)
def test_dtype_follows_from_the_device_unless_it_is_given(platform, capability, wanted):
    device = SimpleNamespace(platform=platform)
    if capability:
        device.compute_capability = capability
    config = ExperimentConfig(model=dataclasses.replace(tiny.MODEL, dtype="auto"))
    assert sizing.with_devices(config, device).model.dtype == wanted
    for given in ("float32", "bfloat16"):
        pinned = ExperimentConfig(model=dataclasses.replace(tiny.MODEL, dtype=given))
        assert sizing.with_devices(pinned, device) == pinned


def test_an_open_dtype_is_said_and_filled_in_with_the_data(capsys):
    config = ExperimentConfig(
        model=dataclasses.replace(tiny.MODEL, num_classes=1, dtype="auto"),
        train=TrainConfig(steps=1),
    )
    found = sizing.with_data(config, Sized([(64, 64)]))
    assert found.model.dtype == "float32"  # on the CPU of the tests
    sizing.say_sizes(config, found, Sized([(64, 64)]))
    assert "Activations are float32 on this cpu (config.model.dtype)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"model\.dtype='auto' is open"):
        _ = config.model.carrier


def test_unknown_dtype():
    with pytest.raises(ValueError, match="must be 'float32', 'bfloat16' or 'auto', got 'float16'"):
        dataclasses.replace(tiny.MODEL, dtype="float16")


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


# --- the batch and its rates ---------------------------------------------------------------------


def batch_of(chips, train, model=None, **optimizer):
    config = ExperimentConfig(
        model=model or tiny.MODEL,
        quant=QuantConfig("w4a4"),
        optimizer=OptimizerConfig(lr=1e-4, lr_backbone=1e-5, lr_steps=1e-3, **optimizer),
        train=TrainConfig(steps=10, **train),
    )
    return config, sizing.with_batch(config, chips)


@pytest.mark.parametrize(
    ("chips", "train", "batch", "evaluated"),
    [
        (16, {"batch_per_chip": 8, "eval_batch_per_chip": 4}, 128, 64),
        (4, {"batch_per_chip": 2, "accumulate": 4, "eval_batch_size": 6}, 32, 6),
        (8, {"batch_size": 64, "accumulate": 2}, 64, 50),
    ],
)
def test_batch_by_devices_and_micro_batches(chips, train, batch, evaluated):
    _, config = batch_of(chips, train)
    assert (config.train.batch_size, config.train.eval_batch_size) == (batch, evaluated)
    assert config.train.accumulate == train.get("accumulate", 1)
    assert sizing.with_batch(config, chips) == config  # resolved is resolved, and says no more
    assert config.train.batch_per_chip == config.train.eval_batch_per_chip == 0


@pytest.mark.parametrize(("rule", "factor"), [("sqrt", 2**0.5), ("linear", 2.0)])
def test_rates_follow_the_batch_by_the_rule(rule, factor):
    given, config = batch_of(
        16, {"batch_per_chip": 8, "accumulate": 1}, reference_batch=64, batch_rule=rule
    )
    for name in ("lr", "lr_backbone", "lr_steps"):
        assert getattr(config.optimizer, name) == pytest.approx(
            factor * getattr(given.optimizer, name)
        )
    assert sizing.with_batch(config, 16) == config  # not once more
    told = sizing.describe_batch(given, config)
    assert "128 images a step, 8 on each of 16 devices" in told
    ratio = {"sqrt": "0.000141 = 0.0001 x sqrt(128/64)", "linear": "0.0002 = 0.0001 x 128/64"}
    assert told.endswith(f"learning rate {ratio[rule]}")


def test_rates_that_nothing_reads_stay():
    """A resolved configuration is one that can be given again: no key in it is idle."""
    float_config = ExperimentConfig(
        model=tiny.MODEL,
        optimizer=OptimizerConfig(frozen=("backbone/",), reference_batch=8),
        train=TrainConfig(steps=1, batch_size=32),
    )
    optimizer = sizing.with_batch(float_config, 1).optimizer
    default = OptimizerConfig()
    assert optimizer.lr == 2 * default.lr
    assert (optimizer.lr_backbone, optimizer.lr_steps) == (default.lr_backbone, default.lr_steps)


def test_nothing_is_said_of_a_plain_batch():
    assert sizing.describe_batch(*batch_of(4, {"batch_size": 8})) == ""


@pytest.mark.parametrize(
    ("chips", "train", "message"),
    [
        (256, {"batch_size": 64}, "=64 images are too few for 256 devices along 'data': use a"),
        (8, {"batch_size": 12}, "=12 images cannot be shared evenly by 8 devices"),
        (8, {"batch_size": 72, "accumulate": 2}, r"accumulate=2: use a multiple of 16"),
        (1, {"batch_size": 6, "accumulate": 4}, r"evenly by 1 device along 'data' with"),
    ],
)
def test_batches_that_cannot_be_shared(chips, train, message):
    with pytest.raises(ValueError, match=message):
        batch_of(chips, train)


def test_steps_follow_from_the_resolved_batch():
    config = ExperimentConfig(
        model=dataclasses.replace(tiny.MODEL, num_classes=1),
        train=TrainConfig(epochs=2.5, batch_per_chip=2, accumulate=3),
        mesh=MeshConfig(data=1),
    )
    resolved = sizing.with_data(config, Sized([(64, 64)] * 16))
    assert (resolved.train.batch_size, resolved.train.steps) == (6, 7)


def test_images_a_chip_on_the_command_line():
    """Of the batch and its images a chip, what the command line gives counts."""
    config = load_experiment("coco:r50,float", ("train.batch_size=48", "train.eval_batch_size=6"))
    assert sizing.with_batch(config, 16).train.batch_size == 48
    assert sizing.eval_batch_size(config) == 6
    config = load_experiment("shapes_teacher", ("train.batch_per_chip=3",))
    assert sizing.with_batch(config, 4).train.batch_size == 12
