"""Files of ``torch.save`` put together by hand: pickles from opcodes, and what goes around them."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping

MAGIC = 0x1950A86A20F9469CFC6C


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    size = (value.bit_length() + 8) // 8
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def name(full: str) -> bytes:
    module, _, last = full.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def group(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(full: str, *arguments: bytes) -> bytes:
    return name(full) + group(*arguments) + b"R"


def table(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def storage(count: int, *, key="0", kind="torch.FloatStorage", stream=False) -> bytes:
    fields = [text("storage"), name(kind), text(key), text("cpu"), number(count)]
    return group(*fields, *([b"N"] if stream else [])) + b"Q"


def tensor(memory: bytes, offset: int, shape: Iterable[int], strides: Iterable[int]) -> bytes:
    place = [number(offset), group(*map(number, shape)), group(*map(number, strides))]
    return call("torch._utils._rebuild_tensor_v2", memory, *place, b"\x89", b"N")


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def zip_file(
    body: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    members: Mapping[str, bytes] | None = None,
    method: int = zipfile.ZIP_STORED,
) -> bytes:
    """The zip format: the pickle's opcodes, bytes by storage, further members by full name."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        file.writestr("a/data.pkl", program(body))
        for key, data in (storages or {}).items():
            file.writestr(f"a/data/{key}", data)
        for full, data in (members or {}).items():
            file.writestr(full, data)
    return out.getvalue()


def stream_file(
    body: bytes,
    storages: Mapping[str, tuple[int, bytes]] | None = None,
    *,
    magic: int = MAGIC,
    protocol: int = 1001,
    little: bool = True,
) -> bytes:
    """The format before torch 1.6: the pickle's opcodes, count and bytes by storage."""
    storages = storages or {}
    head = (magic, protocol, {"protocol_version": 1001, "little_endian": little, "type_sizes": {}})
    out = b"".join(pickle.dumps(part, 2) for part in head) + program(body)
    out += pickle.dumps(list(storages), 2)
    return out + b"".join(struct.pack("<q", count) + data for count, data in storages.values())
