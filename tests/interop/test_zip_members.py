"""Zip files made to mislead."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
import zlib

import numpy as np
import torch_bytes as tb

from aqdetr_jax.interop import zip_members

FLOATS = struct.pack("<6f", *range(6))


def test_names_of_members(refuse):
    for name in (
        *("../up", "a/../../up", "/etc/passwd", "a\\b", "C:/x", "a//b", "a/./b", "x\ny", ".."),
    ):
        refuse(tb.zip_file(b"N", members={name: b""}), "forbidden name")


def test_folders_are_named_after_files(accept):
    """torch takes the file's name, whatever it is."""
    for name in ("run 12:30", "Größe 大", "~", " "):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as file:
            file.writestr(f"{name}/data.pkl", tb.program(b"K\x07"))
        assert accept(data.getvalue()) == 7


def test_duplicate_names(refuse):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refuse(tb.zip_file(b"N", members={"a/data.pkl": b"x"}), "two members of the name a/data.p")


def test_compressed_members(accept, refuse):
    body = tb.tensor(tb.storage(6), 0, (6,), (1,))
    data = tb.zip_file(body, {"0": FLOATS}, method=zipfile.ZIP_DEFLATED)
    np.testing.assert_array_equal(accept(data), np.arange(6, dtype=np.float32))
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        refuse(tb.zip_file(body, {"0": FLOATS}, method=method), "unknown compression")
    bomb = tb.zip_file(
        tb.storage(10_000_000, kind="torch.ByteStorage"),
        {"0": bytes(10_000_000)},
        method=zipfile.ZIP_DEFLATED,
    )
    refuse(bomb, f"inflate to more than {zip_members.MAX_INFLATION} times")


def patched(data: bytes, name: bytes, at: int, value: bytes) -> bytes:
    """A zip file with a field changed in the list of members; ``at`` counts from the entry."""
    place = data.rindex(name) - zip_members.ENTRY.size + at
    return data[:place] + value + data[place + len(value) :]


def test_lists_of_members_that_lie(refuse):
    body = tb.storage(400, kind="torch.ByteStorage")
    data = tb.zip_file(body, {"0": bytes(range(200)) * 2, "1": b"1"}, method=zipfile.ZIP_DEFLATED)
    name = b"a/data/0"
    for size in (0, 1, 399, 401, 4000):
        refuse(patched(data, name, 24, struct.pack("<I", size)), "another size|storage 0, which")
    for size in (200, 399, 401):
        # The pickle and the list of members agree; the member holds another number of bytes.
        lie = tb.storage(size, kind="torch.ByteStorage")
        other = tb.zip_file(lie, {"0": bytes(range(200)) * 2}, method=zipfile.ZIP_DEFLATED)
        refuse(patched(other, name, 24, struct.pack("<I", size)), "another size than it declares")
    refuse(patched(data, name, 24, b"\xf0\xff\xff\xff"), "inflate to more")
    refuse(patched(data, name, 20, b"\xf0\xff\xff\xff"), "overlap")
    refuse(patched(data, name, 16, b"\x01\x02\x03\x04"), "checksum")
    refuse(patched(data, name, 8, b"\x01\x00"), "encrypted")
    refuse(patched(data, name, 8, b"\x00\x20"), "encrypted")
    refuse(patched(data, name, 10, b"\x00\x00"), "two sizes")
    refuse(patched(data, name, 10, b"\x63\x00"), "unknown compression 99")
    refuse(patched(data, name, 24, b"\xff\xff\xff\xff"), "sizes are missing")
    refuse(patched(data, name, 34, b"\x01\x00"), "several")
    refuse(patched(data, name, 42, b"\x00\x00\x00\x00"), "overlap")
    refuse(patched(data, name, 46, b"a/data/9"), "no bytes for the storage")
    refuse(patched(data, name, 46, b"a/data/1"), "two members")
    refuse(patched(data, b"a/data/1", 42, b"\x01\x00\x00\x00"), "overlap|corrupt")


def test_streams_of_deflate_that_do_not_end(accept, refuse):
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = packer.compress(FLOATS)
    for end, more in ((zlib.Z_SYNC_FLUSH, b""), (zlib.Z_FINISH, b"x"), (zlib.Z_FINISH, b"")):
        stream = packed + packer.copy().flush(end) + more
        data = tb.zip_file(tb.storage(24, kind="torch.ByteStorage"), {"0": stream})
        data = patched(data, b"a/data/0", 24, struct.pack("<I", 24))
        data = patched(data, b"a/data/0", 16, struct.pack("<I", zlib.crc32(FLOATS)))
        data = patched(data, b"a/data/0", 10, b"\x08\x00")
        own = data.index(b"a/data/0")
        data = data[: own - 22] + b"\x08\x00" + data[own - 20 :]
        if end == zlib.Z_FINISH and not more:
            assert accept(data).tobytes() == FLOATS
        else:
            refuse(data, "of another size than it declares")


