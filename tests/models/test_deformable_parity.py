"""Deformable DETR against transformers' own: every stage, losses and gradients.

The fixtures are written by ``experiments/record_parity.py``: tiny models whose parameters and
statistics are all random, one batch of two images of unequal size.
"""

from __future__ import annotations

import parity_checks
import pytest

each = pytest.mark.parametrize("name", parity_checks.DEFORMABLE)
pytestmark = pytest.mark.usefixtures("quick_compile")


@each
def test_every_parameter_is_named_and_has_its_shape(name):
    parity_checks.check_names_and_shapes(name)


@each
def test_stages(name):
    parity_checks.check_stages(name)


@each
def test_losses(name):
    parity_checks.check_losses(name)


@each
def test_gradients(name):
    parity_checks.check_gradients(name)
