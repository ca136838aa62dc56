"""Which number types carry the codes of a product, chip by chip; and the products in them.

Codes of a few bits fit many types, and a product of codes is the same integers in each of them that
holds the codes and the sums. Which one is fast is the chip's affair, and ``CHIPS`` says it:

* GPUs and TPUs v5e, v5p and v6e multiply integers at a rate of their own, if both are signed and of
  one type. A grid that does not fit is moved by a whole number, ``a = a' + s``, and the products
  with ``s``, ``s * sum_k b``, are added to the sums: an int32 a channel, part of the bias.
* TPU v4 and, again, tpu7x and what came with it multiply floats only. float8 (e4m3) holds every
  integer from -16 to 16, bfloat16 from -256 to 256.
* A CPU multiplies matrices of int8 faster than those of float32 (1.3 to 1.9 times, measured with
  AVX-512 VNNI), and convolutions of more than one tap faster in float32 (2 to 20 times for few
  channels; XLA's integer convolution is slower still).

Float sums are exact while they do not exceed 2^24 in magnitude, in whatever order they are taken;
a sum that could is taken in parts, which int32 adds up. That a chip's matrix unit sums products of
integers in float32 without rounding below 2^24 is its maker's claim of float32 sums; no chip was
asked.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from aqdetr_jax.quant.contractions import Contraction, Conv, Dense, Mix, MixSamples, Scores

logger = logging.getLogger(__name__)

Range = tuple[int | np.ndarray, int | np.ndarray]
"""Smallest and largest code of an operand; whole numbers, or arrays that broadcast against it and
have one element along the axis that is summed over ([H, 1, 1]: a grid a head)."""

EXACT_FLOAT = 1 << 24
"""Every integer up to it is a float32."""


@dataclasses.dataclass(frozen=True)
class Carrier:
    """A number type of both operands of a product.

    Attributes:
      name: as XLA writes it.
      dtype: of the operands.
      lower: it holds every integer from here
      upper: to here.
      sums: dtype of the sums.
    """

    name: str
    dtype: DTypeLike
    lower: int
    upper: int
    sums: DTypeLike

    @property
    def integer(self) -> bool:
        """Whether sums are taken in int32."""
        return self.sums == jnp.int32

    def shift(self, codes: Range) -> int | np.ndarray | None:
        """What to take from codes so that the type holds them; None if nothing helps.

        0 if it holds them as they are; else a grid's middle, so that 2^b codes become those of the
        signed grid of b bits.
        """
        low, high = _span(codes)
        if self.lower <= low and high <= self.upper:
            return 0
        bits = int(np.max(np.asarray(codes[1]) - np.asarray(codes[0]))).bit_length()
        middle = codes[0] + (1 << bits >> 1)
        low, high = _span(_minus(codes, middle))
        return middle if self.lower <= low and high <= self.upper else None


S4 = Carrier("s4", jnp.int4, -8, 7, jnp.int32)
S8 = Carrier("s8", jnp.int8, -128, 127, jnp.int32)
F8 = Carrier("f8e4m3fn", jnp.float8_e4m3fn, -16, 16, jnp.float32)
BF16 = Carrier("bf16", jnp.bfloat16, -256, 256, jnp.float32)
F32 = Carrier("f32", jnp.float32, -EXACT_FLOAT, EXACT_FLOAT, jnp.float32)

CHIPS: dict[str, tuple[Carrier, ...]] = {
    "cpu": (S8,),
    "gpu": (S8,),
    "v4": (BF16,),
    "v5e": (S4, S8),
    "v5p": (S4, S8),
    "v6e": (S4, S8),
    "tpu7x": (F8, BF16),
    "tpu8i": (F8, BF16),
    "tpu": (BF16,),
}
"""The carriers of each kind of chip, best first. "tpu" is one of an unknown kind: every TPU
multiplies bfloat16. Of a CPU see ``_carriers``."""

UNKNOWN_TPU = "tpu"

DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU8i": "tpu8i",
}
"""``device_kind`` of JAX's devices -> our name. Whole names only: of a chip that is not here
nothing is known, whatever its name resembles."""


def chip_of(device: Any) -> str:
    """The key in ``CHIPS`` of a JAX device, or of a device of a topology.

    A TPU of a kind that is not known gets carriers that every TPU has, and the log says so.

    Raises:
      ValueError: neither a CPU, a GPU nor a TPU.
    """
    if device.platform == "tpu":
        if device.device_kind in DEVICE_KINDS:
            return DEVICE_KINDS[device.device_kind]
        logger.warning(
            "%r is no TPU whose integer products are known (%s): its codes are carried in "
            "bfloat16, which every TPU multiplies exactly",
            device.device_kind,
            ", ".join(DEVICE_KINDS),
        )
        return UNKNOWN_TPU
    if device.platform in ("gpu", "cuda", "rocm"):
        return "gpu"
    if device.platform == "cpu":
        return "cpu"
    raise ValueError(f"no carriers are known for a device of platform {device.platform!r}")


def local_tpu() -> str:
    """The kind of TPU that this process computes on; where it has none, that of an unknown one."""
    device = jax.local_devices()[0]
    return chip_of(device) if device.platform == "tpu" else UNKNOWN_TPU


class Choice(NamedTuple):
    """How a product is computed.

    Attributes:
      carrier: of both operands.
      a_shift: taken from the left operand's codes.
      b_shift: from the right one's.
      part: how many indices of what is summed over (a convolution's channels) one float sum takes.
    """

    carrier: Carrier
    a_shift: int | np.ndarray
    b_shift: int | np.ndarray
    part: int


def choose(
    chip: str,
    contraction: Contraction,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    a_range: Range,
    b_range: Range,
    reach: int | None = None,
) -> Choice:
    """The first carrier of a chip that holds the codes of a product.

    Args:
      chip: key of ``CHIPS``.
      contraction: the product.
      a_shape: of the left operand.
      b_shape: of the right one.
      a_range: smallest and largest code of the left operand.
      b_range: of the right one.
      reach: the largest magnitude of a sum, where more is known than the ranges.

    Raises:
      ValueError: the chip has none, or a sum could exceed int32.
    """
    if chip not in CHIPS:
        raise ValueError(f"unknown chip {chip!r}; known ones are {', '.join(CHIPS)}")
    terms = _taps(contraction, b_shape) * (1 if _depthwise(contraction) else a_shape[-1])
    described = f"{terms} products of codes in {_span(a_range)} and {_span(b_range)}"
    if (reach or terms * _largest(a_range) * _largest(b_range)) >= 1 << 31:
        raise ValueError(f"a sum of {described} can exceed int32")
    for carrier in _carriers(chip, contraction, b_shape):
        choice = choice_of(carrier, contraction, a_shape, b_shape, a_range, b_range, reach)
        if choice is not None:
            return choice
    raise ValueError(f"{chip} has no carrier for {described}")


def _carriers(chip: str, contraction: Contraction, b_shape: tuple[int, ...]) -> tuple[Carrier, ...]:
    """Of a chip for a product; products of one row each with a matrix of its own are float sums."""
    windows = chip == "cpu" and _taps(contraction, b_shape) > 1
    return (F32,) if windows or isinstance(contraction, MixSamples) else CHIPS[chip]


def choice_of(
    carrier: Carrier,
    contraction: Contraction,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    a_range: Range,
    b_range: Range,
    reach: int | None = None,
) -> Choice | None:
    """How a product is computed in a carrier, None where it cannot be; see ``choose``."""
    s, t = carrier.shift(a_range), carrier.shift(b_range)
    if s is None or t is None or (isinstance(contraction, Conv) and np.any(t)):
        return None  # a kernel with a shift would need sums of windows; kernels are signed
    length = a_shape[-1]
    known = reach is not None and reach <= EXACT_FLOAT and not np.any(s) and not np.any(t)
    if carrier.integer or known:
        return Choice(carrier, s, t, length)
    largest = _largest(_minus(a_range, s)) * _largest(_minus(b_range, t))
    most = EXACT_FLOAT // max(_taps(contraction, b_shape) * largest, 1)
    parts = -(-length // max(most, 1))
    if _depthwise(contraction) and most >= 1:  # channels are not summed
        return Choice(carrier, s, t, length)
    if most < 1 or (isinstance(contraction, MixSamples) and parts > 1):
        return None  # no network has so many taps or samples
    return Choice(carrier, s, t, -(-length // max(parts, 1)))


def integer_product(
    contraction: Contraction,
    a: Array,
    b: Array | np.ndarray,
    a_range: Range,
    b_range: Range,
    tpu: str = UNKNOWN_TPU,
    reach: int | None = None,
) -> Array:
    """The product of two arrays of codes, the same integers on every platform.

    The platform is that which the program is compiled for; of TPUs the caller says which.

    Args:
      contraction: which product; its dtypes do not matter.
      a: codes of the left operand, in any number type that holds them.
      b: of the right one. What a grid's move adds to the sums is known beforehand of a NumPy array.
      a_range: smallest and largest code of the grid of ``a``.
      b_range: of ``b``.
      tpu: kind of TPU (``chip_of``), should it be one.
      reach: the largest magnitude of a sum, where more is known than the ranges.

    Returns:
      The sums, int32.

    Raises:
      ValueError: see ``choose``.
    """

    def form(chip: str) -> Any:
        choice = choose(chip, contraction, a.shape, b.shape, a_range, b_range, reach)
        taps = chip in ("cpu", "gpu")
        return functools.partial(carried, contraction, choice, taps=taps, b_sums=b_sums)

    b_sums = _right_sums(contraction, b) if isinstance(b, np.ndarray) else None

    if isinstance(contraction, MixSamples):
        return form("cpu")(a, b)
    return lax.platform_dependent(a, b, cpu=form("cpu"), tpu=form(tpu), default=form("gpu"))


def carried(
    contraction: Contraction,
    choice: Choice,
    a: Array,
    b: Array,
    *,
    taps: bool = False,
    b_sums: np.ndarray | None = None,
) -> Array:
    """A product as chosen; int32 sums.

    Args:
      contraction: the product.
      choice: for the ranges of the codes.
      a: codes.
      b: codes.
      taps: take a convolution of integers as a matrix product for every tap of its kernel.
      b_sums: of the right operand over what is summed over, where they are known.
    """
    carrier, s, t, part = choice
    if np.any(s) and isinstance(contraction, Conv):
        a = jnp.pad(a, ((0, 0), *contraction.padding, (0, 0)))  # these zeros are codes too
        contraction = dataclasses.replace(contraction, padding=((0, 0), (0, 0)))
    operands = _in(carrier, a, s), _in(carrier, b, t)
    if carrier.integer:
        whole = contraction.integers if taps else _contracted(contraction)
        total = whole(*operands)
    else:
        total = _in_parts(contraction, *operands, part)
    # sum (a - s)(b - t) = sum a b - s sum b - t sum a + K s t
    if np.any(s):
        total += s * (_right_sums(contraction, b) if b_sums is None else b_sums)
    if np.any(t):
        sums = jnp.sum(jnp.asarray(a, jnp.int32), axis=-1, keepdims=True)
        total += t * (sums - s * a.shape[-1])
    return total


def _depthwise(contraction: Contraction) -> bool:
    return isinstance(contraction, Conv) and contraction.depthwise


def _taps(contraction: Contraction, b_shape: tuple[int, ...]) -> int:
    return math.prod(b_shape[:2]) if isinstance(contraction, Conv) else 1


def _in(carrier: Carrier, codes: Array, shift: int | np.ndarray) -> Array:
    codes = jnp.asarray(codes)
    if np.any(shift):
        codes = codes.astype(jnp.int32) - shift
    return codes.astype(carrier.dtype)


def _contracted(contraction: Contraction) -> Any:
    return lambda a, b: contraction.contract(a, b, jnp.int32)


def _in_parts(contraction: Contraction, a: Array, b: Array, size: int) -> Array:
    """Float sums of so many indices each, added up in int32."""

    def summed(a: Array, b: Array) -> Array:
        return contraction.contract(a, b, jnp.float32).astype(jnp.int32)

    length = a.shape[-1]
    if size >= length:
        return summed(a, b)
    axis = _right_axis(contraction)
    ends = [(start, min(start + size, length)) for start in range(0, length, size)]
    sums = [
        summed(a[..., start:stop], lax.slice_in_dim(b, start, stop, axis=axis))
        for start, stop in ends
    ]
    return functools.reduce(jnp.add, sums)


def _right_axis(contraction: Contraction) -> int:
    """The axis of the right operand over which is summed; of a convolution its channels."""
    if isinstance(contraction, Dense):
        return 0
    return 3 if isinstance(contraction, Scores) else 2


def _right_sums(contraction: Contraction, b: Any) -> Any:
    """int32 sums of the right operand over what is summed over; broadcast against the result."""
    b = b.astype(np.int32)
    if isinstance(contraction, Scores):
        return b.sum(axis=3, dtype=np.int32)[:, :, None]
    if isinstance(contraction, Mix):
        return b.sum(axis=2, keepdims=True, dtype=np.int32)
    return b.sum(axis=tuple(range(b.ndim - 1)), dtype=np.int32)


def _span(codes: Range) -> tuple[int, int]:
    return int(np.min(codes[0])), int(np.max(codes[1]))


def _minus(codes: Range, shift: int | np.ndarray) -> Range:
    return codes[0] - shift, codes[1] - shift


def _largest(codes: Range) -> int:
    """The largest magnitude of a code."""
    return max(map(abs, _span(codes)))
