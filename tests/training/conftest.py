"""What the tests of the training package share."""

from __future__ import annotations

import pytest
import tiny

from aqdetr_jax.checkpoint.model_folder import load_model
from aqdetr_jax.training import initial, setup


@pytest.fixture(scope="module")
def calibrated(tiny_teacher, quick_compile):
    """(configuration, module, teacher, first variables of the student, load report)."""
    config = tiny.resolved(tiny.student(tiny_teacher))
    module = setup.build_module(config)
    teacher = load_model(tiny_teacher)
    variables, report = initial.initial_variables(config, module, teacher, tiny.batches(config, 1))
    return config, module, teacher, variables, report
