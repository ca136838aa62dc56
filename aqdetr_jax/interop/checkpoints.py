"""Foreign checkpoints as files: arrays by name, and what is said of the model they belong to.

A source is a file of ``torch.save`` (``.pth``, ``.pt``, ``.bin``, ``.ckpt``), a ``.safetensors``
file, or a model folder of Hugging Face transformers: ``config.json`` beside one weights file or
beside several and their index. Nothing in a source is run or imported.

A source is not believed about its size: its arrays have at most MAX_BYTES and MAX_GROWTH bytes for
each byte of their files, each array counted as if it had its own memory, and at most MAX_PARAMETERS
names. Names are one short printable line, so that they can stand in messages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from aqdetr_jax.interop.source import Malformed, shown
from aqdetr_jax.interop.torch_file import MAX_BYTES, MAX_PATH, Namespace, read_torch
from aqdetr_jax.interop.weight_sets import choose
from aqdetr_jax.io import read_json
from aqdetr_jax.paths import as_path, local_file

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SAFETENSORS = ".safetensors"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Weights of a model folder, the preferred first; NAME.index.json stands for several files."""

MAX_JSON = 16 * 1024**2
"""Bytes of a JSON file in a model folder."""

MAX_PARAMETERS = 10_000
"""Arrays of a source: every name is tried with every row of the tables."""

MAX_NAME = 200
"""Characters of an array's name; the longest official one has 70."""

MAX_GROWTH = 32
"""Bytes of a file's arrays for each of its own: a compressed file may have 20, a tensor that is
expanded to a larger shape without memory of its own any number."""

