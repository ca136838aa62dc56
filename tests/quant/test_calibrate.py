"""First step sizes: least squared error, percentiles, zero points, and what is refused."""

import numpy as np
import pytest

from aqdetr_jax.quant.calibrate import (
    calibrated_parameters,
    first_step,
    merge_samples,
    site_specs,
    weight_specs,
)
from aqdetr_jax.quant.record import OpRecord
from aqdetr_jax.quant.spec import QuantSpec

RNG = np.random.default_rng(0)
SAMPLES = {
    "gaussian": (RNG.normal(size=(2, 3000)), True),
    "heavy_tailed": (RNG.standard_t(2, size=(2, 3000)), True),
    "after_relu": (np.maximum(RNG.normal(size=(2, 3000)), 0), False),
    "probabilities": (RNG.dirichlet(np.full(300, 0.05), size=(2, 10)).reshape(2, -1), False),
}


def squared_error(values, step, spec, zero=0.0):
    step = np.asarray(step, np.float64)[:, None]
    zero = np.asarray(zero, np.float64).reshape(-1, 1)
    codes = np.rint(np.clip(values / step, spec.lower - zero, spec.upper - zero))
    return np.mean((codes * step - values) ** 2, axis=1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", SAMPLES)
def test_mse_start_is_the_best_of_the_three(name, bits):
    values, signed = SAMPLES[name]
    values = values.astype(np.float32)
    spec = QuantSpec(bits, signed)
    errors = {
        method: squared_error(values, first_step(values, spec, method)[0], spec)
        for method in ("mse", "lsq", "percentile")
    }
    # The search is a grid of steps 6 % apart: allow what that can cost near a flat optimum.
    assert np.all(errors["mse"] <= 1.01 * errors["lsq"])
    assert np.all(errors["mse"] <= 1.01 * errors["percentile"])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", SAMPLES)
def test_mse_start_is_near_the_brute_force_optimum(name, bits):
    values, signed = SAMPLES[name]
    values = values.astype(np.float32)
    spec = QuantSpec(bits, signed)
    top = np.abs(values).max(1) / spec.upper
    brute = np.min(
        [squared_error(values, top * f, spec) for f in np.geomspace(0.005, 2.1, 1200)], axis=0
    )
    assert np.all(squared_error(values, first_step(values, spec)[0], spec) <= 1.03 * brute)


def test_values_on_a_grid_keep_it():
    codes = np.arange(-8, 8, dtype=np.float32)
    values = np.stack([codes * 0.37, codes * 11.0])
    steps, zeros = first_step(values, QuantSpec(4))
    np.testing.assert_allclose(steps, [0.37, 11.0], rtol=1e-6)
    np.testing.assert_array_equal(zeros, 0)


def test_lsq_and_percentile_formulas():
    values = np.array([[1.0, -3.0, 2.0, -2.0]], np.float32)
    step, _ = first_step(values, QuantSpec(4), "lsq")
    np.testing.assert_allclose(step, 2 * 2 / np.sqrt(7), rtol=1e-6)
    values = np.linspace(-1, 1, 20001, dtype=np.float32)[None]
    step, _ = first_step(values, QuantSpec(8), "percentile")
    np.testing.assert_allclose(step, 0.999 / 127, rtol=1e-3)
    with pytest.raises(ValueError, match="unknown calibration method 'max'"):
        first_step(values, QuantSpec(8), "max")


@pytest.mark.parametrize("shift", [-3.0, 0.0, 1.5, 10.0])
def test_zero_points_are_integers_inside_the_grid(shift):
    values = RNG.normal(size=(1, 2000)).astype(np.float32) + np.float32(shift)
    spec = QuantSpec(4, signed=False, zero_point=True)
    step, zero = first_step(values, spec)
    assert zero == np.rint(zero)
    assert 0 <= zero[0] <= 15
    if shift == 10.0:  # all positive: real zero stays on the grid as its lowest code
        assert zero[0] == 0
    symmetric = first_step(values, QuantSpec(4))[0]
    error = squared_error(values, step, QuantSpec(4, signed=False), zero)
    assert error <= 1.05 * squared_error(values, symmetric, QuantSpec(4))


def test_zero_point_grid_of_an_asymmetric_range_by_hand():
    # Fifteen steps of 0.2 from -1 to 2: real zero is code 5, and nothing need be clipped.
    values = (np.arange(16, dtype=np.float32) * 0.2 - 1.0)[None]
    step, zero = first_step(values, QuantSpec(4, signed=False, zero_point=True))
    np.testing.assert_allclose(step, 0.2, rtol=1e-6)
    assert zero[0] == 5


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(4, signed=False, zero_point=True)])
@pytest.mark.parametrize("method", ["mse", "lsq", "percentile"])
def test_a_site_of_zeros_gets_a_positive_step(spec, method):
    step, zero = first_step(np.zeros((2, 5), np.float32), spec, method)
    assert np.all(step > 0)
    assert np.all(np.isfinite(step))
    np.testing.assert_array_equal(zero, 0)


