"""The trained integers are the deployed integers: whole models, bit for bit.

Compiled as users compile, not quickly: what XLA fuses is a matter of the last bit.
"""

from __future__ import annotations

import numpy as np
import pytest
import tiny_deformable
import tiny_detr

# Zero points, centring and renormalised attention included; all sums are far below 2^24.
OPTIONS = {"zero_point": True, "renormalize": True, "center": True}


def detr(arithmetic):
    variables, given = tiny_detr.variables_of("w4a4", **OPTIONS), tiny_detr.padded(tiny_detr.BUCKET)
    return tiny_detr.model("w4a4", arithmetic=arithmetic, **OPTIONS)(variables, *given)


def deformable(name):
    def run(arithmetic):
        variables = tiny_deformable.variables_of(name, "w4a4", **OPTIONS)
        model = tiny_deformable.model(name, "w4a4", arithmetic=arithmetic, **OPTIONS)
        return model(variables, *tiny_deformable.batch())

    return run


@pytest.mark.parametrize(
    "run", [detr, deformable("plain"), deformable("two_stage")], ids=["detr", "plain", "two_stage"]
)
def test_both_arithmetics_agree_on_the_whole_model(run):
    fake, integer = run("fake"), run("integer")
    np.testing.assert_array_equal(fake.logits, integer.logits)
    np.testing.assert_array_equal(fake.boxes, integer.boxes)
    assert np.all(np.isfinite(fake.logits))
    # Not a saturated network: images, queries and layers differ.
    logits = np.asarray(fake.logits)
    assert np.min(np.std(logits, axis=2).max((1, 2))) > 0.01
    assert np.min(np.std(logits, axis=1).max((1, 2))) > 0.01
