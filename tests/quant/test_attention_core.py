"""The attention core, divided by the row sums of the quantized probabilities."""

import jax
import numpy as np
import pytest

from aqdetr_jax.models.attention import AttentionCore
from aqdetr_jax.models.quantized import OBSERVED
from aqdetr_jax.quant.policy import stock_policy

LIMITS = {"q": (-8, 7), "k": (-8, 7), "v": (-8, 7), "probs": (0, 15)}


def core_case():
    """Steps, and q, k, v [B, H, ., D]; values clip, and some rows have no probability left."""
    rng = np.random.default_rng(11)
    q, k, v = (rng.normal(size=(2, 3, n, 5)).astype(np.float32) for n in (4, 6, 6))
    q *= 2
    # A query of zeros looks at all six keys alike: 1/6 is less than half a step of 0.4.
    q[:, 0, 0] = 0
    steps = {n: rng.uniform(0.18, 0.3, (3, 1, 1)).astype(np.float32) for n in ("q", "k", "v")}
    steps["probs"] = np.float32([0.4, 0.03, 0.1]).reshape(3, 1, 1)
    return {f"{name}_step": step for name, step in steps.items()}, (q, k, v)


def np_grid(x, step, lower, upper):
    """LSQ's equations 1 to 3: v_hat, where v has a gradient, and d v_hat / d s."""
    ratio = np.float64(x) / np.float64(step)
    assert np.abs(ratio % 1 - 0.5).min() > 1e-5  # else float32 may round the other way
    code = np.rint(np.clip(ratio, lower, upper))
    inside = (ratio > lower) & (ratio < upper)
    return code * np.float64(step), inside, np.where(inside, code - ratio, code)


def np_core(params, q, k, v, cotangent, renormalize):
    """The core in float64 and its gradient by hand: (output [B, H, Q, D], gradients by name)."""
    x = {"q": q, "k": k, "v": v}
    grids = {n: np_grid(x[n], params[f"{n}_step"], *LIMITS[n]) for n in x}
    (q_hat, *_), (k_hat, *_), (v_hat, *_) = (grids[n] for n in "qkv")
    scores = np.einsum("bhqd,bhkd->bhqk", q_hat, k_hat) / np.sqrt(5)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    grids["probs"] = np_grid(p, params["probs_step"], *LIMITS["probs"])
    p_hat, p_inside, _ = grids["probs"]
    total = p_hat.sum(-1, keepdims=True)
    assert set((total == 0).any((0, 2, 3))) == {True, False}  # a head with such a row and one not
    divisor = np.ones_like(total)
    if renormalize:
        divisor = np.where(total == 0, np.float64(params["probs_step"]), total)
    out = np.einsum("bhqk,bhkd->bhqd", p_hat, v_hat) / divisor

    d_mixed = cotangent / divisor
    d_probs = np.einsum("bhqd,bhkd->bhqk", d_mixed, v_hat)
    if renormalize:  # 0 where nothing is left, for out is
        d_probs -= (d_mixed * out).sum(-1, keepdims=True)
    d_p = p_inside * d_probs
    d_scores = p * (d_p - (d_p * p).sum(-1, keepdims=True)) / np.sqrt(5)
    d_hat = {
        "q": np.einsum("bhqk,bhkd->bhqd", d_scores, k_hat),
        "k": np.einsum("bhqk,bhqd->bhkd", d_scores, q_hat),
        "v": np.einsum("bhqk,bhqd->bhkd", p_hat, d_mixed),
        "probs": d_probs,
    }
    gradients = {}
    for name, (_, inside, slope) in grids.items():
        if name in x:
            gradients[name] = inside * d_hat[name]
        factor = 1 / np.sqrt(slope[0, 0].size * LIMITS[name][1])
        by_step = (d_hat[name] * slope).sum((0, 2, 3)).reshape(3, 1, 1)
        gradients[f"{name}_step"] = factor * by_step
    return out, gradients


@pytest.mark.parametrize("renormalize", [False, True])
def test_core_and_its_gradient_restated(renormalize):
    params, inputs = core_case()
    module = AttentionCore(stock_policy("w4a4", renormalize=renormalize))
    cotangent = np.random.default_rng(12).normal(size=(2, 3, 4, 5))
    merged = np.float32(cotangent.transpose(0, 2, 1, 3).reshape(2, 4, 15))

    @jax.jit
    def run(params, inputs):
        def forward(params, inputs):
            return module.apply({"params": params}, *inputs, None, train=False)[0]

        out, pullback = jax.vjp(forward, params, inputs)
        return out, pullback(merged)

    out, (by_step, by_input) = run(params, inputs)
    wanted, gradients = np_core(params, *inputs, cotangent, renormalize)
    out = np.asarray(out).reshape(2, 4, 3, 5).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    np.testing.assert_array_equal(out[:, 0, 0], 0)  # nothing left to look at: no 0 / 0
    for name, mine in {**by_step, **dict(zip("qkv", by_input, strict=True))}.items():
        size = np.abs(gradients[name]).max()
        np.testing.assert_allclose(mine, gradients[name], rtol=1e-4, atol=1e-5 * size, err_msg=name)


def test_observe_does_not_renormalize():
    # The row sums of steps that are still to be found must not reach what calibration sees.
    params, (q, k, v) = core_case()
    module = AttentionCore(stock_policy("w4a4", arithmetic="observe", renormalize=True))
    (out, maps), seen = module.apply(
        {"params": params}, q, k, v, None, train=False, mutable=[OBSERVED]
    )
    scores = np.einsum("bhqd,bhkd->bhqk", q, k, dtype=np.float64) / np.sqrt(5)
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bhkd->bqhd", p, v).reshape(2, 4, 15)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_array_equal(maps.output, out)
    by_head = p.transpose(1, 0, 2, 3).reshape(3, -1)
    np.testing.assert_allclose(seen[OBSERVED]["probs"], by_head, atol=1e-6)
