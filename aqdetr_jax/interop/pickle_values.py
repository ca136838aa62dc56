"""Values of a pickle that are none of Python's own, and what may be a key."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from aqdetr_jax.interop.source import Malformed

MAX_KEY = 1 << 61
"""Size of integer keys: larger ones can be made to collide in a dict by the thousand."""

MAX_KEY_LENGTH = 1024
"""Characters of a key: two equal ones that are endless take as long to compare, each time."""

REFUSED_OPCODES: Mapping[bytes, str] = {
    b"i": "INST",
    b"o": "OBJ",
    b"\x92": "NEWOBJ_EX",
    b"\x82": "EXT1",
    b"\x83": "EXT2",
    b"\x84": "EXT4",
    b"P": "PERSID",
    b"0": "POP",
    b"1": "POP_MARK",
    b"2": "DUP",
    b"I": "INT",
    b"L": "LONG",
    b"F": "FLOAT",
    b"S": "STRING",
    b"V": "UNICODE",
    b"d": "DICT",
    b"l": "LIST",
    b"p": "PUT",
    b"g": "GET",
    b"\x96": "BYTEARRAY8",
    b"\x97": "NEXT_BUFFER",
    b"\x98": "READONLY_BUFFER",
}
"""Opcodes that exist and are not read, for messages; those of protocols 0 and 1 among them."""

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


def is_number(value: Any) -> bool:
    """Whether a key is a number: two of them are equal across types, and hash as their value."""
    return isinstance(value, int | float)


class Ordered(dict):
    """An OrderedDict of the pickle: unlike a dict it may carry attributes, which are dropped."""


class Attributes:
    """A plain object of the pickle, of which only the attributes are kept."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}


class NumberType:
    """A type of single numbers of NumPy, as a pickle names it.

    Attributes:
      code: NumPy's own, such as "f8".
      order: "<" or ">", once the pickle has said it.
    """

    CODES: ClassVar[Mapping[str, str]] = {
        "b1": "?",
        "i1": "b",
        "i2": "h",
        "i4": "i",
        "i8": "q",
        "u1": "B",
        "u2": "H",
        "u4": "I",
        "u8": "Q",
        "f2": "e",
        "f4": "f",
        "f8": "d",
    }
    """The formats of :mod:`struct` for the codes that are read."""

    def __init__(self, code: str) -> None:
        """Args: one of CODES."""
        self.code = code
        self.order = "<"

    def set_order(self, state: Any) -> None:
        """Takes the byte order from the state that NumPy writes; Malformed if it is another."""
        match state:
            case (int(), "<" | ">" | "|" as order, None, None, None, int(), int(), int(), *_):
                self.order = "<" if order == "|" else order
            case _:
                raise Malformed("sets the state of a numpy.dtype that is none of a plain number")

    def value(self, data: bytes) -> int | float | bool:
        """The number in ``data``; Malformed if it has another size."""
        form = self.order + self.CODES[self.code]
        if len(data) != struct.calcsize(form):
            raise Malformed(f"has a NumPy number of {len(data)} bytes, whose type is {self.code}")
        return struct.unpack(form, data)[0]
