"""The reader of pictures, against Pillow's own results and values by hand."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from aqdetr_jax.data import exif
from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.dataset import ImageReadError
from aqdetr_jax.data.images import MAX_PIXELS, as_array, read_header, read_image, to_rgb
from aqdetr_jax.data.open import open_dataset

PIXELS = np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)


def encoded(picture, fmt, **kwargs):
    buffer = io.BytesIO()
    picture.save(buffer, fmt, **kwargs)
    return buffer.getvalue()


def tiff(dtype: str, values, photometric: int = 1, bits: int | None = None) -> bytes:
    """One row of grey pixels as an uncompressed little-endian TIFF; ``values`` bytes as packed."""
    packed = isinstance(values, bytes)
    data = values if packed else np.asarray(values, dtype).tobytes()
    width = len(data) * 8 // (bits or 8) if packed else len(values)
    kind = {"u": 1, "i": 2, "f": 3}[np.dtype(dtype).kind]
    tags = {256: width, 257: 1, 258: bits or np.dtype(dtype).itemsize * 8, 259: 1}
    tags |= {262: photometric, 273: 200, 277: 1, 278: 1, 279: len(data), 339: kind}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries
    return head.ljust(200, b"\0") + data


# --- modes ---------------------------------------------------------------------------------------

# mode -> a pixel of it and its colour by hand; the tolerance is that of an 8-bit colour space.
BY_HAND = {
    "1": (1, (255, 255, 255), 0),
    "L": (77, (77, 77, 77), 0),
    "LA": ((77, 3), (77, 77, 77), 0),
    "La": ((64, 128), (127, 127, 127), 1),  # half transparent: the grey is twice the stored
    "P": (1, (10, 20, 30), 0),
    "PA": ((1, 9), (10, 20, 30), 0),
    "RGB": ((1, 2, 3), (1, 2, 3), 0),
    "RGBA": ((1, 2, 3, 4), (1, 2, 3), 0),
    "RGBa": ((64, 32, 0, 128), (127, 64, 0), 1),
    "RGBX": ((1, 2, 3, 4), (1, 2, 3), 0),
    "CMYK": ((0, 255, 0, 127), (128, 0, 128), 1),
    "YCbCr": ((76, 85, 255), (255, 0, 0), 1),
    "LAB": ((255, 128, 128), (255, 255, 255), 1),
    "HSV": ((85, 255, 255), (0, 255, 0), 1),
    "I;16": (0x1234, (18, 18, 18), 0),
    "I;16L": (0x1234, (18, 18, 18), 0),
    "I;16B": (0x1234, (18, 18, 18), 0),
    "I;16N": (0xFFFF, (255, 255, 255), 0),
    "F": (0.2, (51, 51, 51), 0),
    "I": (300, None, 0),  # refused
}


def test_every_mode_of_pillow_is_decided():
    assert set(Image.MODES) <= set(BY_HAND)


@pytest.mark.parametrize("mode", BY_HAND)
def test_modes_by_hand(mode):
    value, colour, tolerance = BY_HAND[mode]
    picture = Image.new(mode, (3, 2), value)
    if mode in ("P", "PA"):
        picture.putpalette([0, 0, 0, 10, 20, 30])
        if mode == "PA":
            picture.putdata([value] * 6)
    if colour is None:
        with pytest.raises(ImageReadError, match=r"p\.tif: .*32-bit integers \(here 300 to 300\)"):
            to_rgb(picture, "p.tif")
        return
    image = to_rgb(picture)
    assert (image.shape, image.dtype) == ((2, 3, 3), np.uint8)
    np.testing.assert_allclose(image, np.broadcast_to(colour, (2, 3, 3)), atol=tolerance)


def test_palette_with_transparency():
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    for transparency in (bytes([0, 128]), 1):
        image = read_image(encoded(palette, "PNG", transparency=transparency))
        assert image[0, 0].tolist() == [10, 20, 30]


GREYS = st.lists(st.integers(0, 255), min_size=1, max_size=9)


@given(GREYS, st.sampled_from(sorted(set(BY_HAND) - {"1", "I", "La", "RGBa"})))
@settings(deadline=None, max_examples=60)
def test_a_grey_picture_is_the_same_in_every_mode(greys, mode):
    """No scale depends on the values: the darkest picture is as dark in every mode."""
    grey = np.array([greys], np.uint8)
    if mode.startswith("I;16"):
        deep = grey.astype(np.uint16) * 257
        stored = ">u2" if mode == "I;16B" else "<u2"
        picture = Image.frombytes(mode, (len(greys), 1), deep.astype(stored).tobytes())
    elif mode == "F":
        picture = Image.fromarray(grey.astype(np.float32) / 255)
    elif mode == "LAB":
        from PIL import ImageCms

        to_lab = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
        picture = ImageCms.profileToProfile(
            Image.fromarray(grey).convert("RGB"), *to_lab, outputMode="LAB"
        )
    elif mode == "HSV":
        picture = Image.fromarray(grey).convert("RGB").convert("HSV")
    else:
        picture = Image.fromarray(grey).convert(mode)
    assert picture.mode == mode
    wanted = np.repeat(grey[..., None], 3, -1)
    np.testing.assert_allclose(to_rgb(picture), wanted, atol=3 if mode == "LAB" else 0)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (encoded(Image.fromarray(np.full((1, 1), 0x80FF, np.uint16)), "PNG"), [128]),
        (b"P5 2 1 65535\n\x80\x00\xff\xff", [128, 255]),
        (b"P5 2 1 1023\n\x02\x00\x03\xff", [128, 255]),  # white is 1023
        (b"P5 2 1 15\n\x00\x0f", [0, 255]),
        (tiff("<u2", [0, 0x8000, 0xFFFF]), [0, 128, 255]),
        (tiff("<u2", [0, 0x8000, 0xFFFF], photometric=0), [255, 127, 0]),  # white is 0
        (tiff("<u2", b"\xff\xf8\x00", bits=12), [255, 128]),
        (tiff("<f4", [0, 0.2, 1]), [0, 51, 255]),
        (tiff("<f4", [0, 0.2, 1], photometric=0), [255, 204, 0]),
    ],
)
def test_deep_files_have_a_fixed_scale(data, wanted):
    np.testing.assert_array_equal(read_image(data), np.repeat(wanted, 3).reshape(1, -1, 3))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff("<f4", [0, 255]), r"between 0 \(black\) and 1 \(white\), here 0 to 255"),
        (tiff("<f4", [-0.5, 1]), r"here -0\.5 to 1"),
        (tiff("<f4", [0, np.nan]), "nan"),
        (tiff("<i4", [0, 255]), r"32-bit integers \(here 0 to 255\)"),
        (tiff("<u4", [7, 65535]), r"32-bit integers \(here 7 to 65535\)"),
        (tiff("<i2", [0, 255]), r"signed .* integers \(here 0 to 255\)"),
    ],
)
def test_files_without_a_stated_white_are_refused(data, message):
    for read in (read_image, as_array):
        with pytest.raises(ImageReadError, match=rf"^image: .*{message}.*8 bits a channel"):
            read(data)


# --- orientation and other metadata --------------------------------------------------------------

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


# --- what is refused -----------------------------------------------------------------------------


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ImageReadError, match=r"gone\.jpg: no such image file"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(ImageReadError, match=r"cannot be opened \(Is a directory\)"):
        read_image(tmp_path)
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    with pytest.raises(ImageReadError, match=r"text\.jpg: not an image file"):
        read_image(text)
    big = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(big), "JPEG")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageReadError, match=r"cut\.jpg: cannot be decoded.*truncated"):
        read_image(cut)
    with pytest.raises(ImageReadError, match=r"big\.jpg: 64x64 pixels are over the budget of 100"):
        read_image(data, max_pixels=100, name="big.jpg")
    with pytest.raises(ImageReadError, match=r"line\\nbreak\\udcff: no such"):
        read_image("line\nbreak\udcff")


def test_a_bomb_is_refused_by_its_header():
    """One bit a pixel: 20000 x 20000 pixels in a few kilobytes, past Pillow's own limit too."""
    data = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    with pytest.raises(ImageReadError, match=r"bomb\.png: .*than any budget allows: scale the"):
        read_image(data, name="bomb.png", max_pixels=10**12)