ROWS = [
    OpRecord("a", "dense", QuantSpec(4, granularity="channel"), QuantSpec(4)),
    OpRecord("n", "norm"),
    OpRecord("core", "scores", None, QuantSpec(4, granularity="head"), QuantSpec(4)),
    OpRecord("core", "mix", None, QuantSpec(4, signed=False), QuantSpec(4)),
    OpRecord("head", "dense"),
]
PARAMETERS = {
    "a/kernel": RNG.normal(size=(5, 3)).astype(np.float32) * [1, 10, 100],
    "a/kernel_step": np.ones(3, np.float32),
    "a/input_step": np.ones((), np.float32),
    "core/q_step": np.ones((2, 1, 1), np.float32),
    "core/k_step": np.ones((), np.float32),
    "core/probs_step": np.ones((), np.float32),
    "core/v_step": np.ones((), np.float32),
    "head/kernel": np.ones((3, 2), np.float32),
}


def observed():
    samples = {
        path: RNG.normal(size=50).astype(np.float32)
        for path in ("a/input", "core/k", "core/probs", "core/v")
    }
    return {**samples, "core/q": RNG.normal(size=(2, 50)).astype(np.float32) * [[1], [50]]}


def test_sites_of_a_recorded_pass():
    assert set(site_specs(ROWS)) == {"a/input", "core/q", "core/k", "core/probs", "core/v"}
    assert set(weight_specs(ROWS)) == {"a/kernel"}


def test_every_step_is_set_and_nothing_else():
    out = calibrated_parameters(PARAMETERS, ROWS, observed())
    assert set(out) == set(PARAMETERS)
    for path, value in PARAMETERS.items():
        assert out[path].shape == value.shape
        if path.endswith("_step"):
            assert out[path].dtype == np.float32
            assert np.all(out[path] != 1)
        else:
            np.testing.assert_array_equal(out[path], value)
    # Rows belong to channels and heads: the scales 1, 10, 100 and 1, 50 must come back.
    assert np.all(np.diff(out["a/kernel_step"]) > 0)
    assert 20 < out["core/q_step"][1, 0, 0] / out["core/q_step"][0, 0, 0] < 120


def test_errors_name_the_site():
    samples = observed()
    del samples["core/k"]
    with pytest.raises(ValueError, match="never reached the quantization site core/k"):
        calibrated_parameters(PARAMETERS, ROWS, samples)
    samples = observed()
    samples["core/v"][3] = np.nan
    with pytest.raises(ValueError, match="non-finite values at the quantization site core/v"):
        calibrated_parameters(PARAMETERS, ROWS, samples)


def test_samples_of_batches_are_joined_per_head():
    joined = merge_samples([{"x": np.zeros((2, 3)), "y": np.zeros(4)}, {"x": np.ones((2, 5))}])
    assert joined["x"].shape == (2, 8)
    assert joined["y"].shape == (4,)
    np.testing.assert_array_equal(joined["x"][:, 3:], 1)


@pytest.mark.parametrize("method", ["mse", "lsq", "percentile"])
def test_a_row_of_zeros_gets_a_step_that_can_still_learn(method):
    values = np.stack([np.zeros(50, np.float32), np.linspace(-1, 1, 50, dtype=np.float32)])
    spec = QuantSpec(4)
    steps, _ = first_step(values, spec, method)
    assert steps[0] == np.float32(2 / np.sqrt(7))
    assert 0 < steps[1] < 1
