"""A training state with all kinds of leaves, and the comparison of two."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aqdetr_jax.trees import flatten


class State(NamedTuple):
    step: int
    params: dict
    optimizer: tuple
    ema_decay: float
    key_data: jax.Array


def make_state(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "dense": {
            "kernel": jnp.asarray(rng.normal(size=(3, 5)), jnp.float32),
            "half": jnp.asarray(rng.normal(size=(7,)), jnp.bfloat16),
        },
        "packed": jnp.asarray(rng.integers(-128, 127, size=(4, 2)), jnp.int8),
        "step_size": jnp.float32(rng.uniform()),
    }
    optimizer = optax.adamw(1e-3).init(params)
    return State(seed, params, optimizer, 0.1 + seed, jax.random.key_data(jax.random.key(seed)))


def assert_bit_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), (_, b) in zip(flatten(left), flatten(right), strict=True):
        assert type(a) is type(b), path
        assert np.asarray(a).dtype == np.asarray(b).dtype, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
