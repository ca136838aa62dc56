"""Integers of a few bits as bytes, without a bit lost or added.

The codes of an array are a stream of ``bits`` bits each, in C order, the lowest bit first: two
4-bit codes a byte (the first in the low nibble), four 2-bit codes a byte, eight 3-bit codes in
three bytes. Signed codes are stored as their distance from the grid's smallest, so that every bit
pattern is a code of the grid. The last byte is filled up with zeros.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from aqdetr_jax.quant.spec import SUPPORTED_BITS, packed_size


@dataclasses.dataclass(frozen=True)
class Codes:
    """Integers on a grid.

    Attributes:
      values: int8 (signed) or uint8, any shape.
      bits: word length.
    """

    values: np.ndarray
    bits: int

    @property
    def signed(self) -> bool:
        """Whether the grid is ``[-2^(b-1), 2^(b-1) - 1]``, else ``[0, 2^b - 1]``."""
        return self.values.dtype == np.int8


def pack(codes: Codes) -> np.ndarray:
    """The codes as uint8 ``[packed_size]``.

    Raises:
      ValueError: a code is outside the grid, or the type or word length is none of ours.
    """
    values, bits = codes.values, codes.bits
    if bits not in SUPPORTED_BITS or values.dtype not in (np.int8, np.uint8):
        raise ValueError(f"cannot pack {values.dtype} codes of {bits} bits")
    shifted = values.reshape(-1).astype(np.int16) + ((1 << bits - 1) if codes.signed else 0)
    if shifted.size and not 0 <= shifted.min() <= shifted.max() < 1 << bits:
        raise ValueError(f"a code is outside the grid of {bits} bits")
    return np.packbits(_bits_of(shifted.astype(np.uint8), bits), bitorder="little")


def unpack(data: np.ndarray, shape: tuple[int, ...], bits: int, *, signed: bool) -> Codes:
    """What ``pack`` packed.

    Args:
      data: uint8 ``[packed_size]``.
      shape: of the codes.
      bits: word length.
      signed: which grid.

    Raises:
      ValueError: the bytes are not those of that many codes.
    """
    count = math.prod(shape)
    if data.dtype != np.uint8 or data.shape != (packed_size(count, bits),):
        raise ValueError(
            f"{data.dtype}{list(data.shape)} are not the bytes of {count} codes of {bits} bits"
        )
    stream = np.unpackbits(data, bitorder="little")
    if stream[count * bits :].any():
        raise ValueError("bits after the last code are not zero")
    places = stream[: count * bits].reshape(count, bits)
    values = (places << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
    if signed:
        values = (values.astype(np.int16) - (1 << bits - 1)).astype(np.int8)
    return Codes(values.reshape(shape), bits)


def _bits_of(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [n] -> the lowest bits of each, lowest first, [n * bits] of 0 and 1."""
    return ((values[:, None] >> np.arange(bits, dtype=np.uint8)) & 1).reshape(-1)
