"""Dropout whose mask is a function of the step's key, the image, the place and the position.

A key for every place would be a chain of scalar operations for each, which a TPU runs one by one,
and twice where a layer is computed again. Here one vector operation makes the keys of a step's
images (:func:`row_keys`); a place adds a constant of its own, and every element counts: a
counter-based generator (Salmon et al., SC 2011) as cheap as the mask's use, so that nothing random
is kept in memory. Keyed by the image's number in the global batch, a mask does not depend on the
devices, nor on the micro-batches, that share the batch.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import hashlib
import math
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


class _Draws:
    """The keys of a forward pass, and how often each place has drawn in it."""

    def __init__(self, keys: Array):
        self.keys = keys[:, 0], keys[:, 1]
        self.calls: collections.Counter[str] = collections.Counter()

    def constants(self, path: str) -> np.ndarray:
        """The constants uint32 [2] of this call of a place."""
        number = self.calls[path]
        self.calls[path] += 1
        digest = hashlib.blake2b(f"{path}:{number}".encode(), digest_size=8).digest()
        return np.frombuffer(digest, "<u4")


_draws: contextvars.ContextVar[_Draws | None] = contextvars.ContextVar("draws", default=None)


def row_keys(key: Array, batch: int) -> Array:
    """Keys of the images of a global batch, uint32 [B, 2], from the step's key."""
    return jax.random.bits(key, (batch, 2))


@contextlib.contextmanager
def drawing(keys: Array) -> Iterator[None]:
    """One forward pass that drops by these keys, to be opened inside of what is jitted.

    Args:
      keys: uint32 [B, 2], from :func:`row_keys`.
    """
    token = _draws.set(_Draws(keys))
    try:
        yield
    finally:
        _draws.reset(token)


def dropout(module: nn.Module, x: Array, rate: float, *, train: bool) -> Array:
    """Sets elements to 0 with probability ``rate`` (to within 2^-32), and scales up the others.

    Every call in a forward pass has a mask of its own, which its recomputation in the backward pass
    repeats.

    Args:
      module: where this is.
      x: [B * n, ...], the n rows of an image side by side.
      rate: in [0, 1].
      train: off otherwise.

    Raises:
      ValueError: there are no keys (see :func:`drawing`), or the rows are not theirs.
    """
    if not train or rate == 0:
        return x
    path, draws = "/".join(module.path), _draws.get()
    if draws is None:
        raise ValueError(f"{path} drops in training: it needs the keys of models.dropout.drawing")
    images = len(draws.keys[0])
    if x.shape[0] % images:
        raise ValueError(f"{path}: {x.shape[0]} rows are not of {images} images")
    bits = _bits(draws.keys, draws.constants(path), x.shape)
    kept = bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(kept, x / (1 - rate), 0) if rate < 1 else jnp.zeros_like(x)


def _bits(keys: tuple[Array, Array], constants: np.ndarray, shape: tuple[int, ...]) -> Array:
    """Random bits, uint32 of ``shape``, for two words uint32 [B] of B images and two of a place.

    The position within the image is hashed in three rounds of xor, shift and multiplication (C.
    Wellons' "triple32", public domain), with the first words before them and the second between
    them: one word alone would only permute the positions.
    """
    copies = shape[0] // len(keys[0])

    def along(axis: int) -> Array:
        return lax.broadcasted_iota(jnp.uint32, shape, axis)

    def with_word(x: Array, number: int) -> Array:
        # The constant first: joined to the key, it would be an array of its own for every place.
        each = jnp.repeat(keys[number], copies, axis=0) if copies > 1 else keys[number]
        return x ^ constants[number] ^ lax.broadcast_in_dim(each, shape, (0,))

    position = jnp.zeros(shape, jnp.uint32)
    for axis in range(1, len(shape)):
        position += along(axis) * np.uint32(math.prod(shape[axis + 1 :]))
    if copies > 1:
        position += along(0) % np.uint32(copies) * np.uint32(math.prod(shape[1:]))
    x = with_word(position, 0)
    x = (x ^ (x >> 17)) * np.uint32(0xED5AD4BB)
    x = with_word(x ^ (x >> 11), 1) * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * np.uint32(0x31848BAB)
    return x ^ (x >> 14)
