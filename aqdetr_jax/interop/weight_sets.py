"""Which of a file's sets of weights is read, and what wrappers put before and into their names.

A training checkpoint may hold several sets of weights (the model's, and a moving average of them),
each a dict of arrays by name somewhere in nested dicts. A set is called by its keys with dots
between, "ema.module" for instance, and "" at the top level.

Wrappers change names: ``module.`` of DataParallel, ``_orig_mod.`` of torch.compile, ``model.`` of a
class that holds another library's model; several at once, in any order. What all names begin with
says nothing of the model, whatever the word, so that no list of words is needed for it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from aqdetr_jax.interop.source import Malformed, shown

State = dict[str, np.ndarray]

STATE_KEYS = ("model", "state_dict", "model_state_dict")
"""Where training checkpoints keep the parameters."""

MAX_NESTING = 4
"""Dicts within dicts in which sets of weights are looked for."""

MAX_PREFIX = 6
"""Parts of a name that are tried as a prefix."""

MOST = 0.5
"""A prefix stands before more than this part of the names; two sets share at least as much."""

_WRAPPER = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\."
)
"""What torch's wrappers put into names wherever they wrap a part of a model; no table knows it."""


def choose(value: Any, weights: str | None = None) -> tuple[State, list[str]]:
    """One set of weights of a file.

    Args:
      value: content of the file, plain containers and arrays.
      weights: which set, by its keys or as many of them as tell it from others, or by what its
        names begin with; None = the top level, or the first of STATE_KEYS that fits.

    Returns:
      (arrays by name, notes on what else is there).

    Raises:
      Malformed: no such set is there; the message lists those that are.
    """
    found = dict(_sets(value))
    usual = next((key for key in ("", *STATE_KEYS) if key in found), None)
    if weights is not None:
        state, what = _named(found, usual, weights)
        return state, [f"weights taken, as --weights says: {what}"]
    if usual is None:
        raise Malformed(_nothing(value, found))
    state = found.pop(usual)
    others = [key for key, other in found.items() if _alike(other, state)]
    notes = [
        f"the weights under {usual!r} are taken; the file also holds some under "
        f"{shown(repr(key))}: --weights={shown(key)} takes those"
        for key in others[:3]
    ]
    return state, notes


def _sets(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, State]]:
    """All sets of a file by name."""
    if is_state(value):
        yield ".".join(keys), value
    elif isinstance(value, dict) and len(keys) < MAX_NESTING:
        for key, item in value.items():
            # Numbers are the keys of an optimizer's state.
            if isinstance(key, str):
                yield from _sets(item, (*keys, key))


def is_state(value: Any) -> bool:
    """Whether a value is a dict of arrays by name, with at least one."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(key, str) for key in value)
        and all(isinstance(array, np.ndarray) for array in value.values())
    )


def _named(found: Mapping[str, State], usual: str | None, weights: str) -> tuple[State, str]:
    """The set that ``--weights`` names, and what it is."""
    below = [weights] if weights in found else []
    below = below or [key for key in found if key.startswith(f"{weights}.")]
    if len(below) == 1:
        return found[below[0]], f"those under {shown(repr(below[0]), 60)}"
    state = found[usual] if usual is not None else {}
    inner = {name: array for name, array in state.items() if name.startswith(f"{weights}.")}
    if inner and not below:
        return inner, f"those whose names begin with {shown(repr(weights), 60)}"
    there = below or [key or "(top level)" for key in found]
    wrong = "stands for several sets" if below else "is no set of weights in the file"
    raise Malformed(f"--weights={shown(weights, 60)} {wrong}; there are: {_listed(there)}")


def _nothing(value: Any, found: Mapping[str, State]) -> str:
    """What is said of a file without weights where they are looked for."""
    if not isinstance(value, dict):
        return f"holds a {type(value).__name__}, not a dict of parameters"
    usual = ", ".join(map(repr, STATE_KEYS))
    said = f"holds no dict of parameters at its top level or under {usual}"
    if found:
        first = shown(next(iter(found)), 60)
        return f"{said}, but under: {_listed(found)}: give one, for example --weights={first}"
    keys = ", ".join(repr(key) if isinstance(key, str) else str(key) for key in list(value)[:20])
    more = ", ..." if len(value) > 20 else ""
    return f"{said}; its keys are: {keys[:500]}{more}"


def _listed(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(shown(key, 60) for key in keys[:10]) + (", ..." if len(keys) > 10 else "")


def _alike(one: State, other: State) -> bool:
    """Whether two sets are of one model: most names are the same without their prefixes."""
    forms = [
        [{name.removeprefix(prefix) for name in state} for prefix in ("", *_prefixes(state))]
        for state in (one, other)
    ]
    return any(len(a & b) > MOST * max(len(a), len(b)) for a in forms[0] for b in forms[1])


def _prefixes(state: Collection[str]) -> list[str]:
    """What most names begin with, ending in a dot, the shortest first."""
    prefixes = []
    for parts in range(1, MAX_PREFIX + 1):
        begun = Counter(
            ".".join(pieces[:parts]) + "."
            for pieces in (name.split(".", parts) for name in state)
            if len(pieces) > parts
        )
        best = max(begun, key=lambda prefix: begun[prefix], default=None)
        if best is None or begun[best] <= MOST * len(state):
            break
        prefixes.append(best)
    return prefixes


class Unwrapped(NamedTuple):
    """A state dict by a model's own names.

    Attributes:
      state: arrays by name.
      given: of each name, the one it has in the file.
      outside: names of the file that belong to a wrapper, not to the model.
      notes: what was taken off.
    """

    state: State
    given: dict[str, str]
    outside: list[str]
    notes: list[str]


def unwrap(state: State, known: Callable[[State], bool]) -> Unwrapped:
    """Takes off what wrappers put before and into names, if the names are then known.

    Names that are known as they stand are left alone (those of transformers begin with "model.").
    What lies outside the prefix is left out if it is a wrapper's own: no layer's weights (arrays
    of two axes or more are), such as a loss's weights or the counter of a moving average.

    Args:
      state: arrays by name.
      known: whether all names of a state dict are those of one model.

    Returns:
      The state dict, as it was if nothing makes it known.
    """
    as_it_is = Unwrapped(state, {name: name for name in state}, [], [])
    if known(state):
        return as_it_is
    given = {_WRAPPER.sub("", name): name for name in state}
    if len(given) < len(state):  # two names would be one
        given = as_it_is.given
    for prefix in ("", *_prefixes(given)):
        inner = {name[len(prefix) :]: old for name, old in given.items() if name.startswith(prefix)}
        outside = [old for name, old in given.items() if not name.startswith(prefix)]
        unwrapped = {name: state[old] for name, old in inner.items()}
        if any(state[name].ndim > 1 for name in outside) or not known(unwrapped):
            continue
        off = [*dict.fromkeys(m[0] for old in inner.values() for m in _WRAPPER.finditer(old))]
        off += [prefix] if prefix else []
        notes = [f"taken off the names: {' and '.join(shown(repr(part), 60) for part in off)}"]
        if outside:
            notes.append(f"left out, as none of the model's: {_listed(outside)}")
        return Unwrapped(unwrapped, inner, outside, notes)
    return as_it_is
