"""How images become input, as the ``preprocessor_config.json`` of a model folder says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from aqdetr_jax.data.fit import UNIT
from aqdetr_jax.interop.source import shown

SHORT_SIDE, LONG_SIDE = 800, 1333
"""The official evaluation resize, pixels."""

MAX_SIDE = 16_384
"""Pixels of a side."""

RATIOS = (3 / 2, 4 / 3, 1)
"""Long side to short side of images that get a padded size of their own."""

FILE = "preprocessor_config.json"

# (key, what we do): any other value is another input.
ONLY = (
    ("do_rescale", True),
    ("do_normalize", True),
    ("resample", 2),  # Pillow's number of bilinear
)


class ImageRule(NamedTuple):
    """What is done to an image.

    Attributes:
      short_side: what the short side is resized to, pixels; None = images keep their size.
      long_side: the limit of the long side, pixels; None = none.
      mean, std: of the channels, values 0 to 1; None = the official ones.
    """

    short_side: int | None = SHORT_SIDE
    long_side: int | None = LONG_SIDE
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def image_rule(settings: Mapping[str, Any], name: str) -> ImageRule:
    """The rule of a model folder; the official one where it says nothing.

    Args:
      settings: content of its FILE, empty if there is none.
      name: the folder, for messages.

    Raises:
      ValueError: it says something that is not done here; the message gives key and value.
    """

    def refuse(key: str, wanted: str) -> ValueError:
        value = shown(repr(settings.get(key)), 80)
        return ValueError(
            f"{name}: {FILE} says {key}={value}; {wanted} is read: change or remove that file to "
            "convert nevertheless"
        )

    for key, only in ONLY:
        # Not ==: 1 is equal to true.
        if settings.get(key, only) is not None and repr(settings.get(key, only)) != repr(only):
            raise refuse(key, f"only {only!r}")
    factor = settings.get("rescale_factor")
    if factor is not None and not (_is_number(factor) and math.isclose(factor, 1 / 255)):
        raise refuse("rescale_factor", "only 1/255")
    resize = settings.get("do_resize")
    if resize is not None and type(resize) is not bool:
        raise refuse("do_resize", "only true or false")
    short, long = (None, None) if resize is False else (SHORT_SIDE, LONG_SIDE)
    size = settings.get("size")
    if size is not None and resize is not False:
        if type(size) is int:  # as old versions wrote it
            size = {"shortest_edge": size, "longest_edge": settings.get("max_size", LONG_SIDE)}
        if not isinstance(size, dict) or set(size) != {"shortest_edge", "longest_edge"}:
            raise refuse("size", "one of shortest_edge and longest_edge")
        short, long = size["shortest_edge"], size["longest_edge"]
        whole = type(short) is int and type(long) is int
        if not (whole and 1 <= short <= long <= MAX_SIDE):
            raise refuse("size", f"1 <= shortest edge <= longest edge <= {MAX_SIDE}")
    pixels: list[tuple[float, ...] | None] = []
    for key in ("image_mean", "image_std"):
        values = settings.get(key)
        if values is not None:
            good = isinstance(values, list) and len(values) == 3 and all(map(_is_number, values))
            if not good or (key == "image_std" and min(values) <= 0):
                raise refuse(key, "a list of three numbers, deviations above 0,")
            values = tuple(float(value) for value in values)
        pixels.append(values)
    return ImageRule(short, long, *pixels)


def buckets(rule: ImageRule) -> tuple[tuple[int, int], ...]:
    """Padded sizes (height, width) for the rule, the largest first.

    Each is compiled when an image first needs it. Square, 4:3 and 3:2, upright and lying, and what
    the limit of the long side leaves: a photograph of a common shape is padded by next to nothing.

    Args:
      rule: without sides, the official ones give the sizes.
    """
    short, longest = rule.short_side or SHORT_SIDE, rule.long_side or LONG_SIDE
    short, *sides = (
        math.ceil(side / UNIT) * UNIT
        for side in (short, longest, *(min(short * ratio, longest) for ratio in RATIOS))
    )
    lying = dict.fromkeys((short, side) for side in sides)
    return tuple(dict.fromkeys(turned for size in lying for turned in (size, size[::-1])))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e6
