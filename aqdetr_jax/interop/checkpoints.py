"""Foreign checkpoints as files: arrays by name, and what is said of the model they belong to.

A source is a file of ``torch.save`` (``.pth``, ``.pt``, ``.bin``), a ``.safetensors`` file, or a
model folder of Hugging Face transformers: ``config.json`` beside one weights file or beside several
and their index. Nothing in a source is run or imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from aqdetr_jax.interop.source import shown
from aqdetr_jax.interop.torch_file import MAX_BYTES, Namespace, parameters, read_torch
from aqdetr_jax.io import read_json

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
SAFETENSORS = ".safetensors"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Weights of a model folder, the preferred first; NAME.index.json stands for several files."""

MAX_JSON = 16 * 1024**2
"""Bytes of a JSON file in a model folder."""


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
    """

    name: str
    state: dict[str, np.ndarray]
    settings: dict[str, Any]
    settings_from: Literal["", "config.json", "args"]
    preprocessing: dict[str, Any]
    hashes: dict[str, str]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a source.

    Args:
      path: file or folder, see the module.

    Returns:
      ``Checkpoint``; floating-point arrays are float32, whatever they were stored as.

    Raises:
      FileNotFoundError: there is none, or a file of the folder is missing.
      ValueError: a file is not what its name says; the message names it and what to do.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    state, arguments = _weights(path)
    where: Literal["args", ""] = "args" if arguments else ""
    hashes = {path.name: _sha256(path)}
    return Checkpoint(str(path), _float32(state, path), arguments, where, {}, hashes)


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
    Path(path).write_bytes(save(dict(state), metadata={"format": "pt"}))


def _folder(path: Path) -> Checkpoint:
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
        found, _ = _weights(file)
        missing = [name for name in wanted if name not in found]
        if missing:
            raise ValueError(f"{file}: lacks {missing[0]}, which the folder's index says it holds")
        twice = [name for name in found if name in state]
        if twice:
            raise ValueError(f"{file}: holds {twice[0]}, as another file of the folder does")
        state |= found
    return Checkpoint(
        str(path),
        _float32(state, path),
        settings,
        "config.json",
        _object(preprocessing) if preprocessing.is_file() else {},
        {file.name: _sha256(file) for file in files},
    )


def _weight_files(path: Path) -> dict[Path, list[str]]:
    """The weights files of a folder, each with the names that its index says it holds."""
    for name in WEIGHTS:
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            return {path / name: []}
        if index.is_file():
            return _indexed(index)
    there = ", ".join(sorted(child.name for child in path.iterdir())[:10])
    raise FileNotFoundError(f"{path} holds neither {' nor '.join(WEIGHTS)}; it holds: {there}")


def _indexed(index: Path) -> dict[Path, list[str]]:
    """The files that an index names."""
    mapping = _object(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise ValueError(f"{index}: holds no weight_map, which says what is in which file")
    files: dict[Path, list[str]] = {}
    for name, file in mapping.items():
        if not isinstance(file, str) or file != Path(file).name or file in ("", ".."):
            raise ValueError(f"{index}: {shown(str(file))!r} is not the name of a file beside it")
        files.setdefault(index.parent / file, []).append(name)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{index} names {file.name}, which is not there: fetch the whole folder"
            )
    if sum(file.stat().st_size for file in files) > MAX_BYTES:
        raise ValueError(f"{index}: names files of more than {MAX_BYTES} bytes together")
    return files


def _weights(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of one file by name, and the run arguments in it (empty = none)."""
    _refuse_other_things(path)
    if path.suffix == SAFETENSORS:
        return _safetensors(path), {}
    if path.suffix in TORCH_SUFFIXES:
        value = read_torch(path)
        state = parameters(value, path)
        arguments = value.get("args") if state is not value else None
        return state, arguments.attributes if isinstance(arguments, Namespace) else {}
    raise ValueError(
        f"{path}: unknown kind of file; known are {', '.join((*TORCH_SUFFIXES, SAFETENSORS))} "
        "and model folders of transformers"
    )


def _refuse_other_things(path: Path) -> None:
    """Errors for what a failed download leaves behind."""
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
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: has more than {MAX_BYTES} bytes")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: is no safetensors file, or is damaged ({error})") from error


def _float32(state: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """The arrays with floating-point numbers as float32.

    Raises:
      ValueError: a number is not finite.
    """
    result = {}
    for name, array in state.items():
        if np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16:
            array = np.asarray(array, np.float32)
            if not np.isfinite(array).all():
                raise ValueError(f"{path}: {name} holds NaN or infinity: the file is damaged")
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
