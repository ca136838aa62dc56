"""The work of a reader in steps, the same on every machine: so it is said that it ends."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

STEPS, STEPS_PER_BYTE = 20_000, 200
"""Calls and returns of functions that reading a file may take, for its own and for each byte."""


def bound(data: bytes) -> int:
    """The steps that reading a file of this content may take."""
    return STEPS + STEPS_PER_BYTE * len(data)


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """Counts the calls and returns of functions, those of C among them."""
    steps = 0

    def step(_frame, _event, _argument) -> None:
        nonlocal steps
        steps += 1

    before = sys.getprofile()
    sys.setprofile(step)
    try:
        yield lambda: steps
    finally:
        sys.setprofile(before)
