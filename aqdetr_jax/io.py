"""Reading and writing the small JSON files of a run (results, manifests, reports), and folders.

A file or folder is either complete or absent: on a disk it is written beside its target and renamed
(a file is flushed to the disk first); in a store an object appears whole anyway, and a folder's
mark is put there last. NaN and infinity are refused both ways, because they are not JSON and
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
from typing import Any, cast

import numpy as np

from aqdetr_jax.paths import as_path, is_local
from aqdetr_jax.stores.paths import ObjectPath

UNFINISHED = ".unfinished"
"""In a store: name of an object of a folder that is being replaced."""


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
    target = as_path(path)
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
    target = as_path(path)
    if not is_local(target):
        target.write_bytes(data)
        return target
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


def is_empty_folder(path: Path) -> bool:
    """Whether a path is a folder, no link to one, that holds nothing."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def folder_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of all files of a folder and of those in it."""
    return sum(file.stat().st_size for file in as_path(path).rglob("*") if file.is_file())


def check_folder(path: str | os.PathLike[str], mark: str) -> Path:
    """Whether a folder may be written, as an absolute path.

    Args:
      path: the folder.
      mark: name of a file that every folder of its kind holds.

    Raises:
      FileExistsError: something of another kind is there, other than an empty folder.
    """
    target = as_path(path).absolute()
    ours = (target / mark).is_file() or (target / UNFINISHED).is_file()
    if not ours and target.exists() and not is_empty_folder(target):
        raise FileExistsError(
            f"{target} exists and holds no {mark}, so that it is not replaced; choose another name"
        )
    return target


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], mark: str) -> Iterator[Path]:
    """An empty folder to fill, which becomes ``path`` when the body ends, and never before.

    An earlier folder of the same kind is replaced; if the body fails, it is left as it was, and so
    are the folders around it.

    Args:
      path: the folder.
      mark: see ``check_folder``.

    Raises:
      FileExistsError: something of another kind is there.
    """
    target = check_folder(path, mark)
    partial = partial_folder(target)
    with no_new_folders(target):
        partial.mkdir(parents=True)
        try:
            yield partial
        except BaseException:
            remove_folder(partial)
            raise
    put_in_place(partial, target, mark)


@contextlib.contextmanager
def no_new_folders(path: Path) -> Iterator[None]:
    """If the body fails, the folders around a path that were not there before go, if empty."""
    missing = [f for f in path.parents if not f.exists()] if is_local(path) else []
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def partial_folder(target: Path) -> Path:
    """Where a folder is filled before it takes its place; what an earlier try left is removed."""
    partial = target.with_name(f".{target.name}.partial")
    for leftover in (partial, target.with_name(f".{target.name}.old")):
        remove_folder(leftover)
    return partial


def put_in_place(partial: Path, target: Path, mark: str) -> None:
    """Makes a filled folder the one of a name; an earlier one is gone.

    On a disk by renaming. In a store, which cannot rename, the old mark goes first and the new one
    comes last: in between the folder is none of its kind, and the next writer may replace it.

    Args:
      partial: the filled folder; gone afterwards.
      target: its name.
      mark: name of the file that says that the folder is whole.
    """
    if is_local(target):
        old = target.with_name(f".{target.name}.old")
        if target.exists():
            target.rename(old)
        partial.rename(target)
        remove_folder(old)
        return
    here, there = cast(ObjectPath, partial), cast(ObjectPath, target)
    (there / UNFINISHED).write_bytes(b"")
    (there / mark).unlink(missing_ok=True)
    for file in there.files():
        if file.name != UNFINISHED:
            file.unlink(missing_ok=True)
    names = sorted(str(file.relative_to(here)) for file in here.files())
    for name in sorted(names, key=lambda name: name == mark):
        (here / name).copy_to(there / name)
    (there / UNFINISHED).unlink()
    here.remove_tree()


def remove_folder(path: Path) -> None:
    """Removes a folder with all that is in it, as far as that goes; none is as well."""
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        cast(ObjectPath, path).remove_tree()


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
    source = as_path(path)
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
