"""Names of classes: one short line of text each, whoever gives them."""

from __future__ import annotations

import unicodedata
from typing import Any

_NO_LINE = frozenset({"Cc", "Zl", "Zp", "Cs"})
"""Unicode categories that break a line, or that no file and no picture can hold: control
characters, line and paragraph separators, halves of surrogate pairs."""

_AROUND = "\ufeff" + "".join(c for c in map(chr, range(0x3001)) if c.isspace())
"""What is taken off: the byte-order mark, and all of Unicode's whitespace."""

_SHOWN = 60


def class_name(text: Any, where: str) -> str:
    """A class's name without the whitespace and line breaks around it.

    Args:
      text: the name as a file or the user gave it.
      where: file and id, or option, for the message.

    Returns:
      The name.

    Raises:
      ValueError: it is no text, empty, or has a line break or another control character inside;
        the message gives ``where`` and the name.
    """
    if not isinstance(text, str):
        raise ValueError(f"{where}: a class's name is text, not {type(text).__name__}")
    name = text.strip(_AROUND)
    if not name:
        raise ValueError(f"{where}: a class's name is empty: give it one")
    if any(unicodedata.category(character) in _NO_LINE for character in name):
        shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…"
        raise ValueError(
            f"{where}: the class's name {shown!a} has a line break or another control "
            "character inside: take it out"
        )
    return name
