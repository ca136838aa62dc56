"""DETR against transformers' own: every stage, losses and gradients that it once computed.

The fixtures are written by ``experiments/record_parity.py``: tiny models whose parameters and
statistics are all random, one batch of two images of unequal size.
"""

from __future__ import annotations

import numpy as np
import parity_checks
import pytest

each = pytest.mark.parametrize("name", parity_checks.DETR)
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


def test_variants_differ_as_they_should():
    """DC5 has four times the tokens of the same images; basic blocks have two convolutions."""
    tokens = {
        name: parity_checks.theirs(name)["output"]["valid"].shape[1]
        for name in ("detr_dc5", "detr_basic")
    }
    assert tokens == {"detr_dc5": 48, "detr_basic": 12}
    state = parity_checks.theirs("detr_basic")["state"]
    assert not [key for key in state if "layer.2.convolution" in key]
    dilated = parity_checks.theirs("detr_dc5")["output"]["backbone_4"]
    assert dilated.shape[1:3] == (6, 8)
    assert np.isfinite(dilated).all()
