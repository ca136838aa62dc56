"""The reader of pictures, against Pillow's own results and values by hand."""

from __future__ import annotations

import dataclasses
import io
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.dataset import ImageReadError
from aqdetr_jax.data.images import MAX_PIXELS, as_array, read_image, to_rgb
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
