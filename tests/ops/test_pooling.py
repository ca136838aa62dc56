"""The stem's pooling against XLA's own, forward and gradient, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from aqdetr_jax.ops.pooling import max_pool


def reference(x):
    """XLA's pooling, which jax differentiates by its own rule."""
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [(6, 8), (7, 8), (6, 5), (7, 5), (1, 2)])
def test_values_and_gradient_are_those_of_the_reference(size, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-2, 3, (2, *size, 3)), dtype)  # few values, many ties
    cotangent = jnp.asarray(rng.integers(1, 9, reference(x).shape), dtype)

    def both(x):
        return [
            (out, pullback(cotangent)[0])
            for out, pullback in (jax.vjp(f, x) for f in (max_pool, reference))
        ]

    mine, theirs = jax.jit(both)(x)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, b)
