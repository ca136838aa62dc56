"""Reading and writing the small JSON files of a run (results, manifests, reports), and folders.

A file or folder is either complete or absent: it is written beside its target and renamed (a file
is flushed to the disk first). NaN and infinity are refused both ways, because they are not JSON and
because a NaN in a results file is a failed run that looks like a finished one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def write_json_atomic(path: str | os.PathLike[str], obj: Any, *, indent: int | None = 2) -> Path:
    """Writes ``obj`` as JSON so that a reader never sees half a file.

    NumPy and JAX scalars and arrays become numbers and lists, paths become strings (bytes of a
    name that are no text as escapes, from which the name can be made again). The parent folder is
    created when missing.

    Args:
      path: the target file; replaced if it exists.
      obj: what ``json`` can write, plus NumPy/JAX scalars and arrays and ``pathlib`` paths.
      indent: spaces per level; None writes one line.

    Returns:
      The path written.

    Raises:
      ValueError: a float is NaN or infinite; the message names the key.
      TypeError: an object has no JSON form.
      OSError: the folder cannot be written; an earlier file at ``path`` is left untouched.
    """
    target = Path(path)
    plain = _plain(obj, "$", target)
    text = json.dumps(plain, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    return write_text_atomic(target, text)  # Python's escape of a lone surrogate is JSON's too


def write_text_atomic(path: str | os.PathLike[str], text: str) -> Path:
    """Writes UTF-8 text (lone surrogates as escapes); see ``write_bytes_atomic``."""
    return write_bytes_atomic(path, text.encode("utf-8", "backslashreplace"))


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> Path:
    """Writes a file so that a reader never sees half of it.

    Args:
      path: the target file; replaced if it exists, its folder is made when missing.
      data: the content.

    Returns:
      The path written.

    Raises:
      OSError: the folder cannot be written; an earlier file at ``path`` is left untouched.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Part of the name only: with all of it, the temporary name could be too long where the name
    # itself is not.
    handle, temporary = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.name[:16]}.", suffix=".tmp"
    )
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes the file private; results are meant to be read by others.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def printable(name: object, most: int = 4096) -> str:
    """A name as one line that any file and terminal takes.

    Line breaks, control characters and bytes that are no text become escapes.

    Args:
      name: a name, message or path.
      most: longer texts are cut to their first 100 characters; no path is longer than 4096.
    """
    text = os.fsdecode(name) if isinstance(name, os.PathLike) else str(name)
    if len(text) > most:
        text = f"{text[:100]}... ({len(text)} characters)"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def is_empty_folder(path: Path) -> bool:
    """Whether a path is a folder, no link to one, that holds nothing."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def folder_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of all files of a folder and of those in it."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


def check_folder(path: str | os.PathLike[str], mark: str) -> Path:
    """Whether a folder may be written, as an absolute path.

    Args:
      path: the folder.
      mark: name of a file that every folder of its kind holds.

    Raises:
      FileExistsError: something of another kind is there, other than an empty folder.
    """
    target = Path(path).absolute()
    if target.exists() and not (target / mark).is_file() and not is_empty_folder(target):
        raise FileExistsError(
            f"{target} exists and holds no {mark}, so that it is not replaced; choose another name"
        )
    return target


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], mark: str) -> Iterator[Path]:
    """An empty folder to fill, which becomes ``path`` when the body ends, and never before.

    An earlier folder of the same kind is replaced; if the body fails, it is left as it was.

    Args:
      path: the folder.
      mark: see ``check_folder``.

    Raises:
      FileExistsError: something of another kind is there.
    """
    target = check_folder(path, mark)
    partial = target.with_name(f".{target.name}.partial")
    old = target.with_name(f".{target.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def read_json(path: str | os.PathLike[str], *, max_bytes: int = 2 * 1024**3) -> Any:
    """Reads a JSON file strictly.

    Args:
      path: the file.
      max_bytes: files larger than this are refused before they are read.

    Returns:
      The parsed value.

    Raises:
      FileNotFoundError: no file at ``path``.
      ValueError: the file is too large, is not UTF-8 JSON, or holds NaN or Infinity.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such JSON file")
    size = source.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{source}: {size} bytes is above the limit of {max_bytes}")

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number; the file was not written by us")

    try:
        text = source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text ({error.reason})") from error
    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{source}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except RecursionError:
        raise ValueError(f"{source}: nested too deeply to be read") from None
    except ValueError as error:  # ours, or Python's for a number of thousands of digits
        raise ValueError(f"{source}: {error}") from error


def _umask() -> int:
    # There is no way to read the umask without setting it; keep the window as short as possible.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _plain(value: Any, where: str, target: Path) -> Any:
    """Turns ``value`` into JSON types; ``where`` is the JSONPath of the value for messages."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{target}: {where} is {value}, which JSON cannot hold")
        return value
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise TypeError(f"{target}: key {key!r} at {where} is not a string or an integer")
        return {str(k): _plain(v, f"{where}.{k}", target) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]", target) for i, v in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic) or hasattr(value, "__array__"):
        return _plain(np.asarray(value).tolist(), where, target)
    raise TypeError(f"{target}: {where} is a {type(value).__name__}, which has no JSON form")
