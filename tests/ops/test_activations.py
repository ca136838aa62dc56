"""ReLU, ReLU6 and softmax that keep their outputs: jax's values and gradients, in their dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqdetr_jax.ops.activations import relu, relu6, softmax

PAIRS = {
    "relu": (relu, jax.nn.relu),
    "relu6": (relu6, jax.nn.relu6),
    "softmax": (softmax, jax.nn.softmax),
}


def case(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 3, (4, 6, 9))
    x[0, 0] = 0
    x[1, 2, 5:] = -1e9  # padded keys
    x[2, :, 3] = -0.0
    x[3, :, 4] = 6.0
    x[3, :, 5] = 9.0
    return jnp.asarray(x, dtype), jnp.asarray(rng.normal(size=x.shape), dtype)


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_are_those_of_jax(name):
    x, cotangent = case(jnp.float32)
    (mine, by_mine), (theirs, by_theirs) = (jax.vjp(f, x) for f in PAIRS[name])
    np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_allclose(by_mine(cotangent)[0], by_theirs(cotangent)[0], atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_bfloat16_is_rounded_once_and_nothing_but_the_output_is_kept(name):
    x, cotangent = case(jnp.bfloat16)
    mine, theirs = PAIRS[name]
    out, pullback = jax.vjp(mine, x)
    wide, wide_pullback = jax.vjp(theirs, x.astype(jnp.float32))
    np.testing.assert_array_equal(out, wide.astype(jnp.bfloat16))
    (kept,) = jax.tree.leaves(pullback)
    assert (kept.dtype, kept.shape) == (jnp.bfloat16, x.shape)
    gradient, (reference,) = pullback(cotangent)[0], wide_pullback(cotangent.astype(jnp.float32))
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        gradient.astype(np.float32), reference, atol=0.02 * np.abs(reference).max()
    )
