"""First step sizes: least squared error, percentiles, zero points, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqdetr_jax.models.quantized import QDense
from aqdetr_jax.quant.calibrate import (
    calibrated_parameters,
    first_step,
    merge_samples,
    site_specs,
    weight_specs,
)
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.quant.policy import Policy, stock_policy
from aqdetr_jax.quant.record import OpRecord
from aqdetr_jax.quant.spec import QuantSpec
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.initial import calibrate

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


def test_minmax_covers_everything_and_percentile_all_but_the_tails():
    values = np.float32([[-3, -1, 0.5, 1], [0.1, 0.2, 7.5, 1]])
    step, _ = first_step(values, QuantSpec(4), "minmax")
    np.testing.assert_allclose(step, [3 / 8, 7.5 / 7])
    step, _ = first_step(np.abs(values), QuantSpec(4, signed=False), "minmax")
    np.testing.assert_allclose(step, [3 / 15, 7.5 / 15])
    # Of grids that move: from -3 to 1 fifteen steps of 4/15, 0 the code 11 of them; a range that
    # is all positive begins with 0. With an offset it is the signed grid that is moved.
    step, zero = first_step(values, QuantSpec(4, signed=False, zero_point=True), "minmax")
    np.testing.assert_allclose(step, [4 / 15, 7.5 / 15])
    np.testing.assert_array_equal(zero, [11, 0])
    step, offset = first_step(values, QuantSpec(4, offset=True), "minmax")
    np.testing.assert_allclose(step, [4 / 15, 7.5 / 15])
    np.testing.assert_array_equal(offset, [-3, 8])
    values = np.linspace(-1, 3, 40001, dtype=np.float32)[None]
    step, zero = first_step(values, QuantSpec(8, signed=False, zero_point=True), "percentile")
    np.testing.assert_allclose(step, 4 * 0.998 / 255, rtol=1e-4)
    assert zero == np.rint(0.996 / step)[0]


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
@pytest.mark.parametrize("method", ["mse", "lsq", "percentile", "minmax"])
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
    OpRecord("b/residual", "add", None, QuantSpec(4), QuantSpec(4, signed=False)),
    OpRecord("c/residual", "add"),
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
    "b/branch_step": np.ones((), np.float32),
    "b/identity_step": np.ones((), np.float32),
}


def observed(rng=RNG):
    samples = {
        path: rng.normal(size=50).astype(np.float32)
        for path in ("a/input", "core/k", "core/probs", "core/v", "b/branch", "b/identity")
    }
    return {**samples, "core/q": rng.normal(size=(2, 50)).astype(np.float32) * [[1], [50]]}


def test_sites_of_a_recorded_pass():
    attention = {"core/q", "core/k", "core/probs", "core/v"}
    assert set(site_specs(ROWS)) == {"a/input", *attention, "b/branch", "b/identity"}
    assert site_specs(ROWS)["b/identity"] == QuantSpec(4, signed=False)
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


@pytest.mark.parametrize("bits", [2, 4])
def test_weights_that_start_at_zero_are_seen_when_they_have_grown(bits):
    """Sampling offsets start at zero; half of weights of a usual size must not round to it."""
    rows = [OpRecord("a", "dense", QuantSpec(bits, granularity="channel"))]
    fan_in = 256
    parameters = {
        "a/kernel": np.zeros((fan_in, 2), np.float32),
        "a/kernel_step": np.zeros(2, np.float32),
    }
    step = calibrated_parameters(parameters, rows, {})["a/kernel_step"]
    grown = RNG.uniform(-1, 1, (fan_in, 2)) / np.sqrt(fan_in)
    assert np.mean(np.round(grown / step) != 0) > 0.45
    # And as the model declares it, before any calibration.
    layer = QDense(2, stock_policy(f"w{bits}a{bits}"), kernel_init=jax.nn.initializers.zeros)
    declared = layer.init(jax.random.key(0), np.ones((1, fan_in), np.float32))["params"]
    np.testing.assert_allclose(declared["kernel_step"], step, rtol=1e-6)


def test_zero_points_are_written_beside_their_steps():
    zero_point = {"signed": False, "zero_point": True}
    head = QuantSpec(4, granularity="head", **zero_point)
    rows = [
        OpRecord("a", "dense", None, QuantSpec(4, **zero_point)),
        OpRecord("core", "scores", None, head, QuantSpec(4)),
        OpRecord("core", "mix", None, QuantSpec(4, signed=False), head),
    ]
    one, heads = np.ones((), np.float32), np.ones((2, 1, 1), np.float32)
    parameters = {"a/input_step": one, "a/input_zero": 0 * one}
    for site, start in (("q", heads), ("k", one), ("probs", one), ("v", heads)):
        parameters[f"core/{site}_step"] = start
    parameters |= {"core/q_zero": 0 * heads, "core/v_zero": 0 * heads}
    # Fifteen steps: of 0.2 from -1 to 2, where real zero is code 5, and of 0.1 from -1 to 0.5.
    codes = np.arange(16, dtype=np.float32)
    wide, narrow = codes * 0.2 - 1, codes * 0.1 - 1
    samples = {
        "a/input": wide,
        "core/q": np.stack([wide, narrow]),
        "core/k": wide,
        "core/probs": codes / 15,
        "core/v": np.stack([narrow, wide]),
    }
    out = calibrated_parameters(parameters, rows, samples)
    assert set(out) == set(parameters)  # no zero point for the others
    for path, steps, zeros in (
        ("a/input", 0.2, 5),
        ("core/q", [0.2, 0.1], [5, 10]),
        ("core/v", [0.1, 0.2], [10, 5]),
    ):
        step, zero = out[f"{path}_step"], out[f"{path}_zero"]
        shape = parameters[f"{path}_step"].shape
        assert step.shape == zero.shape == shape
        assert step.dtype == zero.dtype == np.float32
        np.testing.assert_allclose(step, np.reshape(steps, shape), rtol=1e-6)
        np.testing.assert_array_equal(zero, np.reshape(zeros, shape))


# --- several batches ---


@pytest.mark.parametrize("method", ["mse", "lsq", "percentile"])
def test_steps_come_from_all_batches(method):
    # Many small values and a few large ones: neither batch alone, nor the mean of both starts, is
    # the start of all values.
    rng = np.random.default_rng(3)
    batch = {path: np.tile(x, 40) for path, x in observed(rng).items()}
    another = {path: 6 * x for path, x in observed(rng).items()}

    def steps(*batches):
        return calibrated_parameters(PARAMETERS, ROWS, merge_samples(batches), method)

    first, second, both = steps(batch), steps(another), steps(batch, another)
    for path in batch:
        step = both[f"{path}_step"]
        assert np.all(step > 1.05 * first[f"{path}_step"]), path
        assert np.all(step < 0.95 * second[f"{path}_step"]), path
        if method == "lsq":
            values = np.concatenate([batch[path], another[path]], -1)
            upper = 15 if path in ("core/probs", "b/identity") else 7
            mean = np.abs(values).mean(-1).reshape(step.shape)
            np.testing.assert_allclose(step, 2 * mean / np.sqrt(upper), rtol=1e-5)
    # Weights are no matter of batches.
    np.testing.assert_array_equal(first["a/kernel_step"], both["a/kernel_step"])


class Pixels(nn.Module):
    """The least model that ``calibrate`` accepts: one dense layer on pixels from -1 to 4.1."""

    policy: Policy

    @nn.compact
    def __call__(self, images, mask):
        return QDense(2, self.policy, name="fc")(images.astype(jnp.float32) / 50 - 1)


def pixels(*values):
    """A training batch of one image that holds these values."""
    images = np.resize(np.uint8(values), (1, 4, 4, 3))
    return {"images": images, "size": np.array([[4, 4]], np.int32)}


def calibrated_pixels(batches, count, **options):
    """(module, its calibrated parameters)."""
    quant = QuantConfig("w4a4", calibration_batches=count, **options)
    module = Pixels(quant.build())
    variables = module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3), jnp.uint8), None)
    config = ExperimentConfig(quant=quant)
    return module, calibrate(config, module, variables, batches)["params"]["fc"]


def test_calibration_reads_as_many_batches_as_it_is_told():
    dark, bright, unread = pixels(0, 30, 50), pixels(100, 150, 200, 250), pixels(255)

    def step(*batches, count=2):
        params = calibrated_pixels(batches, count, calibration_method="lsq")[1]
        return params["input_step"]

    mean_dark = np.abs([-1, -0.4, 0]).mean()
    mean_bright = np.mean([1, 2, 3, 4])
    for got, mean in (
        (step(dark, bright, unread), (mean_dark + mean_bright) / 2),
        (step(bright, dark, unread), (mean_dark + mean_bright) / 2),
        (step(dark, bright, unread, count=1), mean_dark),
        (step(bright, dark, unread, count=1), mean_bright),
    ):
        np.testing.assert_allclose(got, 2 * mean / np.sqrt(7), rtol=1e-6)


def test_a_calibrated_zero_point_covers_its_range():
    batch = pixels(*range(0, 151, 10))
    module, params = calibrated_pixels([batch], 1, grid="zero_point")
    np.testing.assert_allclose(params["input_step"], 0.2, rtol=1e-6)
    assert params["input_zero"] == 5
    # All values lie on the grid: only the weights are rounded.
    w_hat = np.rint(np.clip(params["kernel"] / params["kernel_step"], -8, 7))
    expected = (batch["images"] / 50 - 1) @ (w_hat * params["kernel_step"])
    out = module.apply({"params": {"fc": params}}, batch["images"], None)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("grid", ["symmetric", "offset", "centred"])
def test_minmax_sees_every_value(grid):
    """One pixel in 30 000, which no sample need hold: all grids reach it."""
    images = np.full((1, 100, 100, 3), 60, np.uint8)
    images[0, :, ::2] = 40
    images[0, 7, 7] = 250, 240, 230
    batch = {"images": images, "size": np.array([[100, 100]], np.int32)}
    seen = {
        method: calibrated_pixels([batch], 1, grid=grid, calibration_method=method, equalize=0.0)[1]
        for method in ("mse", "minmax")
    }
    steps = {method: float(params["input_step"]) for method, params in seen.items()}
    if grid == "centred":
        # Means of about 0 in all channels; the largest value of any is 4 above it.
        top = 4 - float(seen["minmax"]["input_shift"][0])
        np.testing.assert_allclose(steps["minmax"], top / 7, rtol=1e-6)
    else:
        levels = 7 if grid == "symmetric" else 15
        lowest = 0 if grid == "symmetric" else -0.2
        np.testing.assert_allclose(steps["minmax"], (4 - lowest) / levels, rtol=1e-6)
    assert steps["mse"] < steps["minmax"]
    if grid == "offset":
        # Zero is code 1 of 0..15 from the lower end on: 8 - 1 steps up from the middle.
        assert seen["minmax"]["input_offset"] == 7
