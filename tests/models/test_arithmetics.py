"""The trained integers are the deployed integers: whole models, bit for bit.

Compiled as users compile, not quickly: what XLA fuses is a matter of the last bit.
"""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import batch, model, variables_of


@pytest.mark.accelerator
@pytest.mark.parametrize(("name", "grid"), [("detr", "offset"), ("two_stage", "centred")])
def test_both_arithmetics_agree_on_the_whole_model(name, grid):
    # Moved grids, centring, aligned queries and renormalised attention included; all sums are far
    # below 2^24.
    options = {"grid": grid, "renormalize": True, "align_queries": True}
    variables, given = variables_of(name, "w4a4", **options), batch()
    fake = model(name, "w4a4", **options)(variables, *given)
    integer = model(name, "w4a4", arithmetic="integer", **options)(variables, *given)
    np.testing.assert_array_equal(fake.logits, integer.logits)
    np.testing.assert_array_equal(fake.boxes, integer.boxes)
    assert np.all(np.isfinite(fake.logits))
    # Not a saturated network: images, queries and layers differ.
    assert np.min(np.std(np.asarray(fake.logits), axis=1).max((1, 2))) > 0.01
    assert np.min(np.std(np.asarray(fake.logits), axis=2).max((1, 2))) > 0.01
