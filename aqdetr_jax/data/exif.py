"""What an image file says besides its pixels: which way is up, however damaged the rest is.

Pillow gives up on a whole file for one odd tag, so the orientation is read here, and the metadata
can be taken out of a file so that its pixels decode alone.
"""

from __future__ import annotations

import struct

import numpy as np

ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)
"""Orientations that swap height and width."""

_PREFIX = b"Exif\0\0"
_PNG = b"\x89PNG\r\n\x1a\n"
# What decodes the pixels of a TIFF page; everything else is metadata.
_TIFF_PIXELS = {*range(254, 260), 262, 266, 273, *range(277, 280), 284, 292, 293, 317}
_TIFF_PIXELS |= {*range(320, 326), 330, 332, 336, *range(338, 342), 347}
_TIFF_PIXELS |= {*range(512, 522), *range(529, 533)}
# Type of a whole number that lies in the entry itself -> its struct code.
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}


def orientation(exif: bytes) -> int | None:
    """The orientation tag of an EXIF block, whatever its other tags are.

    Args:
      exif: the block: a TIFF header and directory, with or without the prefix ``Exif``.

    Returns:
      1 to 8, the first such value; None where no tag can be read.
    """
    while exif.startswith(_PREFIX):
        exif = exif[len(_PREFIX) :]
    try:
        order, start, count = _directory(exif)
        for at in range(start, start + 12 * count, 12):
            tag, kind, number = struct.unpack_from(f"{order}HHI", exif, at)
            if tag == ORIENTATION and kind in _INTEGERS and number == 1:
                (value,) = struct.unpack_from(f"{order}{_INTEGERS[kind]}", exif, at + 8)
                if 1 <= value <= 8:
                    return int(value)
    except (struct.error, ValueError):  # it ends in the middle, or never began
        pass
    return None


def turn(image: np.ndarray, value: int) -> np.ndarray:
    """Turns stored pixels upright.

    Args:
      image: [H, W, ...], as stored.
      value: EXIF orientation; anything but 2 to 8 changes nothing.

    Returns:
      A contiguous array, [W, H, ...] for the orientations in ``SIDEWAYS``.
    """
    if value in SIDEWAYS:
        image = image.swapaxes(0, 1)
    rows = slice(None, None, -1 if value in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if value in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(image[rows, columns])


def turn_back(image: np.ndarray, value: int) -> np.ndarray:
    """Undoes :func:`turn`."""
    return turn(image, {6: 8, 8: 6}.get(value, value))


def bare(data: bytes) -> tuple[bytes, int | None] | None:
    """An image file without its metadata.

    Args:
      data: a JPEG, PNG, WebP or (classic) TIFF file.

    Returns:
      The file with nothing but what its pixels need, and its EXIF orientation (None: no tag that
      can be read). None for other formats, and where the structure of the file is broken.
    """
    try:
        if data.startswith(b"\xff\xd8"):
            return _bare_jpeg(data)
        if data.startswith(_PNG):
            return _bare_png(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _bare_webp(data)
        if data[:4] in (b"II*\0", b"MM\0*"):
            return _bare_tiff(data)
    except (struct.error, IndexError, ValueError):
        pass
    return None


def _directory(data: bytes) -> tuple[str, int, int]:
    """(byte order, place of the first entry, entries) of a TIFF's first directory."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        raise ValueError("no byte order")
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    return order, start + 2, count


def _bare_jpeg(data: bytes) -> tuple[bytes, int | None]:
    kept, found, at = [data[:2]], None, 2
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        end = at + 2 + length
        # APP0 is JFIF's, APP14 says how the colours are stored; the others and comments are words.
        if not (0xE1 <= marker <= 0xED or marker in (0xEF, 0xFE)):
            kept.append(data[at:end])
        elif marker == 0xE1 and found is None and data[at + 4 : at + 8] == _PREFIX[:4]:
            found = orientation(data[at + 4 : end])
        at = end
        if marker == 0xDA:  # the pixels begin
            break
    return b"".join(kept) + data[at:], found


def _bare_png(data: bytes) -> tuple[bytes, int | None]:
    kept, found, at = [data[: len(_PNG)]], None, len(_PNG)
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind == b"eXIf":
            found = found or orientation(data[at + 8 : end - 4])
        elif not kind[0] & 0x20 or kind == b"tRNS":  # a capital letter: needed for the pixels
            kept.append(data[at:end])
        at = end
    return b"".join(kept), found


def _bare_webp(data: bytes) -> tuple[bytes, int | None]:
    kept, found, at = [], None, 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        end = at + 8 + length + length % 2
        chunk = data[at:end]
        if kind == b"EXIF":
            found = found or orientation(data[at + 8 : at + 8 + length])
        elif kind == b"VP8X":  # the flags of ICC, EXIF and XMP
            kept.append(chunk[:8] + bytes([chunk[8] & ~0b101100]) + chunk[9:])
        elif kind not in (b"XMP ", b"ICCP"):
            kept.append(chunk)
        at = end
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body, found


def _bare_tiff(data: bytes) -> tuple[bytes, int | None]:
    """Entries are closed up in their own place, so that nothing that they point to moves."""
    order, start, count = _directory(data)
    entries = [data[at : at + 12] for at in range(start, start + 12 * count, 12)]
    kept = [e for e in entries if struct.unpack(f"{order}H", e[:2])[0] in _TIFF_PIXELS]
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    first = start - 2
    return data[:first] + directory + data[first + len(directory) :], orientation(data)
