"""Which parameter of another library is which of ours: how a table of names is read, both ways.

A row says: names of this form are that path. ``{i}`` stands for a number in both, and ``{i+1}`` in
a path for the number plus one. Where a row has several paths, the foreign array is theirs one after
the other along its first axis, in equal parts (torch keeps q, k and v so). A row without a path
drops its names. The layout says how an array lies:

* "conv": torch's [out, in, kh, kw] is our [kh, kw, in, out];
* "dense": torch's [out, in] is our [in, out];
* "same": as it is.

Paths that begin with "batch_stats/" are running statistics, all others parameters.

Read forwards, the first row that explains a name counts; several rows may give several spellings of
a path. Read backwards, the first row that has a path counts: its spelling is the one that is
written. To write another one, put its rows before the table.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

Layout = Literal["conv", "dense", "same"]

STATISTICS = "batch_stats/"


class Row(NamedTuple):
    """One line of a table.

    Attributes:
      name: form of the foreign name.
      path: form of our path, or of several; "" = to be dropped. See the module.
      layout: how the array lies.
    """

    name: str
    path: str | tuple[str, ...]
    layout: Layout = "same"

    @property
    def paths(self) -> tuple[str, ...]:
        """The forms of our paths, none if the name is dropped."""
        if isinstance(self.path, tuple):
            return self.path
        return (self.path,) if self.path else ()


class Place(NamedTuple):
    """Where a foreign array goes: our paths (none = dropped) and its layout."""

    paths: tuple[str, ...]
    layout: Layout


def translate(
    state: Mapping[str, np.ndarray], rows: Sequence[Row]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Foreign arrays under our paths.

    Args:
      state: foreign name -> array.
      rows: a table.

    Returns:
      (parameters, running statistics), flat: path -> array.

    Raises:
      ValueError: a name that no row explains; an array that does not split into the row's parts;
        two names of one parameter whose values differ.
    """
    found: dict[str, np.ndarray] = {}
    source: dict[str, str] = {}
    for name, array in state.items():
        paths, layout = find(name, rows)
        for path, part in zip(paths, _split(name, np.asarray(array), len(paths)), strict=True):
            value = to_ours(part, layout)
            if path not in found:
                found[path], source[path] = value, name
            elif not np.array_equal(value, found[path]):
                raise ValueError(f"{name} and {source[path]} are both {path}, with unlike values")
    stats = {k: v for k, v in found.items() if k.startswith(STATISTICS)}
    params = {k: v for k, v in found.items() if k not in stats}
    return params, {k.removeprefix(STATISTICS): v for k, v in stats.items()}


