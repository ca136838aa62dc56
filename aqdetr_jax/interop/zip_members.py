"""The members of a zip file, read by name with every size checked before memory is taken.

Only what writers of checkpoints use: one disk, members that are stored or deflated, none
encrypted, zip64 sizes. Names, sizes and places are checked for the whole file before any member is
read, so that members that overlap, leave the file or would inflate without bound are refused.
"""

from __future__ import annotations

import struct
import zlib
from typing import BinaryIO, NamedTuple

from aqdetr_jax.interop.source import Malformed, shown

MAX_MEMBERS = 200_000
"""Members of one file."""

MAX_DIRECTORY = 64 * 1024**2
"""Bytes of the list of members."""

MAX_INFLATION = 20
"""Bytes of all members together, as declared, for each byte of the file."""

END = struct.Struct("<4s4H2LH")
END64_PLACE = struct.Struct("<4sLQL")
END64 = struct.Struct("<4sQ2H2L4Q")
ENTRY = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")

MAX_COMMENT = 0xFFFF
FULL16 = 0xFFFF
FULL32 = 0xFFFFFFFF
"""What stands in a field whose value is in a zip64 field."""

STORED = 0
DEFLATED = 8
ENCRYPTED = 1 | 1 << 6 | 1 << 13
UTF8 = 1 << 11


class Member(NamedTuple):
    """One member as the list of members has it.

    Attributes:
      name: its name.
      deflated: whether it is compressed.
      crc: its checksum; 0 where the writer left it out.
      packed: bytes in the file.
      size: bytes when inflated.
      start: where its own header stands in the file.
      limit: where the next member's header, or the list of members, stands.
    """

    name: str
    deflated: bool
    crc: int
    packed: int
    size: int
    start: int
    limit: int


def list_members(file: BinaryIO, file_size: int) -> dict[str, Member]:
    """Reads and checks the list of members.

    Args:
      file: the zip file.
      file_size: its bytes.

    Returns:
      The members by name, folders left out.

    Raises:
      Malformed: the file is cut short or corrupt; a member is encrypted or compressed otherwise
        than by deflate; a name occurs twice, is absolute or has ``..``, a backslash or a control
        character; members overlap; or MAX_MEMBERS, MAX_DIRECTORY or MAX_INFLATION is passed.
    """
    count, length, start = _end_record(file, file_size)
    if count > MAX_MEMBERS or length > MAX_DIRECTORY:
        raise Malformed(f"has more than {MAX_MEMBERS} members or names for too many")
    directory = _read(file, file_size, start, length)
    found: list[Member] = []
    names = set()
    place = 0
    for _ in range(count):
        member, place = _entry(directory, place)
        if member.name in names:
            raise Malformed(f"has two members of the name {shown(member.name)}")
        names.add(member.name)
        found.append(member)
    if place != length:
        raise Malformed("has a corrupt list of members")
    if sum(member.size for member in found) > MAX_INFLATION * file_size:
        raise Malformed(f"would inflate to more than {MAX_INFLATION} times its size")
    found.sort(key=lambda member: member.start)
    limits = [member.start for member in found[1:]] + [start]
    members = {}
    for member, limit in zip(found, limits, strict=True):
        if member.start + LOCAL.size + member.packed > limit:
            raise Malformed(f"has members that overlap: {shown(member.name)}")
        if not member.name.endswith("/"):
            members[member.name] = member._replace(limit=limit)
    return members


def stored_range(file: BinaryIO, file_size: int, member: Member) -> int:
    """Where a member's bytes begin; Malformed if its own header contradicts the list."""
    header = LOCAL.unpack(_read(file, file_size, member.start, LOCAL.size))
    signature, _, flags, method, *_, name_length, extra_length = header
    begin = member.start + LOCAL.size + name_length + extra_length
    expected = DEFLATED if member.deflated else STORED
    if signature != b"PK\x03\x04" or method != expected or flags & ENCRYPTED:
        raise Malformed(f"has a corrupt header of the member {shown(member.name)}")
    name = _read(file, file_size, member.start + LOCAL.size, name_length)
    if _decoded(name, flags) != member.name:
        raise Malformed(f"has two names for the member {shown(member.name)}")
    if begin + member.packed > member.limit:
        raise Malformed(f"has a member that overlaps the next: {shown(member.name)}")
    return begin


def inflate(member: Member, packed: bytes) -> bytes:
    """A deflated member's bytes: never more than it declares; Malformed if they are not those."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        # At zero there would be no limit.
        data = inflater.decompress(packed, max(member.size, 1))
        rest = inflater.decompress(inflater.unconsumed_tail, 1) if not inflater.eof else b""
    except zlib.error:
        raise Malformed(f"has a corrupt member {shown(member.name)}") from None
    if len(data) != member.size or rest or not inflater.eof or inflater.unused_data:
        raise Malformed(f"has a member {shown(member.name)} of another size than it declares")
    return data


def check(member: Member, data: bytes | memoryview) -> None:
    """Malformed if the bytes do not have the member's checksum."""
    if member.crc and zlib.crc32(data) != member.crc:
        raise Malformed(f"is corrupt: the checksum of the member {shown(member.name)} is wrong")