def test_bytes_between_the_list_and_its_end(refuse):
    data = tb.zip_file(b"N")
    begin = data.index(b"PK\x01\x02")
    end = data[-22:-10] + struct.pack("<I", len(data) - 22 - begin + 3) + data[-6:]
    refuse(data[:-22] + b"xxx" + end, "corrupt list of members")


def test_members_that_share_their_bytes(refuse):
    """The overlapping kind of bomb: many entries of the list lead to one member."""
    data = tb.zip_file(b"N", {"0": b"x" * 100})
    begin = data.index(b"PK\x01\x02")
    directory, end = data[begin:-22], data[-22:]
    entry = directory[directory.rindex(b"PK\x01\x02") :]
    entries = b"".join(entry.replace(b"data/0", b"data/%d" % k) for k in range(1, 10))
    directory += entries
    end = end[:8] + struct.pack("<HHI", 11, 11, len(directory)) + end[16:]
    refuse(data[:begin] + directory + end, "overlap")


def test_the_member_itself_contradicts_the_list(refuse):
    data = tb.zip_file(tb.storage(24, kind="torch.ByteStorage"), {"0": FLOATS})
    own = data.index(b"a/data/0")
    refuse(data[:own] + b"a/data/7" + data[own + 8 :], "two names")
    refuse(data[: own - 30] + b"XXXX" + data[own - 26 :], "corrupt header")
    refuse(data[: own - 22] + b"\x08\x00" + data[own - 20 :], "corrupt header")
    refuse(data[: own - 2] + b"\xff\x00" + data[own:], "overlaps the next|outside")
    flipped = bytearray(data)
    flipped[data.index(FLOATS) + 5] ^= 1
    refuse(bytes(flipped), "checksum")


def test_many_members(monkeypatch, refuse):
    monkeypatch.setattr(zip_members, "MAX_MEMBERS", 10)
    refuse(tb.zip_file(b"N", {str(k): b"" for k in range(10)}), "more than 10 members")


def test_zip64(accept, refuse):
    """The form for large files, as in their list of members, around a small one."""
    data = tb.zip_file(tb.storage(24, kind="torch.ByteStorage"), {"0": FLOATS})
    begin = data.index(b"PK\x01\x02")
    name = data.rindex(b"a/data/0")
    (start,) = struct.unpack_from("<I", data, name - 4)
    extra = struct.pack("<2H3Q", 1, 24, 24, 24, start)
    full = b"\xff" * 4
    entry = bytearray(data[name - 46 : name])
    entry[20:28] = full * 2
    entry[30:32] = struct.pack("<H", len(extra))
    entry[42:46] = full
    directory = data[begin : name - 46] + bytes(entry) + b"a/data/0" + extra
    length = len(directory)
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, length, begin)
    place = struct.pack("<4sLQL", b"PK\x06\x07", 0, begin + length, 1)
    end = b"PK\x05\x06" + bytes(4) + b"\xff" * 12 + bytes(2)
    whole = data[:begin] + directory + record + place + end
    assert accept(whole).tobytes() == FLOATS
    for old, new in (
        (b"PK\x06\x06", b"PK\x06\x00"),
        (b"PK\x06\x07", b"PK\x06\x00"),
        (place, struct.pack("<4sLQL", b"PK\x06\x07", 0, 1 << 60, 1)),
        (extra, struct.pack("<2H3Q", 1, 24, 1 << 60, 1 << 60, start)),
        (extra, struct.pack("<2H3Q", 1, 24, 24, 24, 1 << 60)),
        (extra, struct.pack("<2H3Q", 1, 8, 24, 24, start)),
        (extra, struct.pack("<2H3Q", 1, 99, 24, 24, start)),
        (extra, struct.pack("<2H3Q", 2, 24, 24, 24, start)),
        (record, record[:24] + struct.pack("<2Q", 1 << 40, 1 << 40) + record[40:]),
        (record, record[:40] + struct.pack("<2Q", 1 << 62, begin)),
        (record, record[:40] + struct.pack("<2Q", length, 1 << 62)),
    ):
        assert whole.count(old) == 1
        refuse(whole.replace(old, new), "corrupt|cut short|overlap|inflate|members")
