"""Mechanics of configuration: files, command-line overrides, frozen dataclasses, differences.

A configuration is written as an ``ml_collections.ConfigDict`` (mutable, with references between
fields), changed from the command line, and turned **once**, at the boundary, into nested frozen
dataclasses that the rest of the package takes. A wrong key or type fails there, with its full
dotted path and the nearest real name, and never in the middle of a run.

Configuration files are Python and are executed: load only files that you trust. The JSON form
(``config.json`` of a run) holds data only and is safe to load from anyone.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import re
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union

import ml_collections
from ml_collections import config_dict as config_dict_lib

from aqdetr_jax.config_types import (
    ConfigError,
    convert,
    from_dataclass,
    group_of,
    nearest,
    to_dataclass,
    to_plain,
    unknown_key,
)
from aqdetr_jax.io import read_json
from aqdetr_jax.paths import as_path
from aqdetr_jax.training.arguments import OVERRIDE_PREFIX

__all__ = [
    "ConfigError",
    "apply_overrides",
    "available_configs",
    "changed_keys",
    "config_diff",
    "flatten_config",
    "from_dataclass",
    "load_config_file",
    "packaged_config_dir",
    "to_dataclass",
    "to_plain",
]

_ABSENT = "(absent)"
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


# --- files ---------------------------------------------------------------------------------------


def packaged_config_dir() -> Path:
    """Folder of the configurations shipped beside the package (``configs/``)."""
    return Path(__file__).resolve().parents[2] / "configs"


def available_configs() -> list[str]:
    """Names of the shipped configurations, sorted; each is a valid ``load_config_file`` name."""
    files = packaged_config_dir().glob("*.py")
    return sorted(file.stem for file in files if not file.name.startswith("_"))


def load_config_file(
    path_or_name: str, overrides: Sequence[str] = (), schema: type | None = None
) -> ml_collections.ConfigDict:
    """Loads a configuration and applies command-line overrides.

    Args:
      path_or_name: ``some/file.py`` or ``some/file.py:argument`` (a Python file that defines
        ``get_config()`` or ``get_config(argument)``; **it is executed**), ``some/file.json`` (data
        only), or the bare name of a shipped configuration. A path that does not exist and starts
        with ``configs/`` is looked up among the shipped ones too.
      overrides: ``--config.a.b=value`` or ``a.b=value``. The value is read by the type of the
        schema's field, or else of the value that it replaces; tuples are written ``(1,2)``.
      schema: dataclass type of the whole configuration. With it, overrides may name fields that
        the file leaves at their default, and values are checked here already.

    Returns:
      A locked ``ConfigDict``.

    Raises:
      FileNotFoundError: no such file or name; the available names are listed.
      ConfigError: the file cannot be used, or an override has a wrong key or value.
    """
    target, argument = _split_argument(path_or_name)
    file = _find_file(target)
    if file.suffix == ".json":
        if argument is not None:
            raise ConfigError(f"{file}: a JSON configuration takes no ':{argument}'")
        config = _load_json(file)
    else:
        config = _load_python(file, argument)
    apply_overrides(config, overrides, schema)
    to_plain(config)  # names a required value that is still open; lock() would not
    return config.lock()


def _split_argument(text: str) -> tuple[str, str | None]:
    match = re.fullmatch(r"(.+\.(?:py|json)|[\w-]+):(.*)", text)
    # A single letter before the colon is a Windows drive, not a name with an argument.
    if match and len(match.group(1)) > 1:
        return match.group(1), match.group(2)
    return text, None


def _find_file(target: str) -> Path:
    path = as_path(target).expanduser()
    if path.suffix in (".py", ".json"):
        candidates = [path]
        if path.parts[0] == "configs":
            candidates.append(packaged_config_dir().joinpath(*path.parts[1:]))
    elif len(path.parts) == 1:
        candidates = [packaged_config_dir() / f"{target}.py"]
    else:
        raise ConfigError(f"{target}: a configuration is a .py file, a .json file or a bare name")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    names = available_configs()
    raise FileNotFoundError(
        f"no configuration {target!r}{nearest(path.stem, names)} "
        f"Shipped configurations: {', '.join(names) or 'none'}"
    )


def _load_json(file: Path) -> ml_collections.ConfigDict:
    try:
        loaded = read_json(file)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(loaded).__name__}")
    return ml_collections.ConfigDict(_tuples(loaded))


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _load_python(file: Path, argument: str | None) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(f"_aqdetr_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses defined in the file look their module up here.
    sys.modules[module.__name__] = module
    try:
        spec.loader.exec_module(module)
        function = getattr(module, "get_config", None)
        if function is None:
            raise ConfigError(f"{file} defines no get_config()")
        takes_argument = bool(inspect.signature(function).parameters)
        if argument is not None and not takes_argument:
            raise ConfigError(f"{file}: get_config() takes no argument; drop ':{argument}'")
        config = function(argument) if argument is not None else function()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{file}: {type(error).__name__}: {error}") from error
    finally:
        del sys.modules[module.__name__]
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = ml_collections.ConfigDict(_tuples(from_dataclass(config)))
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"{file}: get_config() must return an ml_collections.ConfigDict, "
            f"found {type(config).__name__}"
        )
    return config


# --- overrides -----------------------------------------------------------------------------------


def apply_overrides(
    config: ml_collections.ConfigDict, overrides: Sequence[str], schema: type | None = None
) -> None:
    """Applies ``a.b=value`` overrides in place, in order; see :func:`load_config_file`.

    A field that others are derived from (``FieldReference``) updates them too.

    Raises:
      ConfigError: unknown key (names the nearest real one), a group instead of a value, or a
        value that cannot be read as the field's type.
    """
    for override in overrides:
        key, separator, text = override.partition("=")
        key = OVERRIDE_PREFIX.sub("", key.strip())
        if not separator:
            raise ConfigError(f"override {override!r} has no value: write {key}=VALUE")
        _apply_one(config, key.split("."), text, schema)


def _apply_one(
    config: ml_collections.ConfigDict, keys: list[str], text: str, schema: type | None
) -> None:
    node, annotation, path = config, schema, "config"
    for position, key in enumerate(keys):
        hints = _group_hints(annotation, node)
        if key not in node and key not in hints:
            raise ConfigError(unknown_key(path, key, set(node.keys()) | set(hints)))
        annotation, path = hints.get(key), f"{path}.{key}"
        if position == len(keys) - 1:
            _set_leaf(node, key, text, annotation, path)
            return
        if key not in node and _group_hints(annotation):
            with node.unlocked():
                node[key] = ml_collections.ConfigDict()
        present = _peek(node, key)
        if not isinstance(present, ml_collections.ConfigDict):
            raise ConfigError(f"{path} is a value, not a group: it has no {keys[position + 1]!r}")
        node = present


def _set_leaf(
    node: ml_collections.ConfigDict, key: str, text: str, annotation: Any, path: str
) -> None:
    present = _peek(node, key)
    group = present if isinstance(present, ml_collections.ConfigDict) else _group_hints(annotation)
    if group:
        raise ConfigError(f"{path} is a group; set one of its keys: {', '.join(sorted(group))}")
    if annotation is None:
        annotation = _infer_annotation(node, key, present)
    value = convert(annotation, _parse(text, annotation, path), path)
    if dataclasses.is_dataclass(value) or isinstance(value, tuple):
        value = _tuples(to_plain(value))
    with node.unlocked(), node.ignore_type():
        node[key] = value


def _peek(node: ml_collections.ConfigDict, key: str) -> Any:
    """The value of a key, or None for an absent key or a required value that is still open."""
    try:
        return node.get(key)
    except config_dict_lib.RequiredValueError:
        return None


def _group_hints(annotation: Any, node: Any = None) -> dict[str, Any]:
    """Field types of a dataclass annotation (also ``X | None``); empty for any other type.

    Args:
      annotation: of several dataclasses it is that which the keys of ``node`` are of.
      node: keys that are given already.
    """
    arguments = typing.get_args(annotation)
    for candidate in (annotation, group_of(arguments, node), *arguments):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            if typing.get_origin(annotation) is tuple:
                return {}
            return typing.get_type_hints(candidate)
    return {}


def _infer_annotation(node: ml_collections.ConfigDict, key: str, present: Any) -> Any:
    if isinstance(present, (tuple, list)):
        kinds = {type(item) for item in present}
        if kinds == {int, float}:
            kinds = {float}
        simple = kinds.pop() if len(kinds) == 1 else Any
        return tuple[simple if simple in (bool, int, float, str) else Any, ...]  # type: ignore[misc]
    if present is not None:
        return type(present)
    try:
        declared = node.get_ref(key).get_type()  # a placeholder knows its type
    except ValueError:  # a plain None does not
        return Any
    return declared | None


def _parse(text: str, annotation: Any, path: str) -> Any:
    """Reads command-line text as the Python value that the annotation asks for, unchecked."""
    arguments = typing.get_args(annotation)
    is_union = typing.get_origin(annotation) in (Union, types.UnionType)
    if text in ("None", "none", "null") and type(None) in (*arguments, annotation):
        return None
    options = [a for a in arguments if a is not type(None)] if is_union else [annotation]
    for option in options:
        if option is bool and text.lower() in (*_TRUE, *_FALSE):
            return text.lower() in _TRUE
    if str in options or any(isinstance(c, str) for a in options for c in _literals(a)):
        return ast.literal_eval(text) if re.fullmatch(r"'[^']*'|\"[^\"]*\"", text) else text
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError) as error:
        if any(typing.get_origin(o) is tuple and str in typing.get_args(o) for o in options):
            return tuple(part.strip() for part in text.strip("()[] ").split(",") if part.strip())
        if Any in options:
            return text
        names = " or ".join(getattr(option, "__name__", str(option)) for option in options)
        raise ConfigError(f"{path}: cannot read {text!r} as {names}") from error


def _literals(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


# --- differences ---------------------------------------------------------------------------------


def flatten_config(config: Any) -> dict[str, Any]:
    """Flattens a configuration to ``{"a.b": value}``; sequences and empty groups are values.

    Args:
      config: ``ConfigDict``, mapping or dataclass.
    """
    flat: dict[str, Any] = {}

    def visit(prefix: str, node: Any) -> None:
        if isinstance(node, dict) and (node or not prefix):
            for key, item in node.items():
                visit(f"{prefix}.{key}" if prefix else key, item)
        else:
            flat[prefix] = node

    visit("", to_plain(config))
    return flat


def changed_keys(old: Any, new: Any) -> list[str]:
    """Dotted keys whose values differ; ``(1, 2)`` equals ``[1, 2]`` and ``1`` equals ``1.0``."""
    before, after = flatten_config(old), flatten_config(new)
    keys = [*before, *(key for key in after if key not in before)]
    return [key for key in keys if not _same(before.get(key, _ABSENT), after.get(key, _ABSENT))]


def config_diff(old: Any, new: Any) -> list[str]:
    """Lists the differences of two configurations as ``"a.b: old -> new"``, in file order."""
    before, after = flatten_config(old), flatten_config(new)

    def show(flat: dict[str, Any], key: str) -> str:
        return repr(flat[key]) if key in flat else _ABSENT

    return [f"{key}: {show(before, key)} -> {show(after, key)}" for key in changed_keys(old, new)]


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    return bool(left == right)
