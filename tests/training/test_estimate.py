"""A run measured before it starts: the step that it will make, and how often."""

from __future__ import annotations

import dataclasses

import pytest
import tiny

from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.training.estimate import estimate

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("task", ["detect", "pretrain", "student"])
def test_each_kind_of_step_is_measured(task, tiny_teacher):
    config = tiny.student(tiny_teacher) if task == "student" else tiny.FLOAT
    if task == "pretrain":
        backbone = dataclasses.replace(tiny.BACKBONE, norm="batch")
        model = dataclasses.replace(tiny.MODEL, backbone=backbone)
        config = dataclasses.replace(config, task="pretrain", model=model)
    config = tiny.resolved(config)
    sets = [open_dataset(config.data, train=train) for train in (True, False)]
    found = estimate(config, *sets)
    assert found.steps == config.train.steps
    assert found.step > 0
    assert found.compiling > 0
    assert (found.evaluations > 0) == (task != "pretrain")  # which is not evaluated
