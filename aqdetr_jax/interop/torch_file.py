"""Reads the files of ``torch.save`` without torch, and without running anything they name.

Such a file is a Python pickle with the tensors' memory beside it, and a pickle is a program. Here
an interpreter of our own (:mod:`aqdetr_jax.interop.restricted_pickle`) runs it over the names of
:mod:`aqdetr_jax.interop.torch_names`, none of which is imported: each stands for a function or a
value of ours. What a checkpoint of tensors, plain containers and ``argparse`` arguments needs is
there; every other name is refused, and there is no fallback.

Two formats are read: the zip file of torch 1.6 and later, and the stream of pickles before it. The
tar file before torch 0.1.10 is refused. Of PyTorch's more special tensors none is read: sparse,
quantized, complex, negated, of float8 or unsigned integers over 8 bits, of subclasses; nor are
NumPy arrays.

Nothing a file says about sizes is believed before it is compared with the file's own size:

* the pickle: MAX_PICKLE bytes, and the bounds of ``restricted_pickle`` and ``plain_tree``;
* the zip file: the bounds of ``zip_members``;
* memory: each storage is read once, if a tensor of the result lies in it, and tensors are views of
  it that never leave it. So arrays take no more memory than the storages have bytes, which in a
  file that is not compressed is less than the file (while one storage is inflated or its byte
  order changed, that one counts twice);
* arrays: the sum of their bytes, a tensor counted as if it had its own memory and at each of its
  uses, is at most ``max_bytes``; so is the sum of the storages' bytes. A copy of every array takes
  no more than that, whatever the strides.
"""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from aqdetr_jax.interop.plain_tree import expand
from aqdetr_jax.interop.restricted_pickle import load
from aqdetr_jax.interop.source import Malformed, Source, shown
from aqdetr_jax.interop.torch_arrays import Arrays, Storages
from aqdetr_jax.interop.torch_names import NAMES, REFUSED, Storage
from aqdetr_jax.interop.zip_members import (
    Member,
    check,
    list_members,
    read_member,
    stored_range,
)
from aqdetr_jax.paths import as_path

MAX_BYTES = 8 * 1024**3
"""Bytes of all arrays, unless the caller says otherwise."""

MAX_PICKLE = 256 * 1024**2
"""Bytes of the pickle in a zip file."""

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
"""The first two pickles of the format before torch 1.6."""

ZIP_VERSIONS = range(1, 11)
"""Versions of the zip format that torch reads."""

MAX_PATH = 4096
"""Characters of the file's own name in messages."""


class TorchFileError(ValueError):
    """A file that is no checkpoint of tensors and plain containers; the message names it."""


@dataclass(frozen=True)
class Namespace:
    """What was an ``argparse.Namespace``.

    Attributes:
      attributes: its attributes; a name can be any text that does not begin with two underscores.
    """

    attributes: dict[str, Any]


