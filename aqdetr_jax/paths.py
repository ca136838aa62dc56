"""The one door to files: paths of this machine's disks and of object stores.

Whatever a user names becomes a path by :func:`as_path`: a ``pathlib.Path``, or for ``gs://...`` and
``s3://...`` a path with the same methods (see :mod:`aqdetr_jax.stores.paths`). Nobody else opens,
lists, moves or removes files by other means; :mod:`aqdetr_jax.io` writes files and folders whole.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

from aqdetr_jax.stores.listing import snapshot_of
from aqdetr_jax.stores.paths import ObjectPath, is_remote
from aqdetr_jax.stores.requests import SCHEMES

_AT_ONCE = 64  # requests to a store
_Result = TypeVar("_Result")


def as_path(path: str | os.PathLike[str]) -> Path:
    """What a user names as a path: of a disk, or of an object store with the same methods.

    Args:
      path: of a file or folder, or ``gs://bucket/name``, ``s3://bucket/name``.

    Raises:
      ValueError: an address of another kind.
    """
    if is_remote(path):
        found = ObjectPath(path)
        _ = found.bucket
        return cast(Path, found)
    text = os.fspath(path)
    if isinstance(text, str) and (match := re.match(r"([A-Za-z][\w+.-]*)://", text)):
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ValueError(
            f"{printable(text)}: {match[1]}:// cannot be opened; paths are of this machine, or "
            f"start with {known}"
        )
    return Path(path)


def is_file(path: Path) -> bool:
    """Whether a path is a file; of names that no file can have, it says no."""
    return os.path.isfile(path) if is_local(path) else path.is_file()


def exists(path: Path) -> bool:
    """Whether something is there; of names that no file can have, it says no."""
    return os.path.exists(path) if is_local(path) else path.exists()


def files_of(folder: Path) -> Iterator[Path]:
    """All files in a folder, at any depth; links to folders are not followed."""
    if not is_local(folder):
        yield from sorted(cast(Any, folder).files())
        return
    for inside, _, files in os.walk(folder):
        yield from (Path(inside, name) for name in sorted(files))


def each(function: Callable[[Path], _Result], paths: Iterable[Path]) -> Iterator[_Result]:
    """``map`` over files to read: many at a time where each has to be waited for, in a store."""
    paths = list(paths)
    if not paths or is_local(paths[0]):
        yield from map(function, paths)
        return
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="store") as threads:
        # The snapshot is of the calling thread's context.
        contexts = (contextvars.copy_context() for _ in paths)
        yield from threads.map(lambda c, path: c.run(function, path), contexts, paths)


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one of this machine's file systems."""
    return not is_remote(path)


@contextlib.contextmanager
def snapshot(folder: Path) -> Iterator[None]:
    """Within the body, what is in a store's folder is told from one listing, made at its start.

    For readers that ask after thousands of files, one by one.
    """
    if is_local(folder):
        yield
    else:
        with snapshot_of(cast(ObjectPath, folder)):
            yield


@contextlib.contextmanager
def local_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder of this machine for what can write to no other; its files are at ``path`` after.

    Args:
      path: the folder wanted: of this machine, it is the one given; of a store, a temporary one
        is given, and what it holds is sent when the body ends, also if it failed.
    """
    target = as_path(path)
    if is_local(target):
        yield target
        return
    with tempfile.TemporaryDirectory(prefix="aqdetr_") as name:
        try:
            yield Path(name)
        finally:
            send_folder(Path(name), target)


def send_folder(folder: Path, target: Path) -> None:
    """Copies the files of a folder of this machine to a folder of a store."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            (target / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())


@contextlib.contextmanager
def local_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file as one of this machine, for what can read no other.

    Args:
      path: the file; one of a store is fetched to a temporary file of the same name.

    Raises:
      FileNotFoundError: there is none.
    """
    source = as_path(path)
    if is_local(source):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="aqdetr_") as name:
        copy = Path(name, source.name)
        fetch_file(source, copy)
        yield copy


def fetch_file(source: Path, target: Path) -> None:
    """Copies a file of a store to one of this machine, which appears whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with source.open("rb") as reader, partial.open("wb") as writer:
            shutil.copyfileobj(reader, writer, 16 * 1024**2)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


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