@pytest.mark.parametrize("kind", ["coco", "voc", "yolo", "tfds"])
def test_the_budget_of_a_configuration(kind, tmp_path):
    """The remedy that the message names can be carried out."""
    shapes = open_dataset(DataConfig(num_train=1, num_eval=1, image_size=64), train=True)
    if kind == "voc":
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(shapes[0].image).save(tmp_path / "JPEGImages" / "a.png")
        (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\n")
        (tmp_path / "Annotations" / "a.xml").write_text(
            "<annotation><size><width>64</width><height>64</height></size><object><name>x</name>"
            "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
            "</annotation>"
        )
    elif kind == "yolo":
        (tmp_path / "images" / "train").mkdir(parents=True)
        Image.fromarray(shapes[0].image).save(tmp_path / "images" / "train" / "a.png")
        (tmp_path / "classes.txt").write_text("cat\n")
    elif kind == "coco":
        from aqdetr_jax.data.coco_writer import write_coco_folder

        write_coco_folder(shapes, tmp_path)
    else:
        from aqdetr_jax.data.tfds_builder import prepare

        prepare(shapes, tmp_path)
    splits = {"train_split": "train", "eval_split": "train"}
    data = DataConfig(kind=kind, root=str(tmp_path), max_pixels=64 * 64 - 1, **splits)
    with pytest.raises(ImageReadError, match=r"64x64 pixels .*raise max_pixels \(data\.max_pixels"):
        open_dataset(data, train=True)[0]
    enough = dataclasses.replace(data, max_pixels=64 * 64)
    np.testing.assert_array_equal(open_dataset(enough, train=True)[0].image, shapes[0].image)
    assert DataConfig().max_pixels == MAX_PIXELS


# --- what a detector takes -----------------------------------------------------------------------


def test_every_kind_of_image(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(PIXELS).save(path)
    data = path.read_bytes()
    kinds = [path, str(path), data, bytearray(data), memoryview(data), Image.open(path)]
    for image in (*kinds, PIXELS.copy(), jnp.asarray(PIXELS)):
        array = as_array(image)
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, PIXELS)
    grey = PIXELS[..., 0]
    for image in (grey, jnp.asarray(grey), Image.fromarray(grey)):
        np.testing.assert_array_equal(as_array(image), np.repeat(grey[..., None], 3, -1))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((1, 8, 8, 3), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        jnp.zeros((8, 8, 3)),
        np.full((8, 8), "secret"),
    ],
)
def test_wrong_arrays_are_explained(array):
    with pytest.raises(ValueError, match=r"must be uint8 \[H, W, 3\]") as caught:
        as_array(array)
    assert "secret" not in str(caught.value)


def test_errors_never_print_content():
    secret = b"\xff\xd8\xff\xe0secret" * 1000
    for content in (secret, bytearray(secret), memoryview(secret)):
        with pytest.raises(ImageReadError) as caught:
            as_array(content)
        assert "secret" not in str(caught.value)
        assert len(str(caught.value)) < 300
    with pytest.raises(ImageReadError) as caught:  # an encoded file taken for a name
        as_array("secret" * 10_000)
    assert len(str(caught.value)) < 300
    for other in ([1, 2, "secret"], {"secret": 1}, 1234567, None):
        with pytest.raises(TypeError, match="an image is a path") as caught:
            as_array(other)
        assert "secret" not in str(caught.value)
        assert "1234567" not in str(caught.value)


def test_a_broken_pillow_image_is_named_too():
    data = encoded(Image.fromarray(np.tile(PIXELS, (20, 20, 1))), "PNG")
    picture = Image.open(io.BytesIO(data[: len(data) // 2]))
    with pytest.raises(ImageReadError, match="image: cannot be decoded"):
        as_array(picture)


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