def read_torch(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Any:
    """Reads a file of ``torch.save`` into plain containers and arrays.

    Args:
      path: the file.
      max_bytes: the most that the file's arrays may have together, each counted as if it had its
        own memory.

    Returns:
      What was saved: dict (also for OrderedDict and Counter), list, tuple (also for torch.Size),
      set, frozenset, str (also for torch.device, torch.dtype and paths of pathlib), bytes, int,
      float, bool (these three also for single numbers of NumPy), None, :class:`Namespace`, and
      NumPy arrays for tensors, parameters and storages: float16, float32, float64, bfloat16 (of
      ml_dtypes), int8, int16, int32, int64, uint8 or bool, in the machine's byte order, of the
      tensor's shape and strides. Arrays are read-only: they share memory where
      the tensors did. Attributes of containers and tensors are dropped.

    Raises:
      TorchFileError: the file is of another format, cut short or corrupt, names something outside
        the lists of this module, or passes one of its bounds; the message names the file.
      OSError: the file cannot be opened or read.
    """
    name = shown(os.fspath(path), MAX_PATH)
    if max_bytes < 0:
        raise ValueError(f"max_bytes: {max_bytes} is negative")
    try:
        source = as_path(path)
        size = source.stat().st_size  # errors for what is not there
        if not source.is_file():
            raise Malformed("is not a regular file")
        with source.open("rb") as file:
            # NumPy refuses sizes that no machine has in words of its own.
            return _read(file, size, min(max_bytes, sys.maxsize // 2))
    except Malformed as error:
        raise TorchFileError(f"{name}: {error}") from None
    except MemoryError:
        raise TorchFileError(f"{name}: needs more memory than there is") from None


def _read(file: BinaryIO, file_size: int, max_bytes: int) -> Any:
    """Reads either format; the file stands at its start."""
    head = file.read(4)
    if head == b"PK\x03\x04":
        return _read_zip(file, file_size, max_bytes)
    if head[:1] == b"\x80":
        file.seek(0)
        return _read_stream(file, file_size, max_bytes)
    file.seek(257)
    if file.read(5) == b"ustar":
        raise Malformed("is in the tar format of torch before 0.1.10, which is not read")
    if head == b"vers":
        raise Malformed("is no file of torch.save; perhaps a Git LFS pointer to one")
    raise Malformed("is no file of torch.save, or is cut short: fetch it again")


def _read_zip(file: BinaryIO, file_size: int, max_bytes: int) -> Any:
    """Reads the format of torch 1.6 and later."""
    members = list_members(file, file_size)
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise Malformed("is a zip file, but not one of torch.save: it has not one data.pkl")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in members:
        raise Malformed("is a TorchScript archive: a program, which is not read")

    def small(name: str) -> bytes | None:
        member = members.get(prefix + name)
        if member is None:
            return None
        if member.size > 64:
            raise Malformed(f"has a member {shown(member.name)} of {member.size} bytes")
        return read_member(file, file_size, member)

    version = small("version")
    if version is not None and version.strip() not in [b"%d" % v for v in ZIP_VERSIONS]:
        raise Malformed("has a version of the zip format that is not known")
    order = small("byteorder")
    if order not in (None, b"little", b"big"):
        raise Malformed("has a byte order that is not known")
    # Files older than the mark are read as little-endian, by torch as well.
    swap = (order or b"little").decode() != sys.byteorder

    member = members[pickles[0]]
    if member.size > MAX_PICKLE:
        raise Malformed(f"has a pickle of more than {MAX_PICKLE} bytes")
    program = read_member(file, file_size, member)
    storages = Storages(fields=5)
    source = Source(io.BytesIO(program), len(program), "the pickle")
    root = load(source, NAMES, storages.named, REFUSED)

    def fetch(storage: Storage, size: int) -> np.ndarray:
        member = members.get(f"{prefix}data/{storage.key}")
        if member is None or member.size != size:
            found = "no bytes" if member is None else f"{member.size} bytes"
            raise Malformed(f"has {found} for the storage {shown(storage.key)}, which takes {size}")
        return _member_array(file, file_size, member)

    arrays = Arrays(fetch, swap, max_bytes)
    return expand(root, len(program), arrays.leaf, _namespace)


def _member_array(file: BinaryIO, file_size: int, member: Member) -> np.ndarray:
    """A member's bytes, uint8 [size]."""
    if member.deflated:
        return np.frombuffer(read_member(file, file_size, member), np.uint8)
    file.seek(stored_range(file, file_size, member))
    data = _fill(file, member.size)
    check(member, data.data)
    return data


def _namespace(attributes: dict[Any, Any]) -> Namespace:
    """A Namespace of attributes that the pickle set; Malformed for odd names."""
    if not all(isinstance(name, str) and not name.startswith("__") for name in attributes):
        raise Malformed("sets an attribute whose name is no text, or begins with __")
    return Namespace(attributes)


def _read_stream(file: BinaryIO, file_size: int, max_bytes: int) -> Any:
    """Reads the format before torch 1.6: five pickles, then the storages one after the other."""
    source = Source(file, file_size, "the pickle")
    if load(source, {}) != MAGIC:
        raise Malformed("is a pickle, but not one of torch.save")
    if load(source, {}) != PROTOCOL:
        raise Malformed("has a version of the format before torch 1.6 that is not known")
    system = load(source, {})
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Malformed("was not written by a little-endian machine")
    begin = source.position
    storages = Storages(fields=6)
    root = load(source, NAMES, storages.named, REFUSED)
    size = source.position - begin
    keys = load(source, {})
    if not isinstance(keys, list):
        raise Malformed("has no list of storages")
    places: dict[str, int] = {}
    for key in keys:
        storage = storages.known.get(key) if isinstance(key, str) else None
        if storage is None or key in places:
            raise Malformed("lists a storage that no tensor uses, or one storage twice")
        count = int.from_bytes(source.take(8), "little", signed=True)
        if count != storage.count:
            raise Malformed(
                f"has {count} elements for the storage {shown(key)}, which has {storage.count}"
            )
        places[key] = source.position
        source.skip(count * storage.dtype.itemsize)
    if source.position != file_size:
        raise Malformed(f"has {file_size - source.position} bytes after its end")

    def fetch(storage: Storage, size: int) -> np.ndarray:
        if storage.key not in places:
            raise Malformed(f"lacks the storage {shown(storage.key)}")
        file.seek(places[storage.key])
        return _fill(file, size)

    arrays = Arrays(fetch, sys.byteorder != "little", max_bytes)
    return expand(root, size, arrays.leaf, _namespace)


def _fill(file: BinaryIO, size: int) -> np.ndarray:
    """The next ``size`` bytes of the file, uint8 [size]; the one place that allocates by a size."""
    data = np.empty(size, np.uint8)
    if size and file.readinto(data.data) != size:  # type: ignore[attr-defined]
        raise Malformed("is cut short: fetch it again")
    return data
