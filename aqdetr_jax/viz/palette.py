"""The colours of every picture, in one place: a run keeps its colour in all charts and tables.

The four stock runs and the class colours are told apart by lightness as well as by hue, so that
they survive colour blindness and a grey printer.
"""

from __future__ import annotations

import colorsys
import dataclasses
from collections.abc import Sequence

RGB = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a chart's frame, as hex strings."""

    surface: str
    ink: str
    muted: str
    grid: str


THEMES = {
    "light": Theme(surface="#ffffff", ink="#1b2230", muted="#5d6778", grid="#e3e7ee"),
    "dark": Theme(surface="#171b23", ink="#e8ebf1", muted="#9aa4b5", grid="#2c3340"),
}

# (light, dark) hex of the stock runs; the reference is neutral, the result is the strongest hue.
_RUNS = {
    "teacher": ("#3d4757", "#b9c2d0"),
    "calibrated": ("#d99a0b", "#e8b23a"),
    "baseline": ("#cf4f76", "#e87f9e"),
    "student": ("#2563eb", "#6b9bff"),
}
_OTHER_RUNS = (
    ("#0e8f7e", "#37bba9"),
    ("#7a45c9", "#a983ec"),
    ("#8a5a2b", "#c29163"),
    ("#5f8f1d", "#96c24f"),
)

_CLASSES: tuple[RGB, ...] = (
    (255, 176, 0),
    (62, 142, 255),
    (240, 72, 120),
    (40, 200, 140),
    (170, 110, 255),
    (255, 116, 50),
    (0, 200, 225),
    (214, 220, 70),
    (255, 130, 215),
    (120, 190, 60),
    (190, 140, 100),
    (110, 120, 230),
)


def theme(name: str) -> Theme:
    """Looks up "light" or "dark"; raises ValueError otherwise."""
    if name not in THEMES:
        raise ValueError(f"theme must be one of {sorted(THEMES)}, got {name!r}")
    return THEMES[name]


def run_colors(names: Sequence[str], theme_name: str = "light") -> dict[str, str]:
    """Gives each run its colour.

    The stock runs have fixed colours whatever else is shown; other names take the remaining
    colours in the order given.

    Args:
      names: run names, such as "teacher" or "student".
      theme_name: "light" or "dark".

    Returns:
      Name to hex colour.
    """
    theme(theme_name)
    shade = 0 if theme_name == "light" else 1
    others = [name for name in dict.fromkeys(names) if name not in _RUNS]
    colors = {name: _RUNS[name][shade] for name in names if name in _RUNS}
    for index, name in enumerate(others):
        colors[name] = _OTHER_RUNS[index % len(_OTHER_RUNS)][shade]
    return colors


def class_color(label: int) -> RGB:
    """Gives class ``label`` (contiguous, from 0) its bright RGB colour, always the same."""
    if 0 <= label < len(_CLASSES):
        return _CLASSES[label]
    # Golden-ratio steps keep any number of further hues apart.
    hue = (label * 0.618033988749895) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.6 + 0.25 * (label % 2), 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def readable_on(color: RGB) -> RGB:
    """Black or white, whichever reads better on ``color`` (WCAG relative luminance)."""

    def linear(channel: int) -> float:
        c = channel / 255
        return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

    luminance = 0.2126 * linear(color[0]) + 0.7152 * linear(color[1]) + 0.0722 * linear(color[2])
    return (16, 18, 24) if luminance > 0.179 else (255, 255, 255)
