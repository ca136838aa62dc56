"""Activations whose gradients need nothing but their outputs.

Differentiated as usual, a ReLU keeps its input (or a mask) and a softmax a float32 copy, beside the
outputs that the next operation keeps anyway. Those are most of the memory that a training step
moves; here the outputs serve, in the dtype that carries them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_vjp
def relu(x: Array) -> Array:
    """``max(x, 0)``, with gradient 0 at 0."""
    return jnp.maximum(x, 0)


def _relu_fwd(x):
    y = jnp.maximum(x, 0)
    return y, y


def _relu_bwd(y, cotangent):
    return (jnp.where(y > 0, cotangent, 0),)


relu.defvjp(_relu_fwd, _relu_bwd)


SIX = 6.0
"""Where ``relu6`` ends."""


@jax.custom_vjp
def relu6(x: Array) -> Array:
    """``min(max(x, 0), 6)``, with gradient 0 at 0 and at 6."""
    return jnp.clip(x, 0, SIX)


def _relu6_fwd(x):
    y = jnp.clip(x, 0, SIX)
    return y, y


def _relu6_bwd(y, cotangent):
    return (jnp.where((y > 0) & (y < SIX), cotangent, 0),)


relu6.defvjp(_relu6_fwd, _relu6_bwd)


@jax.custom_vjp
def softmax(x: Array) -> Array:
    """Softmax over the last axis, computed in float32 and returned in ``x``'s dtype."""
    return jax.nn.softmax(x.astype(jnp.float32), axis=-1).astype(x.dtype)


def _softmax_fwd(x):
    y = softmax(x)
    return y, y


def _softmax_bwd(y, cotangent):
    wide = y.astype(jnp.float32)
    product = wide * cotangent
    return ((product - wide * jnp.sum(product, axis=-1, keepdims=True)).astype(y.dtype),)


softmax.defvjp(_softmax_fwd, _softmax_bwd)
