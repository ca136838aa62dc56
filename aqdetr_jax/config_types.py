"""Configurations as typed data: ConfigDict to frozen dataclasses and back, checked on the way.

A wrong key or type is reported with its full dotted path and the nearest real name.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

import ml_collections
from ml_collections import config_dict as config_dict_lib

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration file, key or value that cannot be used; the message says which and why."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the closest candidate, or ``""`` if none is close."""
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def to_dataclass(cls: type[T], config_dict: Any, path: str = "config") -> T:
    """Builds the frozen dataclass ``cls`` from a configuration, checking every key and type.

    Accepted field types: ``bool``, ``int``, ``float`` (an int is accepted), ``str``,
    ``Literal[...]``, ``tuple[X, ...]``, ``tuple[X, Y]``, ``X | None`` and other unions, and nested
    dataclasses, in any combination. Of several dataclasses it is the one whose fields without a
    default are given. Fields that the configuration omits take their defaults.

    Args:
      cls: dataclass type.
      config_dict: ``ConfigDict``, plain mapping, or an instance of ``cls`` (returned unchanged).
      path: dotted prefix used in messages.

    Returns:
      An instance of ``cls``; hashable if its fields are, so usable as a static jit argument.

    Raises:
      ConfigError: unknown or missing key, wrong type, or a ``ValueError`` of ``__post_init__``.
    """
    if isinstance(config_dict, cls):
        return config_dict
    if not isinstance(config_dict, (Mapping, ml_collections.ConfigDict)):
        raise ConfigError(_type_message(path, f"a group of keys ({cls.__name__})", config_dict))
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in config_dict:
        if key not in fields:
            raise ConfigError(unknown_key(path, str(key), fields))
    values = {}
    for name, field in fields.items():
        if name in config_dict:
            values[name] = convert(hints[name], _get(config_dict, name, path), f"{path}.{name}")
        elif _has_no_default(field):
            raise ConfigError(f"{path}.{name} is missing and has no default ({hints[name]})")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:  # raised by the dataclass's own checks in __post_init__
        raise ConfigError(f"{path}: {error}") from error


def from_dataclass(obj: Any) -> dict[str, Any]:
    """Turns a (nested) dataclass into a JSON-serialisable dict; tuples become lists.

    ``to_dataclass(type(obj), from_dataclass(obj)) == obj``.
    """
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type):
        raise TypeError(f"expected a dataclass instance, found {type(obj).__name__}")
    fields = [field for field in dataclasses.fields(obj) if field.init]
    return {field.name: to_plain(getattr(obj, field.name)) for field in fields}


def to_plain(value: Any, path: str = "config") -> Any:
    """Turns ConfigDicts, dataclasses and tuples, at any depth, into dicts and lists for JSON.

    Raises:
      ConfigError: a required placeholder is still open; ``path`` is its prefix in the message.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return from_dataclass(value)
    if isinstance(value, ml_collections.FieldReference):
        return to_plain(value.get(), path)
    if isinstance(value, (Mapping, ml_collections.ConfigDict)):
        return {str(key): to_plain(_get(value, key, path), f"{path}.{key}") for key in value}
    if isinstance(value, (tuple, list)):
        return [to_plain(item, path) for item in value]
    return value


def convert(annotation: Any, value: Any, path: str) -> Any:
    """Checks ``value`` against a type annotation; lists become tuples, ints become floats."""
    if isinstance(value, ml_collections.FieldReference):
        value = value.get()
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, path)
    if origin is Literal:
        # The type is compared too: True == 1 in Python, but not to a reader of the file.
        for choice in arguments:
            if type(choice) is type(value) and choice == value:
                return value
        names = [choice for choice in arguments if isinstance(choice, str)]
        hint = nearest(value, names) if isinstance(value, str) else ""
        choices = ", ".join(repr(choice) for choice in arguments)
        raise ConfigError(f"{path}: expected one of {choices}, found {value!r}{hint}")
    if origin is tuple:
        return _convert_tuple(annotation, arguments, value, path)
    if dataclasses.is_dataclass(annotation):
        return to_dataclass(typing.cast(type, annotation), value, path)
    if annotation is type(None):
        if value is None:
            return None
    elif annotation is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif annotation in (bool, int, str):
        if type(value) is annotation:
            return value
    else:
        raise TypeError(f"{path}: the field type {annotation} is not supported in configurations")
    raise ConfigError(_type_message(path, annotation.__name__, value))


def _convert_union(arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    others = [argument for argument in arguments if argument is not type(None)]
    if value is None and len(others) < len(arguments):
        return None
    # An exact match first, so that ``float | int`` keeps an int.
    for argument in others:
        if argument in (bool, int, float, str) and type(value) is argument:
            return value
    group = group_of(arguments, value)
    if group is not None:
        return to_dataclass(group, value, path)
    errors = []
    for argument in others:
        try:
            return convert(argument, value, path)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    names = " or ".join(getattr(argument, "__name__", str(argument)) for argument in arguments)
    raise ConfigError(_type_message(path, names, value))


def group_of(arguments: Iterable[Any], value: Any) -> type | None:
    """The dataclass of a union that a group of keys is: the one whose required keys it has.

    Args:
      arguments: of the union.
      value: the keys; something else is no group.

    Returns:
      Of several the one with most required keys, the first of equals; None = it is none.
    """
    if not isinstance(value, (Mapping, ml_collections.ConfigDict)):
        return None
    required = {
        argument: {f.name for f in dataclasses.fields(argument) if f.init and _has_no_default(f)}
        for argument in arguments
        if isinstance(argument, type) and dataclasses.is_dataclass(argument)
    }
    fitting = [group for group, names in required.items() if names <= set(value)]
    return max(fitting, key=lambda group: len(required[group]), default=None)


def _convert_tuple(annotation: Any, arguments: tuple[Any, ...], value: Any, path: str) -> tuple:
    if not isinstance(value, (tuple, list)):
        raise ConfigError(_type_message(path, str(annotation), value))
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    elif len(arguments) != len(value):
        raise ConfigError(f"{path}: expected {len(arguments)} values, found {len(value)}: {value}")
    pairs = enumerate(zip(arguments, value, strict=True))
    return tuple(convert(argument, item, f"{path}[{i}]") for i, (argument, item) in pairs)


def _get(config: Any, key: str, path: str) -> Any:
    try:
        return config[key]
    except config_dict_lib.RequiredValueError as error:
        raise ConfigError(
            f"{path}.{key} must be given: add --{path}.{key}=VALUE to the command"
        ) from error


def _has_no_default(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _type_message(path: str, expected: str, value: Any) -> str:
    hint = ""
    if expected == "int" and isinstance(value, float) and value.is_integer():
        hint = f"; write {int(value)}"
    return f"{path}: expected {expected}, found {type(value).__name__} {value!r}{hint}"


def unknown_key(path: str, key: str, candidates: Iterable[str]) -> str:
    """Message for a key that ``path`` does not have: the nearest real key, else all of them."""
    names = sorted(candidates)
    hint = nearest(key, names) or f"; known keys: {', '.join(names)}"
    return f"{path} has no key {key!r}{hint}"
