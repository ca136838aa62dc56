"""Fonts for words in any script: the one that comes with matplotlib, else one of this machine."""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence

import matplotlib
from matplotlib import font_manager, ft2font
from PIL import ImageFont

_BESIDES = " .…0123456789"
"""What stands beside a name: its score, and the mark of what was cut off."""


def load_font(size: int, text: str = "", *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Loads a font that can draw a text.

    Args:
      size: pixels.
      text: what is to be drawn.
      bold: the bold cut, where matplotlib's own font (Latin, Greek, Cyrillic, ...) serves.

    Returns:
      matplotlib's own font if it has all characters, or nothing on this machine has them; else the
      first of the machine's that has.
    """
    return ImageFont.truetype(_file_for(text) or _own(bold), size)


def can_draw(text: str) -> bool:
    """Whether one font of this machine has every character of a text, and there is one."""
    if not text.strip() or any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text):
        return False  # nothing to see, or more than one line
    return _covers(_own(), text) or _file_for(text) is not None


def drawable(text: str) -> str:
    """A text with a question mark for each character that cannot be drawn."""
    if not text.strip(" ") or can_draw(text):
        return text
    return "".join(c if c == " " or can_draw(c) else "?" for c in text)


def class_text(class_names: Sequence[str], label: int) -> str:
    """What stands for a class in a picture: its name, else its number ("class 5").

    Args:
      class_names: name of each contiguous class.
      label: the class; its number is what ``note_of_numbers`` explains.
    """
    if 0 <= label < len(class_names) and can_draw(str(class_names[label])):
        return str(class_names[label])
    return f"class {label}"


def note_of_numbers(class_names: Sequence[str], labels: Iterable[int] | None = None) -> str:
    """The names that pictures show by number, in words; "" if there are none.

    Args:
      class_names: name of each contiguous class.
      labels: only these classes; None takes all.
    """
    chosen = range(len(class_names)) if labels is None else sorted(set(labels))
    named = [k for k in chosen if 0 <= k < len(class_names) and not can_draw(str(class_names[k]))]
    if not named:
        return ""
    meanings = ", ".join(f"class {k} = {class_names[k]}" for k in named)
    return f"No font of this machine can draw these names; in pictures they are numbers: {meanings}"


def _own(bold: bool = False) -> str:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name)


def _file_for(text: str) -> str | None:
    """The machine's font that has all of a text; None if its own does, or no other."""
    if not text.strip() or _covers(_own(), text):
        return None
    return next((file for file in _system_fonts() if _covers(file, text + _BESIDES)), None)


def _covers(file: str, text: str) -> bool:
    return set(map(ord, text)) <= _characters(file)


@functools.lru_cache(maxsize=1)
def _system_fonts() -> tuple[str, ...]:
    """Upright fonts without serifs first: they read best at small sizes."""

    def rank(file: str) -> tuple[bool, bool, str]:
        name = os.path.basename(file).lower()
        odd = re.search(r"bold|italic|oblique|light|thin|black|serif", name) is not None
        return odd, "sans" not in name, file

    return tuple(sorted(font_manager.findSystemFonts(), key=rank))


@functools.lru_cache(maxsize=1024)
def _characters(file: str) -> frozenset[int]:
    """Code points of a font; none of a file that is broken or has no outlines (colour emoji)."""
    try:
        ImageFont.truetype(file, 16)
        return frozenset(ft2font.FT2Font(file).get_charmap())
    except Exception:  # whatever lies in the machine's font folders
        return frozenset()
