"""The max pooling after a ResNet's stem, with a gradient that a CPU is quick at."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import Array, lax

_PADDING = ((0, 0), (1, 1), (1, 1), (0, 0))
_TAPS = tuple((u, v) for u in range(3) for v in range(3))


@jax.custom_vjp
def max_pool(x: Array) -> Array:
    """3x3 maxima at every second row and column, ``[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), C]``.

    Padded by one, as torch's. Where several neighbours are the largest, the gradient is the first
    one's, row by row. XLA's form of that gradient is a loop over scalars on a CPU, five times as
    slow as the arrays below; accelerators have a form of their own.
    """
    return _windows(x)


def _windows(x: Array) -> Array:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), _PADDING)


def _max_pool_fwd(x):
    return _windows(x), x


def _max_pool_bwd(x, cotangent):
    def scattered(x, cotangent):
        return jax.vjp(_windows, x)[1](cotangent)[0]

    return (lax.platform_dependent(x, cotangent, cpu=by_winners, default=scattered),)


def by_winners(x: Array, cotangent: Array) -> Array:
    """``max_pool``'s gradient, from the number of the neighbour that each output took."""
    padded = jnp.pad(x, _PADDING, constant_values=-jnp.inf)
    rows, columns = (2 * ((n + 1) // 2) - 1 for n in x.shape[1:3])
    taps = [padded[:, u : u + rows : 2, v : v + columns : 2] for u, v in _TAPS]
    largest = taps[0]
    for tap in taps[1:]:
        largest = jnp.maximum(largest, tap)
    winner = jnp.full(largest.shape, len(taps) - 1, jnp.int8)
    for number in reversed(range(len(taps) - 1)):
        winner = jnp.where(taps[number] == largest, jnp.int8(number), winner)

    def won(wanted: Iterable[tuple[int, int]]) -> Array:
        """What the outputs hand to the inputs that are their (u, v)-th neighbours."""
        total = jnp.zeros((), cotangent.dtype)
        for u, v in wanted:
            part = jnp.where(winner == _TAPS.index((u, v)), cotangent, 0)
            down, right = int(u == 0), int(v == 0)  # neighbour 0 is the next output's
            part = jnp.pad(part[:, down:, right:], ((0, 0), (0, down), (0, right), (0, 0)))
            total += part
        return total

    # An even place is neighbour 1 of one output, an odd one 2 of one and 0 of the next.
    sides = ((1,), (2, 0))
    phases = [
        jnp.stack([won((u, v) for u in rows for v in columns) for columns in sides], axis=3)
        for rows in sides
    ]
    whole = jnp.stack(phases, axis=2)  # [B, rows, 2, columns, 2, C]
    batch, height, _, width, _, channels = whole.shape
    whole = whole.reshape(batch, 2 * height, 2 * width, channels)
    return whole[:, : x.shape[1], : x.shape[2]]


max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)
