"""Object stores as paths: ``gs://bucket/name`` with the methods of ``pathlib.Path``.

Only :mod:`aqdetr_jax.io` and this module know that there are such paths; everybody else gets one
from ``io.as_path`` and uses it as any other. The bytes go through fsspec (gcsfs, s3fs), which
Orbax uses as well, so that one set of credentials and one ``STORAGE_EMULATOR_HOST`` hold for all.

What differs from a disk, and what is made of it:

* An object appears whole or not at all: a file that is written is sent when it is closed, and not
  if its writer failed. Nothing can be appended to.
* There are no folders, only names with slashes in them: making one does nothing, and a folder
  exists as long as something is in it.
* There is no rename: a file is copied (inside the store) and the old one removed.
* A store has bad minutes: what may pass is tried again for ``requests.PATIENCE`` seconds, with a
  line that says so; what stays is a ``StoreError`` that names the object, the try and the reason.
  "Not there" is an answer; no answer is never taken for it.
"""

from __future__ import annotations

import errno
import fnmatch
import io
import os
import posixpath
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from aqdetr_jax.stores.listing import snapshot_with
from aqdetr_jax.stores.requests import SCHEMES, call, not_found
from aqdetr_jax.stores.streams import Reader, Text, Upload

CHUNK = 16 * 1024**2
"""Bytes that a large object is read in at a time."""


def is_remote(path: object) -> bool:
    """Whether a path is one of an object store that is known."""
    return isinstance(path, ObjectPath) or str(path).startswith(tuple(f"{s}://" for s in SCHEMES))


