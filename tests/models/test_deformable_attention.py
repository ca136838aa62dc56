"""Deformable attention by the TPU kernel: the other ways' numbers, in both arithmetics."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from aqdetr_jax.models.deformable_attention import DeformableAttention
from aqdetr_jax.quant.policy import stock_policy

SHAPES = ((6, 4), (3, 2))
OPTIONS = {"grid": "offset", "renormalize": True}


@functools.cache
def attention(sampling, arithmetic="fake"):
    """Two heads of 32 channels as in the official model: (outputs, gradients of a loss)."""
    rng = np.random.default_rng(0)
    cells = sum(h * w for h, w in SHAPES)
    x = rng.normal(size=(2, cells, 64)).astype("f4")
    reference = rng.uniform(size=(2, cells, 2, 2)).astype("f4")
    valid = np.arange(cells) < np.array([[cells], [cells - 3]])
    policy = stock_policy("w4a4", arithmetic=arithmetic, **OPTIONS)
    layer = DeformableAttention(64, 2, 2, 4, policy, sampling, remat=True)
    given = (reference, x, valid, SHAPES)
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, *given))

    def drawn(path, leaf):
        scale = 20 if path[-1].key.endswith("_offset") else 1  # in steps: 1 to 4
        return scale * rng.uniform(0.05, 0.2, leaf.shape).astype("f4")

    variables = jax.tree_util.tree_map_with_path(drawn, shapes)

    def run(variables, x):
        return layer.apply(variables, x, *given)[0]

    if arithmetic == "integer":
        return jax.jit(run)(variables, x), None
    cotangent = rng.normal(size=x.shape).astype("f4")

    def both(*arrays):
        out, pullback = jax.vjp(run, *arrays)
        return out, pullback(cotangent)

    return jax.jit(both)(variables, x)


@pytest.mark.usefixtures("quick_compile")
def test_the_kernel_is_the_gather_with_quantizers_their_steps_and_offsets():
    (out, gradient), (want, wanted) = attention("kernel"), attention("gather")
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-5)
    for (path, b), a in zip(
        jax.tree.leaves_with_path(wanted), jax.tree.leaves(gradient), strict=True
    ):
        # What an input's step gets is a small difference of large sums.
        atol = (1e-4 if "input_step" in str(path) else 1e-5) * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=str(path))
        if "core" in str(path) and ("step" in str(path) or "offset" in str(path)):
            assert np.all(np.asarray(b) != 0)


def test_both_arithmetics_agree_bit_for_bit_in_the_kernel():
    np.testing.assert_array_equal(attention("kernel")[0], attention("kernel", "integer")[0])


def test_auto_takes_the_kernel_on_a_tpu_alone():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 30, 64)).astype("f4")
    layer = DeformableAttention(64, 2, 2, 4, sampling="auto", remat=True)
    given = (x, np.full((1, 30, 2, 2), 0.5, "f4"), x, np.ones((1, 30), bool), SHAPES)
    variables = jax.eval_shape(lambda: layer.init(jax.random.key(0), *given))

    def run(variables):
        return layer.apply(variables, *given)[0]

    for platform, kernel in (("cpu", False), ("cuda", False), ("tpu", True)):
        text = jax.export.export(jax.jit(run), platforms=[platform])(variables).mlir_module()
        assert ("tpu_custom_call" in text) == kernel
        assert ("while" in text) != kernel


def test_what_the_kernel_cannot_take_is_an_error_where_it_was_asked_for():
    layer = DeformableAttention(32, 2, 2, 4, sampling="kernel", name="cross_attention")
    x = np.zeros((1, 30, 32), "f4")
    with pytest.raises(ValueError, match="sampling='kernel' cannot be: heads have 16 channels"):
        jax.eval_shape(
            lambda: layer.init(
                jax.random.key(0), x, np.zeros((1, 30, 2, 2)), x, np.ones((1, 30), bool), SHAPES
            )
        )
