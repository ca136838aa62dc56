"""Inputs that are centred per channel: statistics, steps, and what it pays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from aqdetr_jax.models.quantized import OBSERVED, QDense
from aqdetr_jax.quant.calibrate import (
    calibrated_parameters,
    channel_statistics,
    first_step,
    is_constant,
)
from aqdetr_jax.quant.policy import Policy, Rule
from aqdetr_jax.quant.record import OpRecord, recording
from aqdetr_jax.quant.spec import QuantSpec


def test_channel_statistics_by_hand():
    rng = np.random.default_rng(1)
    unit = rng.normal(size=(4, 4000))
    unit = (unit - unit.mean(1, keepdims=True)) / unit.std(1, keepdims=True)
    spread, mean = np.array([[1], [4], [2], [2]]), np.array([[5], [0], [-3], [0.5]])
    values = (unit * spread + mean).astype(np.float32)
    for exponent in (0.0, 0.5, 1.0):
        shift, scale = channel_statistics(values, exponent)
        np.testing.assert_allclose(shift, mean[:, 0], atol=1e-4)
        # The geometric mean of the spreads is 2.
        np.testing.assert_allclose(scale, (spread[:, 0] / 2) ** exponent, rtol=1e-4)
        assert shift.dtype == scale.dtype == np.float32


def test_a_constant_channel_is_shifted_and_not_blown_up():
    values = np.stack([np.full(100, 7), np.linspace(-1, 1, 100), np.linspace(-1, 1, 100)])
    shift, scale = channel_statistics(values.astype(np.float32), 1.0)
    assert shift[0] == 7
    np.testing.assert_allclose(scale[1] / scale[0], 10, rtol=1e-5)
    shift, scale = channel_statistics(np.zeros((3, 10), np.float32), 1.0)
    np.testing.assert_array_equal(shift, 0)
    np.testing.assert_allclose(scale, 1, rtol=1e-5)


def test_centred_steps_are_those_of_the_centred_operands():
    rng = np.random.default_rng(2)
    kernel = rng.normal(size=(3, 2)).astype(np.float32)
    values = (rng.normal(size=(3, 500)) * [[1], [8], [1]] + [[20], [0], [0]]).astype(np.float32)
    rows = [OpRecord("a", "dense", QuantSpec(4, granularity="channel"), QuantSpec(4), centred=3)]
    parameters = {
        "a/kernel": kernel,
        "a/kernel_step": np.ones(2, np.float32),
        "a/input_step": np.ones((), np.float32),
        "a/input_shift": np.zeros(3, np.float32),
        "a/input_scale": np.ones(3, np.float32),
    }
    out = calibrated_parameters(parameters, rows, {"a/input": values}, equalize=1.0)
    shift, scale = channel_statistics(values, 1.0)
    np.testing.assert_array_equal(out["a/input_shift"], shift)
    np.testing.assert_array_equal(out["a/input_scale"], scale)
    centred = ((values - shift[:, None]) / scale[:, None]).reshape(1, -1)
    want = first_step(centred, QuantSpec(4))[0][0]
    assert out["a/input_step"].shape == ()
    np.testing.assert_allclose(out["a/input_step"], want)
    want = first_step((kernel * scale[:, None]).T, QuantSpec(4, granularity="channel"))[0]
    np.testing.assert_allclose(out["a/kernel_step"], want)
    np.testing.assert_array_equal(out["a/kernel"], kernel)


def _calibrated_dense(x, kernel, center):
    """Output of a 4-bit dense layer calibrated on its own input, and of the float one."""
    policy = Policy("test", (Rule(".*", 4, 4, 4),), grid="centred" if center else "symmetric")
    layer = QDense(kernel.shape[1], policy)
    params = dict(layer.init(jax.random.key(0), x)["params"])
    params |= {"kernel": kernel, "bias": jnp.linspace(-1, 1, kernel.shape[1])}
    observer = layer.clone(policy=dataclasses.replace(policy, arithmetic="observe"))
    plain, seen = observer.apply({"params": params}, x, mutable=[OBSERVED])
    with recording() as rows:
        layer.apply({"params": params}, x)
    samples = {"/input": np.asarray(seen[OBSERVED]["input"])}
    flat = calibrated_parameters({f"/{k}": v for k, v in params.items()}, rows, samples, "mse", 0.7)
    params = {k.removeprefix("/"): v for k, v in flat.items()}
    # The shift and the scale alone change nothing.
    np.testing.assert_allclose(observer.apply({"params": params}, x), plain, rtol=2e-5, atol=2e-5)
    return layer.apply({"params": params}, x), plain


def test_centring_pays_where_channels_are_unequal():
    rng = np.random.default_rng(3)
    spread, mean = np.geomspace(0.3, 3, 16), rng.normal(size=16) * 3
    x = (rng.normal(size=(8, 40, 16)) * spread + mean).astype(np.float32)
    kernel = (rng.normal(size=(16, 10)) / spread[:, None]).astype(np.float32)
    errors = {}
    for center in (False, True):
        low, plain = _calibrated_dense(x, kernel, center)
        errors[center] = float(np.mean((low - plain) ** 2) / np.var(plain))
    assert errors[True] < 0.03
    assert errors[True] < errors[False] / 4


def test_rounding_errors_of_a_constant_are_no_spread():
    """What attends to values that are all alike: a step for its rounding errors has no biases."""
    rng = np.random.default_rng(0)
    constant = rng.normal(size=(6, 1)).astype(np.float32)
    noisy = (constant * (1 + rng.uniform(-2e-7, 2e-7, (6, 50)))).astype(np.float32)
    assert np.ptp(noisy, axis=1).any()
    assert is_constant(noisy).all()
    shift, scale = channel_statistics(noisy, 1.0)
    np.testing.assert_allclose(shift, constant[:, 0], rtol=1e-6)
    np.testing.assert_allclose(scale, 1, rtol=1e-5)
    moving = noisy.copy()
    moving[2] *= 1 + rng.normal(0, 1e-4, 50)
    np.testing.assert_array_equal(is_constant(moving), np.arange(6) != 2)
