"""Orientation and other metadata of pictures: obeyed where they can be read, never in the way."""

from __future__ import annotations

import io
import json
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from test_images import encoded

from aqdetr_jax.data import exif
from aqdetr_jax.data.images import as_array, read_header, read_image

PIXELS = np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)

CONTAINERS = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
}


def photograph(fmt: str, orientation: int) -> tuple[bytes, bytes]:
    """A file with EXIF of many types, and its EXIF block (a TIFF header and directory)."""
    block = Image.Exif()
    block[exif.ORIENTATION] = orientation  # comes first: no lower tag
    block[0x011A], block[0x0128], block[0x0131] = 72.5, 2, "some software"
    block[0x9C9B] = b"t\0i\0t\0l\0e\0"
    block.get_ifd(0x8769)[0x829A] = 0.5
    data = encoded(Image.fromarray(PIXELS), fmt, exif=block, **CONTAINERS[fmt])
    return data, block.tobytes().removeprefix(b"Exif\0\0")


@pytest.mark.parametrize("fmt", CONTAINERS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_obeyed_where_it_should_be(fmt, orientation, tmp_path):
    data, _ = photograph(fmt, orientation)
    path = tmp_path / "photo"
    path.write_bytes(data)
    assert read_header(path).orientation == orientation
    assert (read_header(path).height, read_header(path).width) == (6, 9)
    stored = read_image(path, expected_size=(6, 9))
    plain = encoded(Image.fromarray(PIXELS), fmt, **CONTAINERS[fmt])
    np.testing.assert_array_equal(stored, np.asarray(Image.open(io.BytesIO(plain))))
    np.testing.assert_array_equal(read_image(data), stored)
    with Image.open(path) as picture:
        upright = np.asarray(ImageOps.exif_transpose(picture))
    for source in (path, data, Image.open(path)):
        np.testing.assert_array_equal(as_array(source), upright)
    # Annotated as turned: of the turns that say so by their size.
    turned = read_image(data, expected_size=(9, 6))
    np.testing.assert_array_equal(turned, upright if orientation >= 5 else stored)


def test_orientation_in_other_places():
    """PNG's text as ImageMagick writes it, and XMP."""
    from PIL.PngImagePlugin import PngInfo

    block = Image.Exif()
    block[exif.ORIENTATION] = 6
    raw, text = block.tobytes(), PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()}\n")
    picture = Image.fromarray(PIXELS)
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    files = [
        encoded(picture, "PNG", pnginfo=text),
        encoded(picture, "TIFF", tiffinfo={700: xmp}),
        encoded(picture, "WEBP", xmp=xmp, lossless=True),
    ]
    for data in files:
        np.testing.assert_array_equal(as_array(data), np.rot90(PIXELS, -1))
        np.testing.assert_array_equal(read_image(data), PIXELS)


ONE_TAG = {
    "software as a fraction": (0x0131, 5, 1, struct.pack("<II", 1, 2)),
    "strips as text": (0x0111, 2, 6, b"abcde\0"),
    "resolution as text": (0x011A, 2, 5, b"many\0"),
    "a type that does not exist": (0x0132, 99, 2, bytes(8)),
}


@pytest.mark.parametrize("name", ONE_TAG)
def test_one_tag_of_another_type(name):
    """The picture is read, turned as the other tag says."""
    tag, kind, count, value = ONE_TAG[name]
    entries = sorted([(0x0112, 3, 1, b"\6\0\0\0"), (tag, kind, count, struct.pack("<I", 38))])
    block = struct.pack("<2sHIH", b"II", 42, 8, 2)
    block += b"".join(struct.pack("<HHI4s", *entry) for entry in entries) + bytes(4) + value
    picture = Image.fromarray(PIXELS)
    for fmt in ("JPEG", "PNG", "WEBP"):
        options = CONTAINERS[fmt]
        data = encoded(picture, fmt, exif=b"Exif\0\0" + block, **options)
        stored = np.asarray(Image.open(io.BytesIO(encoded(picture, fmt, **options))))
        for source in (data, Image.open(io.BytesIO(data))):
            np.testing.assert_array_equal(as_array(source), np.rot90(stored, -1))


@given(
    st.sampled_from(sorted(CONTAINERS)),
    st.integers(1, 8),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=12),
    st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_damaged_metadata_leaves_the_pixels(fmt, orientation, damage, quiet):
    """Whatever bytes of EXIF are overwritten; turned as it says while its own entry is whole."""
    data, block = photograph(fmt, orientation)
    whole = bytearray(data)
    if fmt == "TIFF":  # the file is its own EXIF: overwrite what is not about pixels
        order, start, count = exif._directory(data)
        entries = range(start, start + 12 * count, 12)
        tags = {at: struct.unpack_from(f"{order}H", data, at)[0] for at in entries}
        spots = [at + i for at, tag in tags.items() if tag > 0x0119 for i in range(2, 12)]
        spots = [s for s in spots if tags[s - (s - start) % 12] not in (277, 278, 279, 284, 339)]
        vital = set()
    else:
        begin = data.index(block)
        spots = range(begin, begin + len(block))
        # Byte order and place of the directory, its length, and the first entry.
        vital = {*range(2), *range(4, 8), *range(8, 10), *range(10, 22)}
        vital = {begin + i for i in vital}
    hit = set()
    for place, value in damage:
        at = spots[place % len(spots)]
        whole[at] = value
        if value != data[at]:
            hit.add(at)
    stored = np.asarray(
        Image.open(io.BytesIO(encoded(Image.fromarray(PIXELS), fmt, **CONTAINERS[fmt])))
    )
    with warnings.catch_warnings():
        # In tests Pillow's warnings are errors, which the reader must survive as well.
        if quiet:
            warnings.simplefilter("ignore")
        image, upright = read_image(bytes(whole)), as_array(bytes(whole))
    np.testing.assert_array_equal(image, stored)
    allowed = range(1, 9) if hit & vital else [orientation]
    turns = [exif.turn(stored, k) for k in allowed]
    assert any(np.array_equal(upright, turn) for turn in turns)


def test_turns_against_pillow():
    for value in range(1, 9):
        block = Image.Exif()
        block[exif.ORIENTATION] = value
        picture = Image.fromarray(PIXELS)
        picture.info["exif"] = block.tobytes()
        wanted = np.asarray(ImageOps.exif_transpose(picture))
        np.testing.assert_array_equal(exif.turn(PIXELS, value), wanted)
        np.testing.assert_array_equal(exif.turn_back(wanted, value), PIXELS)


def test_inspection_counts_a_turned_photograph_with_a_damaged_tag(tmp_path):
    """The header is read by the same reader: an odd tag hides no rotation."""
    from aqdetr_jax.data.coco import CocoFolder
    from aqdetr_jax.data.inspect import inspect_dataset

    data, block = photograph("PNG", 6)
    broken = bytearray(data)
    broken[data.index(block) + 24] ^= 0xFF  # type of the second tag; the chunk's checksum is wrong
    (tmp_path / "photo.png").write_bytes(broken)
    content = {
        "images": [{"id": 1, "file_name": "photo.png", "height": 9, "width": 6}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "x.json").write_text(json.dumps(content))
    report = inspect_dataset(CocoFolder(tmp_path, tmp_path / "x.json"))
    assert report["exif_rotated"] == {"count": 1, "first": ["photo.png: EXIF orientation 6"]}
    assert report["unreadable"]["count"] == report["size_mismatch"]["count"] == 0
