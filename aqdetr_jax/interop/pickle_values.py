"""Values of a pickle that are none of Python's own, and what may be a key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aqdetr_jax.interop.source import Malformed

MAX_KEY = 1 << 61
"""Size of integer keys: larger ones can be made to collide in a dict by the thousand."""

MAX_KEY_LENGTH = 1024
"""Characters of a key: two equal ones that are endless take as long to compare, each time."""

Function = Callable[[tuple[Any, ...]], Any]
"""What is called for a name in a pickle, with all the arguments as one tuple."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name from a pickle, allowed by the caller, with what the caller put behind it."""

    name: str
    function: Function


def key_of(value: Any) -> Any:
    """``value``, if it may be a key of a dict or an element of a set; Malformed otherwise."""
    # Tuples may not: hashing one walks all of it, which can take forever when its parts are
    # shared, and tuples of integers can be made to collide.
    if not isinstance(value, str | bytes | int | float | None):
        raise Malformed(f"has a key of type {type(value).__name__}, not a number or a string")
    if isinstance(value, int) and abs(value) >= MAX_KEY:
        raise Malformed("has an integer key of more than 61 bits")
    if isinstance(value, str | bytes) and len(value) > MAX_KEY_LENGTH:
        raise Malformed(f"has a key of more than {MAX_KEY_LENGTH} characters")
    return value


class Ordered(dict):
    """An OrderedDict of the pickle: unlike a dict it may carry attributes, which are dropped."""


class Attributes:
    """A plain object of the pickle, of which only the attributes are kept."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
