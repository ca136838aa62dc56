"""A plain tree of what a pickle made, with its size bounded as it is copied.

A pickle's value may share parts, so that a few bytes are astronomic to walk, and may hold itself.
The copy has neither property: it can be walked by simple code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from aqdetr_jax.interop.pickle_values import Attributes, is_number
from aqdetr_jax.interop.source import Malformed

MAX_DEPTH = 64
"""Levels of nesting of the result."""

MAX_VALUES = 500_000
"""Values in the result as a tree, a shared container counted at each of its uses."""

VALUES_PER_BYTE = 4
"""Values in the result for each byte of its pickle: sharing may repeat, but not endlessly."""

MAX_NUMBER_KEYS = 40_000
"""Numbers as keys and elements in the result, counted alike: numbers can be made to collide."""


class _Level(NamedTuple):
    """A container that is being copied: how to make it, what is left of it, what is done."""

    make: Callable[[list[Any]], Any]
    left: Iterator[Any]
    done: list[Any]


def _level(value: Any, wrap: Callable[[dict[str, Any]], Any]) -> _Level | None:
    """The level of a container, None for other values."""
    if isinstance(value, dict):
        keys = list(value)
        return _Level(lambda done: dict(zip(keys, done, strict=True)), iter(value.values()), [])
    if isinstance(value, Attributes):
        names = list(value.values)
        return _Level(
            lambda done: wrap(dict(zip(names, done, strict=True))), iter(value.values.values()), []
        )
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return _Level(kind, iter(value), [])
    return None


def expand(
    root: Any,
    size: int,
    leaf: Callable[[Any], Any],
    wrap: Callable[[dict[str, Any]], Any],
) -> Any:
    """Copies what :func:`load` returned as a tree of new containers.

    Args:
      root: the value.
      size: bytes of its pickle.
      leaf: makes the final value of one that is no container and no plain scalar; it raises
        Malformed for what has no place in a result.
      wrap: makes the final value of an Attributes object from its attributes.

    Returns:
      The tree: dict (also for Ordered), list, tuple, set, frozenset, None, bool, int, float, str,
      bytes and the results of ``leaf`` and ``wrap``.

    Raises:
      Malformed: the tree is deeper than MAX_DEPTH, as that of a value that holds itself is, or has
        more than MAX_VALUES or VALUES_PER_BYTE * ``size`` values or MAX_NUMBER_KEYS numbers as
        keys, a container that is used twice counted twice.
    """
    most = min(MAX_VALUES, VALUES_PER_BYTE * size)
    count = numbers = 0
    levels = [_Level(lambda done: done[0], iter([root]), [])]
    while True:
        current = levels[-1]
        for value in current.left:
            count += 1
            if count > most:
                raise Malformed(f"holds more than {most} values when shared ones are repeated")
            if value is None or isinstance(value, bool | int | float | str | bytes):
                current.done.append(value)
                continue
            inner = _level(value, wrap)
            if inner is None:
                current.done.append(leaf(value))
                continue
            if len(levels) > MAX_DEPTH:
                raise Malformed(f"holds values nested deeper than {MAX_DEPTH}, or in themselves")
            if isinstance(value, dict | set | frozenset):
                numbers += sum(map(is_number, value))
                if numbers > MAX_NUMBER_KEYS:
                    raise Malformed(f"holds more than {MAX_NUMBER_KEYS} numbers as keys")
            levels.append(inner)
            break
        else:
            levels.pop()
            made = current.make(current.done)
            if not levels:
                return made
            levels[-1].done.append(made)