def untranslate(
    params: Mapping[str, np.ndarray],
    stats: Mapping[str, np.ndarray],
    rows: Sequence[Row],
    names: Iterable[str] | None = None,
) -> dict[str, np.ndarray]:
    """Our arrays under foreign names: the way back of ``translate``, bit by bit.

    What ``translate`` drops is not written; torch fills in the counters of its batch norms.

    Args:
      params: path -> parameter, flat.
      stats: path -> running statistic, flat.
      rows: a table.
      names: the names to write, copies included (a head that is listed twice or once a layer), as
        torch's strict loading wants them. By default every parameter is written once, under the
        first name that the table has for it, as safetensors wants it.

    Returns:
      Foreign name -> array.

    Raises:
      ValueError: a parameter that has no name in the table, or none among ``names``; a name whose
        parameter is not there.
    """
    ours = {**params, **{STATISTICS + path: value for path, value in stats.items()}}
    if names is None:
        names = dict.fromkeys(name_of(path, rows) for path in ours)
    state, left = {}, set(ours)
    for name in names:
        paths, layout = find(name, rows)
        missing = [path for path in paths if path not in ours]
        if missing:
            raise ValueError(f"{name} cannot be written: there is no parameter {missing[0]}")
        if paths:
            parts = [to_theirs(np.asarray(ours[path]), layout) for path in paths]
            state[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
            left -= set(paths)
    if left:
        raise ValueError(f"none of the names to write is that of {min(left)}")
    return state


def find(name: str, rows: Sequence[Row]) -> Place:
    """Where the array of a foreign name goes.

    Raises:
      ValueError: no row explains the name.
    """
    for row in rows:
        numbers = _read(row.name, name)
        if numbers is not None:
            return Place(tuple(_write(path, numbers) for path in row.paths), row.layout)
    raise ValueError(f"no parameter of ours is known for {name!r}")


def name_of(path: str, rows: Sequence[Row]) -> str:
    """The foreign name under which a path of ours is written, its first copy.

    Raises:
      ValueError: the table has no name for it.
    """
    for row in rows:
        for form in row.paths:
            numbers = _read(form, path)
            if numbers is not None:
                return _write(row.name, numbers)
    raise ValueError(
        f"the table has no name for our {path}: leave out what the other library has not, such as "
        "auxiliary queries and step sizes"
    )


_FIELD = re.compile(r"\{(\w)(\+1)?\}")


@functools.cache
def _pattern(form: str) -> re.Pattern[str]:
    """The regular expression of a form; numbers have no leading zeros."""
    pieces, end = [], 0
    for mark in _FIELD.finditer(form):
        pieces += [re.escape(form[end : mark.start()]), rf"(?P<{mark[1]}>0|[1-9]\d*)"]
        end = mark.end()
    return re.compile("".join(pieces) + re.escape(form[end:]))


def _read(form: str, text: str) -> dict[str, int] | None:
    """The numbers of a name or path, or None if it has another form."""
    match = _pattern(form).fullmatch(text)
    if match is None:
        return None
    added = {mark[1]: bool(mark[2]) for mark in _FIELD.finditer(form)}
    numbers = {key: int(value) - added[key] for key, value in match.groupdict().items()}
    return None if any(number < 0 for number in numbers.values()) else numbers


def _write(form: str, numbers: Mapping[str, int]) -> str:
    """A form with its numbers; copies of one parameter are numbered, and the first is written."""
    return _FIELD.sub(lambda mark: str(numbers.get(mark[1], 0) + bool(mark[2])), form)


def _split(name: str, array: np.ndarray, parts: int) -> list[np.ndarray]:
    """Equal parts along the first axis."""
    if parts < 2:
        return [array][:parts]
    if array.ndim == 0 or array.shape[0] % parts:
        raise ValueError(f"{name} of shape {array.shape} does not split into {parts} equal parts")
    return np.split(array, parts)


def to_ours(array: np.ndarray, layout: Layout) -> np.ndarray:
    """A foreign array in our layout."""
    if layout == "conv":
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
    return np.ascontiguousarray(array.T) if layout == "dense" else array


def to_theirs(array: np.ndarray, layout: Layout) -> np.ndarray:
    """One of our arrays in the foreign layout."""
    if layout == "conv":
        return np.ascontiguousarray(array.transpose(3, 2, 0, 1))
    return np.ascontiguousarray(array.T) if layout == "dense" else array


def norm(name: str, path: str) -> tuple[Row, ...]:
    """Rows of a batch norm, and of its counter, which is dropped."""
    return (
        Row(f"{name}.weight", f"{path}/scale"),
        Row(f"{name}.bias", f"{path}/bias"),
        Row(f"{name}.running_mean", f"{STATISTICS}{path}/mean"),
        Row(f"{name}.running_var", f"{STATISTICS}{path}/var"),
        Row(f"{name}.num_batches_tracked", ""),
    )


def scaled(name: str, path: str) -> tuple[Row, ...]:
    """Rows of a layer norm or group norm."""
    return (Row(f"{name}.weight", f"{path}/scale"), Row(f"{name}.bias", f"{path}/bias"))


def layer(name: str, path: str, layout: Layout = "dense") -> tuple[Row, ...]:
    """Rows of a layer with a bias."""
    weight = Row(f"{name}.weight", f"{path}/kernel", layout)
    return weight, Row(f"{name}.bias", f"{path}/bias")


def layers(name: str, path: str, *parts: str) -> tuple[Row, ...]:
    """Rows of dense layers that are called alike on both sides: ``name.part`` and ``path/part``."""
    return tuple(row for part in parts for row in layer(f"{name}.{part}", f"{path}/{part}"))
