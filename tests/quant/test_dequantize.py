"""Weights on their grids: by hand, and bit by bit those that the quantized layers multiply with."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqdetr_jax.models import quantized
from aqdetr_jax.models.quantized import QConv, QDense
from aqdetr_jax.quant import lsq
from aqdetr_jax.quant.dequantize import dequantized_parameters
from aqdetr_jax.quant.policy import Policy, Rule, stock_policy
from aqdetr_jax.quant.product import quantized_product
from aqdetr_jax.quant.record import OpRecord, recording
from aqdetr_jax.quant.spec import QuantSpec

WEIGHTS = Policy("weights", (Rule(".*", 4, None, None),))


def rows_of(layer, params, x):
    """The layer's records, under the path "layer"."""
    with recording() as rows:
        jax.eval_shape(lambda: layer.apply({"params": params}, x))
    return [dataclasses.replace(row, path="layer") for row in rows]


def without_grids(layer, params, x):
    found = dequantized_parameters(
        {f"layer/{name}": value for name, value in params.items()}, rows_of(layer, params, x)
    )
    return {path.removeprefix("layer/"): value for path, value in found.items()}


def test_by_hand():
    """Two channels of 3 bits, codes -4 to 3: rounding half to even, clipping, own steps."""
    kernel = np.float32([[0.3, 5.0], [0.75, -0.9], [-9.0, 2.1], [1.25, -7.0]])
    steps = np.float32([0.5, 2.0])
    codes = [[1, 2], [2, 0], [-4, 1], [2, -4]]  # 1.5 to 2, 2.5 to 2; -18 to -4, -3.5 to -4
    parameters = {
        "a/kernel": kernel,
        "a/kernel_step": steps,
        "a/input_step": np.float32(0.1),
        "a/bias": np.float32([1, 2]),
        "core/q_step": np.ones((2, 1, 1), np.float32),
        "core/q_zero": np.ones((2, 1, 1), np.float32),
        "b/kernel": kernel,
        "norm/scale": np.float32([3]),
    }
    rows = [OpRecord("a", "dense", QuantSpec(3, granularity="channel")), OpRecord("b", "dense")]
    found = dequantized_parameters(parameters, rows)
    assert found.keys() == {"a/kernel", "a/bias", "b/kernel", "norm/scale"}
    np.testing.assert_array_equal(found["a/kernel"], np.float32(codes) * steps)
    assert found["a/kernel"].dtype == np.float32
    for path in ("a/bias", "b/kernel", "norm/scale"):
        np.testing.assert_array_equal(found[path], parameters[path])


def test_weights_half_way_between_codes_go_where_the_layer_puts_them():
    """The unit matrix through the compiled layer gives its weights: the same bits."""
    rng = np.random.default_rng(0)
    steps = rng.uniform(0.01, 1, 200).astype(np.float32)
    codes = rng.integers(-8, 7, (32, 200)) + np.float32(0.5)
    kernel = codes * steps
    params = {"kernel": kernel, "bias": np.zeros(200, np.float32), "kernel_step": steps}
    x, layer = np.eye(32, dtype=np.float32), QDense(200, WEIGHTS)
    used = jax.jit(layer.apply)({"params": params}, x)
    np.testing.assert_array_equal(without_grids(layer, params, x)["kernel"], used)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("kind", ["dense", "unsigned", "conv"])
def test_layers_with_activations_left_float(kind, center, monkeypatch):
    """A w4a4 layer whose input goes past its grid is the float layer of the exported weights."""
    rng = np.random.default_rng(1)
    policy = stock_policy("w4a4", grid="centred" if center else "symmetric")
    x = rng.normal(3, 2, (2, 5, 6, 8)).astype(np.float32)
    kernel = rng.normal(size=(8, 7)).astype(np.float32)
    params = {"kernel": kernel, "bias": rng.normal(size=7).astype(np.float32)}
    if kind == "conv":
        layer, plain = (QConv(7, (3, 3), p, use_bias=True) for p in (policy, Policy()))
        params["kernel"] = rng.normal(size=(3, 3, 8, 7)).astype(np.float32)
    else:
        layer, plain = (QDense(7, p, unsigned=kind == "unsigned") for p in (policy, Policy()))
    quantized_params = {
        **params,
        "kernel_step": rng.uniform(0.1, 0.3, 7).astype(np.float32),
        "input_step": np.float32(0.2),
    }
    if center and kind == "dense":
        quantized_params["input_shift"] = rng.normal(3, 1, 8).astype(np.float32)
        quantized_params["input_scale"] = rng.uniform(0.5, 2, 8).astype(np.float32)

    def weights_only(contraction, a, b, _, quantizer, arithmetic):
        return quantized_product(contraction, a, b, None, quantizer, arithmetic)

    given = without_grids(layer, quantized_params, x)
    assert given.keys() == params.keys()
    monkeypatch.setattr(quantized, "quantized_product", weights_only)
    monkeypatch.setattr(lsq, "round_bias", lambda bias, unit: bias)
    want = layer.apply({"params": quantized_params}, jnp.asarray(x))
    found = plain.apply({"params": given}, jnp.asarray(x))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-4)
    float_output = plain.apply({"params": params}, jnp.asarray(x))
    assert np.abs(float_output - want).max() > 0.1
    if not (center and kind == "dense"):
        codes = given["kernel"] / quantized_params["kernel_step"]
        np.testing.assert_allclose(codes, np.rint(codes), atol=1e-5)
        assert codes.min() == -8
        assert codes.max() == pytest.approx(7)
