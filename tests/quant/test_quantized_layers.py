"""Quantized layers: which channel, head or image a step belongs to, and the ReLU before a grid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqdetr_jax.models.attention import AttentionCore
from aqdetr_jax.models.quantized import OBSERVED, QConv, QDense
from aqdetr_jax.quant import lsq
from aqdetr_jax.quant.policy import stock_policy

# All sizes equal: a step on the wrong axis has the right shape here and must show otherwise.
SQUARE = 4
W4A4 = stock_policy("w4a4")


@functools.cache
def square_layer(kind):
    """(apply, variables, x): a layer whose batch, tokens and channels are all four."""
    rng = np.random.default_rng(7)
    if kind == "dense":
        module, shape = QDense(SQUARE, W4A4), (SQUARE,) * 3
    else:
        module, shape = QConv(SQUARE, (1, 1), W4A4, unsigned=False), (SQUARE,) * 4
    x = rng.normal(size=shape).astype(np.float32)
    variables = module.init(jax.random.key(0), x)
    return jax.jit(module.apply), variables, x


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_weight_steps_belong_to_output_channels(kind):
    apply, variables, x = square_layer(kind)
    params = variables["params"]
    assert params["kernel_step"].shape == (SQUARE,)
    assert params["input_step"].shape == ()
    before = apply(variables, x)
    for channel in range(SQUARE):
        steps = params["kernel_step"].at[channel].multiply(3.0)
        after = apply({"params": {**params, "kernel_step": steps}}, x)
        changed = np.any(np.asarray(after != before), axis=tuple(range(x.ndim - 1)))
        np.testing.assert_array_equal(changed, np.arange(SQUARE) == channel)
    # LSQ's start, channel by channel.
    kernel = np.asarray(params["kernel"]).reshape(-1, SQUARE)
    np.testing.assert_allclose(
        params["kernel_step"], 2 * np.abs(kernel).mean(0) / np.sqrt(7), rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_batch_order_does_not_matter(kind):
    apply, variables, x = square_layer(kind)
    order = [2, 0, 3, 1]
    np.testing.assert_array_equal(apply(variables, x[order]), apply(variables, x)[jnp.array(order)])


def test_attention_steps_belong_to_heads():
    rng = np.random.default_rng(8)
    q, k, v = rng.normal(size=(3, *(SQUARE,) * 4)).astype(np.float32)
    module = AttentionCore(W4A4)
    apply = jax.jit(lambda variables, q: module.apply(variables, q, k, v, None, train=False)[0])
    variables = module.init(jax.random.key(0), q, k, v, None, train=False)
    params = variables["params"]
    before = np.asarray(apply(variables, q)).reshape(SQUARE, SQUARE, SQUARE, SQUARE)
    assert set(params) == {"q_step", "k_step", "probs_step", "v_step"}
    for name, steps in params.items():
        assert steps.shape == (SQUARE, 1, 1)
        for head in range(SQUARE):
            other = {"params": {**params, name: steps.at[head].multiply(0.3)}}
            after = np.asarray(apply(other, q)).reshape(before.shape)  # [B, Q, H, D]
            changed = np.any(after != before, axis=(0, 1, 3))
            np.testing.assert_array_equal(changed, np.arange(SQUARE) == head)


def test_gradient_factors_count_one_example():
    # g = 1 / sqrt(N Qp): N = elements of one example (or weights of one channel), not the batch.
    rng = np.random.default_rng(9)
    tokens, inputs, outputs = 3, 6, 5
    module = QDense(outputs, W4A4)
    x = rng.normal(size=(2, tokens, inputs)).astype(np.float32)
    variables = module.init(jax.random.key(0), x)
    params = {**variables["params"], "input_step": jnp.float32(0.3)}
    gradient = jax.jit(jax.grad(lambda p, x: jnp.sum(module.apply({"params": p}, x))))

    got = gradient(params, x)
    kernel, steps = params["kernel"], params["kernel_step"]
    w_hat = lsq.fake_quantize(kernel, steps, -8.0, 7.0)
    x_hat = lsq.fake_quantize(x, params["input_step"], -8.0, 7.0)
    to_x = jnp.broadcast_to(w_hat.sum(1), x.shape)
    to_w = jnp.broadcast_to(x_hat.sum((0, 1))[:, None], kernel.shape)
    g_x, g_w = 1 / np.sqrt(tokens * inputs * 7), 1 / np.sqrt(inputs * 7)
    for name, expected in (
        ("input_step", lsq.vjp(x, params["input_step"], -8.0, 7.0, g_x, to_x)[1]),
        ("kernel_step", lsq.vjp(kernel, steps, -8.0, 7.0, g_w, to_w)[1]),
    ):
        np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-5)
    twice = gradient(params, np.concatenate([x, x]))
    np.testing.assert_allclose(twice["input_step"], 2 * got["input_step"], rtol=1e-4)


def test_gradient_factor_of_a_head_counts_its_own_elements():
    rng = np.random.default_rng(10)
    q, k, v = (rng.normal(size=(2, 3, n, 5)).astype(np.float32) for n in (4, 6, 6))
    module = AttentionCore(W4A4)
    params = module.init(jax.random.key(0), q, k, v, None, train=False)["params"]

    def loss(params):
        return jnp.sum(module.apply({"params": params}, q, k, v, None, train=False)[0] ** 2)

    def plain(params):
        # The same core with g = 1, from lsq alone.
        q_hat, k_hat, v_hat = (
            lsq.fake_quantize(x, params[f"{n}_step"], -8.0, 7.0)
            for n, x in (("q", q), ("k", k), ("v", v))
        )
        scores = jnp.einsum("bhqd,bhkd->bhqk", q_hat, k_hat) / np.sqrt(5)
        weights = lsq.fake_quantize(jax.nn.softmax(scores), params["probs_step"], 0.0, 15.0)
        return jnp.sum(jnp.einsum("bhqk,bhkd->bhqd", weights, v_hat) ** 2)

    got, expected = jax.jit(lambda p: (jax.grad(loss)(p), jax.grad(plain)(p)))(params)
    for name, count, upper in (("q", 20, 7), ("k", 30, 7), ("v", 30, 7), ("probs", 24, 15)):
        mine, reference = got[f"{name}_step"], expected[f"{name}_step"]
        assert np.any(np.asarray(reference) != 0)
        np.testing.assert_allclose(
            mine, reference / np.sqrt(count * upper), rtol=1e-3, atol=1e-6, err_msg=name
        )


RECTIFIED = {
    "quantized": stock_policy("w4a4"),
    "zero_point": stock_policy("w4a4", grid="zero_point"),
    "observed": stock_policy("w4a4", arithmetic="observe"),
    "float": stock_policy("float"),
}


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("policy", RECTIFIED)
def test_a_rectified_layer_is_the_layer_of_the_relu(policy, kind):
    layer = functools.partial(QDense, 5) if kind == "dense" else functools.partial(QConv, 5, (3, 3))
    plain, rectified = (
        layer(policy=RECTIFIED[policy], **options)
        for options in ({"unsigned": True}, {"rectified": True})
    )
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 4, 4, 6)).astype(np.float32)
    variables = rectified.init(jax.random.key(0), x)
    cotangent = rng.normal(size=(2, 4, 4, 5)).astype(np.float32)

    def run(apply):
        out, pullback = jax.vjp(apply, variables, x)
        return out, *pullback(cotangent)

    got, expected = jax.jit(
        lambda: (run(rectified.apply), run(lambda v, x: plain.apply(v, jax.nn.relu(x))))
    )()
    for mine, reference in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, reference, rtol=1e-6, atol=1e-6)
    assert policy != "quantized" or np.any(np.asarray(got[1]["params"]["input_step"]))


def test_calibration_sees_the_relu_of_a_rectified_input():
    x = np.random.default_rng(4).normal(size=(2, 6)).astype(np.float32)
    module = QDense(3, stock_policy("w4a4", arithmetic="observe"), rectified=True)
    variables = module.init(jax.random.key(0), x)
    _, seen = module.apply(variables, x, mutable=[OBSERVED])
    np.testing.assert_array_equal(np.sort(seen[OBSERVED]["input"]), np.sort(x.clip(0).ravel()))
