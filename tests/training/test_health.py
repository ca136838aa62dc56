"""Quantizers that are dead or saturated are found, and named."""

from __future__ import annotations

import logging

import jax
import numpy as np
import pytest
import tiny
from flax import traverse_util

from aqdetr_jax.models.detector import record_ops
from aqdetr_jax.models.grid_use import SAMPLES, GridUse, of_values
from aqdetr_jax.models.quantized import CODES
from aqdetr_jax.parallel.mesh import make_mesh, put_batch
from aqdetr_jax.quant.calibrate import site_specs, weight_specs
from aqdetr_jax.quant.spec import QuantSpec
from aqdetr_jax.training.health import QuantizerHealth, ailments
from aqdetr_jax.training.state import TrainState


@pytest.mark.parametrize(
    ("spec", "values", "clipped", "used", "constant"),
    [
        # Codes -2 .. 1: -1.6 is -2, 0.4 is 0, 1.6 rounds to 2 and is clipped.
        (QuantSpec(2), [-1.6, 0.4, 1.6, 1.4], 0.25, 0.75, 0),
        (QuantSpec(2), [-2.4, -2.6, 0.0, 0.0], 0.25, 0.5, 0),
        # Where the grid does the ReLU, what is below 0 is no loss.
        (QuantSpec(2, signed=False), [-9.0, 0.0, 3.4, 3.6], 0.25, 0.5, 0),
        (QuantSpec(4), [0.4, -0.4, 0.2, 0.0], 0.0, 1 / 16, 1),
        (QuantSpec(4), [90.0, 91.0, 92.0, 93.0], 1.0, 1 / 16, 1),
        # What never moves has nothing to lose.
        (QuantSpec(4), [0.0] * 4, 0.0, 1 / 16, 0),
        (QuantSpec(4), [3.0, 3.000001, 3.0, 3.0], 0.0, 1 / 16, 0),
    ],
)
def test_use_of_a_grid_by_hand(spec, values, clipped, used, constant):
    use = of_values(np.float32([values]), spec.lower, spec.upper, spec, rectified=not spec.signed)
    assert [float(x[0]) for x in use] == pytest.approx([clipped, used, constant])


def use(clipped, used, constant):
    return GridUse(*(np.float32(x) for x in (clipped, used, constant)))


def test_ailments_by_name():
    found = ailments(
        {
            "a/input": use([0.6], [0.5], [0]),
            "b/input": use([0.1], [1 / 16], [1]),
            "c/q": use([0.1, 0.7, 1.0], [0.5, 0.5, 0.1], [0, 0, 1]),
            "d/kernel": use([0.1], [1.0], [0.75]),
            "e/kernel": use([0.1], [1.0], [0.25]),
            "f/input": use([0.5], [0.1], [0]),
        }
    )
    assert found == {
        "a/input": "saturated",
        "b/input": "dead",
        "c/q (head 1)": "saturated",
        "c/q (head 2)": "dead",
        "d/kernel (75% of its channels)": "dead",
    }


def state_of(params, stats):
    return TrainState(0, params, stats, {}, None, 0, 0)


def test_a_look_at_a_model_is_that_of_all_its_codes(calibrated, caplog):
    config, module, _, variables, _ = calibrated
    train = tiny.dataclasses.replace(config.train, quantizers_every=3)
    config = tiny.dataclasses.replace(config, train=train)
    mesh = make_mesh()
    (batch,) = tiny.batches(config, 1)
    placed = put_batch({key: batch[key] for key in ("images", "mask")}, mesh)
    health = QuantizerHealth(config, module, mesh, "")
    assert [step for step in range(1, 8) if health.due(step)] == [3, 6]
    state = state_of(variables["params"], variables["batch_stats"])
    with caplog.at_level(logging.WARNING, logger="aqdetr_jax"):
        metrics = health.look(3, state, placed)
    assert metrics["quantizers/dead"] == 0, caplog.text
    _, seen = module.apply(variables, batch["images"], batch["mask"], mutable=[CODES])
    codes = traverse_util.flatten_dict(jax.device_get(seen[CODES]), sep="/")
    rows = record_ops(module, variables, (64, 64))
    specs = site_specs(rows)
    assert specs.keys() == codes.keys()
    small = 0
    for site, spec in specs.items():
        found = codes[site]
        if found.size > SAMPLES:
            continue
        small += 1
        heads = spec.granularity == "head"
        rows_of = np.moveaxis(found, 1, 0).reshape(found.shape[1], -1) if heads else found[None]
        used = np.mean([len(np.unique(row)) / spec.levels for row in rows_of])
        assert metrics[f"quantizers/{site}/used"] == pytest.approx(used), site
    assert small > len(specs) / 2
    names = {*specs, *weight_specs(rows)}
    assert metrics.keys() == {
        *(f"quantizers/{site}/{what}" for site in names for what in ("clipped", "used")),
        *("quantizers/dead", "quantizers/saturated"),
    }
    assert all(0 <= value <= 1 for name, value in metrics.items() if name.count("/") > 1)

    # One grid for values a thousand times as large, one for a thousandth.
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    ill = [site for site in specs if site.endswith("linear1/input")]
    broken = {**params, f"{ill[0]}_step": np.float32(1e4)}
    kernel = "decoder/layer_1/feed_forward/linear2/kernel"
    broken[f"{kernel}_step"] = params[f"{kernel}_step"] / 1e3
    state = state_of(traverse_util.unflatten_dict(broken, sep="/"), variables["batch_stats"])
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="aqdetr_jax"):
        changed = health.look(6, state, placed)
        told = caplog.text
        health.look(9, state, placed)
    assert caplog.text == told  # once
    assert "step 6: dead quantizers (all values have one code): " in told
    assert ill[0] in told
    assert "saturated quantizers (more than 50% of the values are clipped): " in told
    assert kernel in told
    assert changed["quantizers/dead"] >= metrics["quantizers/dead"] + 1
    assert changed[f"quantizers/{kernel}/clipped"] > 0.9


def test_a_float_model_has_nothing_to_look_at():
    health = QuantizerHealth(tiny.resolved(tiny.FLOAT), None, make_mesh(), "")
    assert not any(health.due(step) for step in range(5000))
