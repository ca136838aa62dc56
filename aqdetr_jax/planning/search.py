"""The largest batch that fits, in few compilations: each is minutes long."""

from __future__ import annotations

from collections.abc import Callable

MOST = 1024
"""Images a replica that no search goes beyond."""


def largest_batch(needed: Callable[[int], int], limit: int, *, start: int = 4) -> int:
    """The largest number of images whose program fits.

    A program needs more the more images it has, nearly in proportion: between one that fits and one
    that does not, the next is where a straight line meets the limit.

    Args:
      needed: bytes of a program with so many images; asked once for each number.
      limit: bytes that there are.
      start: where to begin.

    Returns:
      The number, 0 if not even one image fits, ``MOST`` if so many do.
    """
    low, high = (0, 0), (0, 0)  # (images, bytes): the largest that fits, the smallest that does not
    guess = start
    while True:
        size = needed(guess)
        if size <= limit:
            low = (guess, size)
        else:
            high = (guess, size)
        if low[0] == MOST or (high[0] and high[0] - low[0] == 1):
            return low[0]
        guess = _next(low, high, limit)


def _next(low: tuple[int, int], high: tuple[int, int], limit: int) -> int:
    if not high[0]:
        return min(2 * low[0], MOST)
    if not low[0]:
        return high[0] // 2
    slope = (high[1] - low[1]) / (high[0] - low[0])
    guess = low[0] + int((limit - low[1]) / slope) if slope > 0 else low[0]
    return min(max(guess, low[0] + 1), high[0] - 1)