class ObjectPath(PurePosixPath):
    """A name in an object store; see the module. Written and passed on as ``scheme://...``.

    The parts of ``gs://bucket/a`` are ``/``, ``gs``, ``bucket`` and ``a``, so that the algebra of
    paths is the standard library's.
    """

    if sys.version_info < (3, 12):

        def __new__(cls, *parts: str | os.PathLike[str]) -> ObjectPath:
            """The path of the parts."""
            return super().__new__(cls, _posix(parts))

    else:

        def __init__(self, *parts: str | os.PathLike[str]) -> None:
            super().__init__(_posix(parts))

    def __str__(self) -> str:
        text = super().__str__()
        return _url(text) if self._place() else text

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __bytes__(self) -> bytes:
        return os.fsencode(str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self),)

    def __hash__(self) -> int:
        return hash(str(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def _place(self) -> bool:
        """Whether this is a whole path; what ``relative_to`` gives is none."""
        parts = self.parts
        return len(parts) > 1 and parts[0] == "/" and parts[1] in SCHEMES

    @property
    def bucket(self) -> str:
        """Name of the bucket."""
        if len(self.parts) < 3 or not self._place():
            raise ValueError(f"{self} names no bucket: write {self.parts[1]}://BUCKET/NAME")
        return self.parts[2]

    @property
    def key(self) -> str:
        """Name within the bucket; "" is the bucket itself."""
        return "/".join(self.parts[3:])

    @property
    def parent(self) -> ObjectPath:
        """The folder; of a bucket it is the bucket."""
        return super().parent if len(self.parts) > 3 or not self._place() else self

    # --- what is there --------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether an object has the name, or is inside it."""
        return self._info() is not None

    def is_file(self) -> bool:
        """Whether an object has the name."""
        info = self._info()
        return info is not None and info["type"] == "file"

    def is_dir(self) -> bool:
        """Whether objects are inside it."""
        info = self._info()
        return info is not None and info["type"] == "directory"

    def is_symlink(self) -> bool:
        """Stores have no links."""
        return False

    def samefile(self, other: str | os.PathLike[str]) -> bool:
        """Whether it is the same name."""
        return str(self) == str(other)

    def stat(self) -> Any:
        """``st_size`` in bytes and ``st_mtime_ns``.

        Raises:
          FileNotFoundError: nothing has the name.
        """
        info = self._info()
        if info is None:
            raise not_found(self)
        changed: Any = info.get("mtime")
        moment = int(changed.timestamp() * 1e9) if hasattr(changed, "timestamp") else 0
        return types.SimpleNamespace(
            st_size=int(info.get("size") or 0), st_mtime_ns=moment, st_mtime=moment / 1e9
        )

    def iterdir(self) -> Iterator[ObjectPath]:
        """What is in the folder.

        Raises:
          FileNotFoundError: there is no such folder.
          NotADirectoryError: it is an object.
        """
        found = self._list()
        if not found and self.key:
            if self.is_file():
                raise NotADirectoryError(errno.ENOTDIR, "is a file, not a folder", str(self))
            raise not_found(self)
        yield from (self / name for name in sorted(found))

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """What matches a pattern; ``**`` is any number of folders."""
        yield from _matches(self, tuple(PurePosixPath(pattern).parts), pattern.endswith("/"))

    def rglob(self, pattern: str) -> Iterator[ObjectPath]:
        """Objects (not folders) at any depth whose last part matches."""
        for path in self.files():
            if fnmatch.fnmatchcase(path.name, pattern):
                yield path

    def files(self) -> Iterator[ObjectPath]:
        """All objects inside, at any depth, by one listing."""
        known = snapshot_with(self)
        if known is not None:
            yield from known.files(self)
            return
        root = self._name()
        for found in call(self, "list", lambda fs: fs.find(root)):
            inside = posixpath.relpath(found, root)
            if not found.endswith("/") and inside != ".":
                yield self / inside

    # --- reading --------------------------------------------------------------------------------

    def read_bytes(self) -> bytes:
        """The content.

        Raises:
          FileNotFoundError: no such object.
        """
        return call(self, "read", lambda fs: fs.cat_file(self._name()))

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """The content as text; every kind of line end is a newline."""
        data = io.BytesIO(self.read_bytes())
        return io.TextIOWrapper(data, encoding=encoding or "utf-8", errors=errors).read()

    def open(
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> Any:
        """A file object for reading, or for writing a new object that appears when it is closed."""
        del buffering
        kind = mode.replace("b", "").replace("t", "")
        raw: Any
        if kind == "r":
            size = self.stat().st_size
            small = size <= CHUNK
            raw = io.BytesIO(self.read_bytes()) if small else Reader(self, size)
            raw = raw if small else io.BufferedReader(raw, CHUNK)
        elif kind == "w":
            raw = Upload(self)
        else:
            raise io.UnsupportedOperation(f"{self}: an object store knows no mode {mode!r}")
        if "b" in mode:
            return raw
        return Text(raw, encoding=encoding or "utf-8", errors=errors, newline=newline)

    # --- writing --------------------------------------------------------------------------------

    def write_bytes(self, data: bytes | bytearray | memoryview) -> int:
        """Writes an object, whole."""
        call(self, "write", lambda fs: fs.pipe_file(self._name(), bytes(data)))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        """Writes an object of text, whole."""
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def create(self, data: bytes) -> bool:
        """Writes an object if there is none of that name; whether there was none.

        The one operation of a store that two processes cannot both succeed in.
        """
        try:
            call(self, "write", lambda fs: fs.pipe_file(self._name(), data, mode="create"))
        except FileExistsError:
            # Also after an answer that was lost on the way, when the second try meets the first.
            return self.read_bytes() == data
        return True

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Folders need not be made; errors for what is there already, as on a disk."""
        del mode, parents
        info = self._info() if self.key else None
        if info is not None and (info["type"] == "file" or not exist_ok):
            raise FileExistsError(errno.EEXIST, "exists", str(self))

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes an object."""
        try:
            call(self, "remove", lambda fs: fs.rm_file(self._name()))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self) -> None:
        """Removes everything inside, and the object of that name."""
        for path in self.files():
            path.unlink(missing_ok=True)
        self.unlink(missing_ok=True)

    def copy_to(self, target: ObjectPath) -> None:
        """Copies an object within the store."""
        call(self, "copy", lambda fs: fs.cp_file(self._name(), target._name()))

    def replace(self, target: str | os.PathLike[str]) -> ObjectPath:
        """Moves an object: copied, then removed here."""
        target = ObjectPath(target)
        self.copy_to(target)
        self.unlink(missing_ok=True)
        return target

    rename = replace

    def absolute(self) -> ObjectPath:
        """The path itself."""
        return self

    def resolve(self, strict: bool = False) -> ObjectPath:
        """Without ``.`` and ``..``."""
        del strict
        scheme, _, rest = str(self).partition("://")
        return ObjectPath(f"{scheme}://{posixpath.normpath(rest)}")

    def expanduser(self) -> ObjectPath:
        """The path itself."""
        return self

    # --- inside ---------------------------------------------------------------------------------

    def _name(self) -> str:
        return f"{self.bucket}/{self.key}" if self.key else self.bucket

    def _info(self) -> dict[str, Any] | None:
        """What fsspec says of the name; None: nothing has it."""
        known = snapshot_with(self)
        if known is not None:
            return known.info(self)
        if not self.key:  # to ask for a bucket itself takes a right that writing to it does not
            try:
                self._list(one=True)
            except FileNotFoundError:
                return None
            return {"type": "directory"}
        try:
            return call(self, "look up", lambda fs: fs.info(self._name()))
        except FileNotFoundError:
            return None

    def _list(self, one: bool = False) -> list[str]:
        """Names in the folder, without slashes; empty also if there is no such folder."""
        name = self._name()
        known = snapshot_with(self)
        if known is not None:
            return known.inside(self)
        if one and self.parts[1] == "gs":

            def ask(fs: Any) -> Any:
                return fs.call("GET", "b/{}/o", self.bucket, maxResults=1, json_out=True)

            call(self, "list", ask)
            return []
        try:
            found = call(self, "list", lambda fs: fs.ls(name, detail=False))
        except FileNotFoundError:
            if not self.key:
                raise
            return []
        paths = (path.rstrip("/") for path in found)
        return sorted({posixpath.basename(path) for path in paths if path != name})


def _posix(parts: Iterable[str | os.PathLike[str]]) -> str:
    """The parts as one path, ``gs://b/a`` as ``/gs/b/a``; the last one with a scheme counts."""
    texts = [os.fspath(part) for part in parts]
    for number in range(len(texts) - 1, -1, -1):
        if is_remote(texts[number]):
            scheme, _, rest = texts[number].partition("://")
            texts = [f"/{scheme}", rest.lstrip("/"), *texts[number + 1 :]]
            break
    return posixpath.join(*[t for t in texts if t]) if any(texts) else ""


def _url(text: str) -> str:
    """``/gs/b/a`` as ``gs://b/a``."""
    scheme, _, rest = text.lstrip("/").partition("/")
    return f"{scheme}://{rest}"


def _matches(folder: ObjectPath, parts: tuple[str, ...], folders: bool) -> Iterator[ObjectPath]:
    first, rest = parts[0], parts[1:]
    if "**" in parts:
        wanted = "/".join(parts).replace("**/", "*")
        inside = ((path, str(path.relative_to(folder))) for path in folder.files())
        yield from (path for path, name in inside if fnmatch.fnmatchcase(name, wanted))
        return
    names = [first]
    plain = not any(mark in first for mark in "*?[")
    if not plain:
        names = [name for name in folder._list() if fnmatch.fnmatchcase(name, first)]
    for name in names:
        path = folder / name
        if rest:
            yield from _matches(path, rest, folders)
        elif (not plain or path.exists()) and (not folders or path.is_dir()):
            yield path