def read_member(file: BinaryIO, file_size: int, member: Member) -> bytes:
    """A whole member, of ``member.size`` bytes; Malformed if it is corrupt."""
    begin = stored_range(file, file_size, member)
    data = _read(file, file_size, begin, member.packed)
    if member.deflated:
        data = inflate(member, data)
    check(member, data)
    return data


def _read(file: BinaryIO, file_size: int, start: int, length: int) -> bytes:
    """Bytes of the file; Malformed if it has not so many."""
    if start + length > file_size:
        raise Malformed("is cut short or corrupt: its list of members points outside of it")
    file.seek(start)
    data = file.read(length)
    if len(data) != length:
        raise Malformed("is cut short: fetch it again")
    return data


def _end_record(file: BinaryIO, file_size: int) -> tuple[int, int, int]:
    """Number of members, and the length and the start of their list."""
    tail_start = max(0, file_size - END.size - MAX_COMMENT)
    tail = _read(file, file_size, tail_start, file_size - tail_start)
    found = tail.rfind(b"PK\x05\x06")
    if found < 0 or len(tail) - found < END.size:
        raise Malformed("is cut short, a zip file without its list of members: fetch it again")
    _, disk, first_disk, here, count, length, start, comment = END.unpack_from(tail, found)
    end = tail_start + found
    if end + END.size + comment != file_size:
        raise Malformed("is cut short or has bytes after its end: fetch it again")
    if FULL16 in (here, count) or FULL32 in (length, start):
        place = _read(file, file_size, max(0, end - END64_PLACE.size), END64_PLACE.size)
        signature, _, end, disks = END64_PLACE.unpack(place)
        if signature != b"PK\x06\x07" or disks > 1:
            raise Malformed("has a corrupt list of members")
        record = END64.unpack(_read(file, file_size, end, END64.size))
        signature, _, _, _, disk, first_disk, here, count, length, start = record
        if signature != b"PK\x06\x06":
            raise Malformed("has a corrupt list of members")
    if disk or first_disk or here != count:
        raise Malformed("is one part of a zip file in several")
    if start + length > end:
        raise Malformed("has a corrupt list of members")
    return count, length, start


def _entry(directory: bytes, place: int) -> tuple[Member, int]:
    """The member listed at ``place``, its limit not known yet, and the place of the next."""
    if place + ENTRY.size > len(directory):
        raise Malformed("has a corrupt list of members")
    fields = ENTRY.unpack_from(directory, place)
    signature, _, _, flags, method, _, _, crc, packed, size, *lengths = fields[:13]
    name_length, extra_length, comment_length = lengths
    disk, start = fields[13], fields[16]
    name_start = place + ENTRY.size
    extra_start = name_start + name_length
    following = extra_start + extra_length + comment_length
    if signature != b"PK\x01\x02" or following > len(directory):
        raise Malformed("has a corrupt list of members")
    name = _decoded(directory[name_start:extra_start], flags)
    _check_name(name)
    if flags & ENCRYPTED:
        raise Malformed(f"has an encrypted member {shown(name)}")
    if method not in (STORED, DEFLATED):
        raise Malformed(f"has a member of the unknown compression {method}: {shown(name)}")
    if FULL32 in (packed, size, start):
        extra = directory[extra_start : extra_start + extra_length]
        size, packed, start = _wide(extra, size, packed, start)
    if disk not in (0, FULL16):
        raise Malformed("is one part of a zip file in several")
    if method == STORED and packed != size:
        raise Malformed(f"has a member of two sizes: {shown(name)}")
    return Member(name, method == DEFLATED, crc, packed, size, start, start), following


def _wide(extra: bytes, *fields: int) -> list[int]:
    """The fields with those that are full replaced, in this order, from the zip64 field."""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        body = extra[place + 4 : place + 4 + length]
        place += 4 + length
        count = fields.count(FULL32)
        if kind == 1 and len(body) == length >= 8 * count:
            wide = iter(struct.unpack_from(f"<{count}Q", body))
            return [next(wide) if field == FULL32 else field for field in fields]
    raise Malformed("has a corrupt list of members: sizes are missing")


def _decoded(name: bytes, flags: int) -> str:
    if not flags & UTF8:
        return name.decode("cp437")
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("has a member whose name is not UTF-8") from None


def _check_name(name: str) -> None:
    """Refuses names that would mean another place to a program that writes members to disk."""
    parts = name.removesuffix("/").split("/")
    # torch names the outermost folder after the file, which may be called "run 12:30".
    drive = len(parts[0]) == 2 and parts[0].endswith(":")
    odd = not name.isprintable() or "\\" in name or drive
    if odd or any(part in ("", ".", "..") for part in parts):
        raise Malformed(f"has a member of the forbidden name {shown(name)}")
