"""The largest batch that fits, in few compilations: each is minutes long."""

from __future__ import annotations

from collections.abc import Callable

MOST = 1024
"""Images a replica that no search goes beyond."""


def largest_batch(needed: Callable[[int], int], limit: int, *, start: int = 4) -> int:
    """The largest number of images whose program fits.

    A program needs more the more images it has, nearly in proportion: the next is where a straight
    line meets the limit, through one that fits and one that does not, else through two that fit.

    Args:
      needed: bytes of a program with so many images; asked once for each number.
      limit: bytes that there are.
      start: where to begin.

    Returns:
      The number, 0 if not even one image fits, ``MOST`` if so many do.
    """
    # (images, bytes): the smallest that does not fit, the largest that does and the one before it.
    high, low, before = (0, 0), (0, 0), (0, 0)
    guess = start
    while True:
        size = needed(guess)
        if size <= limit:
            low, before = (guess, size), low
        else:
            high = (guess, size)
        if low[0] == MOST or (high[0] and high[0] - low[0] == 1):
            return low[0]
        if not low[0]:
            guess = high[0] // 2
        elif high[0]:
            guess = min(_crossing(low, high, limit), high[0] - 1)
        elif before[1] < low[1] and before[0]:
            guess = min(_crossing(before, low, limit), MOST)
        else:
            guess = min(2 * low[0], MOST)
        guess = max(guess, low[0] + 1)


def _crossing(one: tuple[int, int], other: tuple[int, int], limit: int) -> int:
    """Images at which the line through two programs meets the limit."""
    slope = (other[1] - one[1]) / (other[0] - one[0])
    return one[0] + int((limit - one[1]) / slope) if slope > 0 else one[0]