SAFETENSORS_TYPES = frozenset(
    {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
)
"""Types of arrays that are read, in the names of safetensors."""


@dataclass(frozen=True)
class Checkpoint:
    """What a source holds.

    Attributes:
      name: the source, for messages.
      state: arrays by foreign name.
      settings: what it says of its model: "config.json" of a model folder, "args" of a training
        checkpoint; empty if it says nothing.
      settings_from: where that is from, "" = nowhere.
      preprocessing: preprocessor_config.json of a model folder, empty if there is none.
      hashes: SHA-256 of each weights file, by file name.
      notes: what else the files hold.
    """

    name: str
    state: dict[str, np.ndarray]
    settings: dict[str, Any]
    settings_from: Literal["", "config.json", "args"]
    preprocessing: dict[str, Any]
    hashes: dict[str, str]
    notes: list[str] = field(default_factory=list)


def read_checkpoint(path: str | Path, weights: str | None = None) -> Checkpoint:
    """Reads a source.

    Args:
      path: file or folder, see the module.
      weights: which of several sets of weights, see ``weight_sets.choose``; None = the usual one.

    Returns:
      ``Checkpoint``; floating-point arrays are float32, whatever they were stored as.

    Raises:
      FileNotFoundError: there is none, or a file of the folder is missing.
      ValueError: a file is not what its name says; the message names it and what to do.
    """
    path = as_path(path)
    if not str(path).isprintable():
        raise ValueError(f"{shown(str(path), MAX_PATH)}: has a line break or the like: rename it")
    if path.is_dir():
        return _folder(path, weights)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    state, arguments, notes = _weights(path, weights)
    where: Literal["args", ""] = "args" if arguments else ""
    hashes = {path.name: _sha256(path)}
    return Checkpoint(str(path), _float32(state, path), arguments, where, {}, hashes, notes)


def write_safetensors(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by foreign name as the file that torch's libraries load.

    Args:
      path: the file; not yet there.
      state: arrays, as they are to be stored.

    Raises:
      ValueError: a number is not finite; the message names the array.
    """
    for name, array in state.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinity: it would be no model")
    # transformers refuses files that do not name the library whose layout they have. (Written from
    # here, because the library's own files are private to their user.)
    as_path(path).write_bytes(save(dict(state), metadata={"format": "pt"}))


def _folder(path: Path, weights: str | None) -> Checkpoint:
    """A model folder of transformers."""
    if (path / "manifest.json").is_file():
        raise ValueError(f"{path} is a run or a model folder of ours already: use it as it is")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} holds no config.json, so it is no model folder of transformers: give one, or "
            "the weights file itself"
        )
    settings = _object(path / "config.json")
    preprocessing = path / "preprocessor_config.json"
    files = _weight_files(path)
    state: dict[str, np.ndarray] = {}
    for file, wanted in files.items():
        found, _, _ = _weights(file, None)
        missing = [name for name in wanted if name not in found]
        if missing:
            raise ValueError(
                f"{file}: lacks {shown(missing[0])}, which the folder's index says it holds: fetch "
                "the whole folder again"
            )
        twice = [name for name in found if name in state]
        if twice:
            raise ValueError(f"{file}: holds {twice[0]}, as another file of the folder does")
        state |= found
    _check_names(list(state), path)
    state, notes = _chosen(state, weights, path)
    return Checkpoint(
        str(path),
        _float32(state, path),
        settings,
        "config.json",
        _object(preprocessing) if preprocessing.is_file() else {},
        {file.name: _sha256(file) for file in files},
        notes,
    )


def _weight_files(path: Path) -> dict[Path, list[str]]:
    """The weights files of a folder, each with the names that its index says it holds."""
    for name in WEIGHTS:
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            return {path / name: []}
        if index.is_file():
            return _indexed(index)
    there = shown(", ".join(sorted(child.name for child in path.iterdir())[:10]), 400)
    raise FileNotFoundError(f"{path} holds neither {' nor '.join(WEIGHTS)}; it holds: {there}")


def _indexed(index: Path) -> dict[Path, list[str]]:
    """The files that an index names."""
    mapping = _object(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise ValueError(f"{index}: holds no weight_map, which says what is in which file")
    files: dict[Path, list[str]] = {}
    for name, file in mapping.items():
        if not isinstance(file, str) or not _is_file_name(file):
            raise ValueError(
                f"{index}: {shown(repr(file))} is not the name of a weights file beside it"
            )
        files.setdefault(index.parent / file, []).append(name)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{index} names {file.name}, which is not there: fetch the whole folder"
            )
    if sum(file.stat().st_size for file in files) > MAX_BYTES:
        raise ValueError(f"{index}: names files of more than {MAX_BYTES} bytes together")
    return files


def _is_file_name(text: str) -> bool:
    """Whether a text names a weights file of a folder, and nothing elsewhere."""
    known = text.endswith((*TORCH_SUFFIXES, SAFETENSORS))
    return known and text == PurePath(text).name and text.isprintable() and len(text) <= MAX_NAME


def _weights(
    path: Path, weights: str | None
) -> tuple[dict[str, np.ndarray], dict[str, Any], list[str]]:
    """The arrays of one file by name, the run arguments in it (empty = none), and notes."""
    _refuse_other_things(path)
    if path.suffix == SAFETENSORS:
        value: Any = _safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        most = min(MAX_BYTES, MAX_GROWTH * path.stat().st_size)
        value = read_torch(path, max_bytes=most)
    else:
        raise ValueError(
            f"{path}: unknown kind of file; known are {', '.join((*TORCH_SUFFIXES, SAFETENSORS))} "
            "and model folders of transformers"
        )
    state, notes = _chosen(value, weights, path)
    _check_names(list(state), path)
    arguments = value.get("args") if state is not value else None
    return state, arguments.attributes if isinstance(arguments, Namespace) else {}, notes


def _chosen(value: Any, weights: str | None, path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """One set of weights and notes; see ``choose``."""
    try:
        return choose(value, weights)
    except Malformed as error:
        raise ValueError(f"{path}: {error}") from None


def _refuse_other_things(path: Path) -> None:
    """Errors for what no weights file is, and for what a failed download leaves behind."""
    if not path.is_file():  # to open a pipe would wait for its writer
        raise ValueError(f"{path}: is not a regular file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: has more than {MAX_BYTES} bytes, which no detector needs")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path}: is empty: fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: is a Git LFS pointer, not the file: run git lfs pull")
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(f"{path}: is a web page, not the file: fetch it by its direct address")


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file."""
    try:
        with local_file(path) as here, safe_open(here, framework="numpy") as file:
            names = list(file.keys())
            _check_names(names, path)
            for name in names:
                kind = file.get_slice(name).get_dtype()
                if kind not in SAFETENSORS_TYPES:
                    raise ValueError(
                        f"{path}: {name} is of the type {kind}, which is not read: save it as F32"
                    )
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: is no safetensors file, or is damaged ({shown(str(error))}): fetch it again"
        ) from error


def _check_names(names: list[str], path: Path) -> None:
    """Bounds the number and the form of names."""
    if len(names) > MAX_PARAMETERS:
        raise ValueError(
            f"{path}: holds {len(names)} arrays; a detector has at most {MAX_PARAMETERS}"
        )
    for name in names:
        if len(name) > MAX_NAME or not name.isprintable():
            raise ValueError(
                f"{path}: holds an array of the name {shown(name)}; names are of up to {MAX_NAME} "
                "printable characters"
            )


def _float32(state: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """The arrays with floating-point numbers as float32.

    Raises:
      ValueError: a number is not finite.
    """
    result = {}
    for name, array in state.items():
        if np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16:
            with np.errstate(over="ignore"):  # said by what follows
                array = np.asarray(array, np.float32)
            if not np.isfinite(array).all():
                raise ValueError(
                    f"{path}: {name} holds NaN or infinity as float32: the file is damaged, or of "
                    "a run that diverged"
                )
        result[name] = array
    return result


def _object(path: Path) -> dict[str, Any]:
    """A JSON file whose value is an object."""
    value = read_json(path, max_bytes=MAX_JSON)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
