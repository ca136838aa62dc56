"""The one reader of pictures: files, bytes, Pillow's and arrays, all to uint8 RGB.

Every mode of Pillow has a fixed scale, the same for every picture of a set, or is refused; what a
file says besides its pixels (EXIF) turns the picture where it can be read and is no reason to
refuse it.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from aqdetr_jax.data import exif
from aqdetr_jax.data.dataset import ImageReadError
from aqdetr_jax.paths import as_path, is_local, printable

ImageLike = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray | Any
"""What a detector takes: a path, an encoded file, a Pillow image, a NumPy or JAX array."""

MAX_PIXELS = 50_000_000
# Formats of photographs; Pillow knows more, some of which start other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")
_ENCODED = bytes | bytearray | memoryview
_BITS_PER_SAMPLE, _PHOTOMETRIC = 0x0102, 0x0106


@dataclasses.dataclass(frozen=True)
class Header:
    """What a picture says of itself before its pixels are decoded.

    Attributes:
      height: pixels, as stored.
      width: pixels, as stored.
      orientation: EXIF orientation, 1 to 8.
      format: Pillow's name of the file format.
      mode: Pillow's mode.
    """

    height: int
    width: int
    orientation: int
    format: str
    mode: str


def read_header(source: str | os.PathLike[str]) -> Header:
    """Reads size, orientation and kind of an image file; see :func:`read_image`.

    Args:
      source: path.

    Raises:
      ImageReadError: missing, or no image; the message names the file.
    """
    return _read(source, printable(source), lambda picture, found: _header(picture, found))


def read_image(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview,
    *,
    expected_size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
    upright: bool = False,
) -> np.ndarray:
    """Reads an image file to RGB.

    Any mode is converted, see :func:`to_rgb`. The header is read first, so an image over the pixel
    budget costs no memory. Of several frames the first is taken.

    EXIF policy: COCO's own tools ignore the orientation tag and annotate the stored pixels, other
    tools annotate the turned image. For annotated images the tag is therefore applied only if
    ``expected_size`` agrees with the turned image and not with the stored one; a half turn or a
    mirror leaves the size as it is and is never applied. With ``upright`` the tag is always
    obeyed, as a viewer does. Metadata that cannot be read never refuses pixels that can.

    Args:
      source: path or encoded bytes.
      expected_size: ``(height, width)`` as annotated, or None.
      max_pixels: refuse larger images.
      name: name for messages; the path by default.
      upright: turn the image as its tag says.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ImageReadError: missing, unreadable, truncated, too large or of a kind that has no scale; the
        message names the file.
    """
    if name is None:
        name = "image" if isinstance(source, _ENCODED) else os.fsdecode(source)
    shown = printable(name)

    def decode(picture: Image.Image, found: int | None) -> tuple[Header, np.ndarray]:
        _check_budget(picture.size, max_pixels, shown)
        if picture.format == "TIFF":  # Pillow turns these alone, by what it holds at this moment.
            applied = _pillows_orientation(picture)
            header = _header(picture, found)
            return header, exif.turn_back(to_rgb(picture, shown), applied)
        image = to_rgb(picture, shown)
        return _header(picture, found), image  # some formats put EXIF behind the pixels

    header, image = _read(source, shown, decode)
    stored = (header.height, header.width)
    sideways = header.orientation in exif.SIDEWAYS
    if upright or (sideways and expected_size == stored[::-1] != stored):
        image = exif.turn(image, header.orientation)
    return image


def as_array(image: ImageLike, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Any accepted image as uint8 [H, W, 3], turned as its EXIF orientation says.

    Args:
      image: path, encoded file (bytes, bytearray, memoryview), Pillow image, or NumPy or JAX array
        uint8 [H, W, 3] or [H, W].
      max_pixels: refuse larger files; what is in memory already has no limit.

    Raises:
      ImageReadError: the image cannot be read.
      ValueError: an array of another shape or dtype.
      TypeError: something else than an image.
    """
    if isinstance(image, Image.Image):
        try:
            image.load()  # of TIFF, Pillow turns the pixels now and forgets the tag
            return exif.turn(to_rgb(image), _orientation(image))
        except ImageReadError:
            raise
        except Exception as error:
            raise ImageReadError(f"image: cannot be decoded ({_reason(error)})") from error
    if isinstance(image, str | os.PathLike | _ENCODED):
        return read_image(image, upright=True, max_pixels=max_pixels)
    if not hasattr(image, "__array__"):
        raise TypeError(
            "an image is a path, an encoded file as bytes, a Pillow image or an array, "
            f"not {type(image).__name__}"
        )
    array = np.asarray(image)
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=-1)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise ValueError(
            f"an image array must be uint8 [H, W, 3] (or [H, W]), got {array.dtype} "
            f"{list(array.shape)}; for floats in [0, 1] use (x * 255).astype('uint8')"
        )
    return array


def to_rgb(picture: Image.Image, name: str = "image") -> np.ndarray:
    """Any mode of Pillow's as uint8 [H, W, 3].

    Eight bits a channel are converted by Pillow; transparency is dropped (premultiplied colours are
    first divided by it). Grey of 16 bits keeps its upper 8 (of 12-bit TIFF the upper 8 of 12).
    Float must lie in [0, 1], of which 1 is white. No scale depends on the values of a picture, lest
    pictures of one set get different ones: 32-bit integers, whose white nobody can know, are
    refused.

    Args:
      picture: the image.
      name: name for messages.

    Raises:
      ImageReadError: 32-bit integers, or floats outside [0, 1]; the message gives their range.
    """
    mode = picture.mode
    tags = _tiff_tags(picture)
    if mode.startswith("I;16"):
        twelve = tuple(tags.get(_BITS_PER_SAMPLE, ())) == (12,)
        grey = (np.asarray(picture) >> (4 if twelve else 8)).astype(np.uint8)
    elif mode == "I" and picture.format in ("PPM", "PNG"):  # Pillow scales these to 16 bits
        grey = (np.asarray(picture) >> 8).astype(np.uint8)
    elif mode == "I":
        low, high = picture.getextrema()
        raise ImageReadError(
            f"{name}: signed or 32-bit integers (here {low} to {high}) do not say which value is "
            "white; save the image with 8 bits a channel, or 16 unsigned ones"
        )
    elif mode == "F":
        values = np.asarray(picture)
        low, high = values.min(), values.max()
        if not 0 <= low <= high <= 1:  # NaN compares False too
            raise ImageReadError(
                f"{name}: float pixels must lie between 0 (black) and 1 (white), here {low:g} to "
                f"{high:g}; scale them, or save the image with 8 bits a channel"
            )
        grey = np.rint(values * 255).astype(np.uint8)
    else:
        return _plain_rgb(picture)
    if tags.get(_PHOTOMETRIC) == 0:  # 0 is white; Pillow turns only the smaller ones over
        grey = 255 - grey
    return np.stack([grey] * 3, axis=-1)


def _plain_rgb(picture: Image.Image) -> np.ndarray:
    """Eight bits a channel, or one bit."""
    if picture.mode == "La":
        picture = picture.convert("LA")
    elif picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # Pillow warns about going straight to RGB.
    if picture.mode != "RGB":  # Pillow would copy
        picture = picture.convert("RGB")
    return np.asarray(picture)


def _read(source: Any, name: str, use: Any) -> Any:
    """``use(picture, orientation)`` of an opened file, without its metadata if they are in the way.

    The orientation is None where it is Pillow's to find.

    Raises:
      ImageReadError: neither way works.
    """
    try:
        with _opened(source) as file:
            try:
                with Image.open(file, formats=_FORMATS) as picture:
                    return use(picture, None)
            except ImageReadError:
                raise
            except Exception:
                result = _without_metadata(file, use)
                if result is None:
                    raise
                return result
    except ImageReadError:
        raise
    except FileNotFoundError as error:
        raise ImageReadError(f"{name}: no such image file") from error
    except UnidentifiedImageError as error:
        raise ImageReadError(f"{name}: not an image file that Pillow can read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = int(2 * (Image.MAX_IMAGE_PIXELS or 0))
        raise ImageReadError(
            f"{name}: over {limit} pixels, more than any budget allows: scale the image down"
        ) from error
    except OSError as error:
        if error.errno is None:  # Pillow's own, of broken files
            raise ImageReadError(f"{name}: cannot be decoded ({_reason(error)})") from error
        raise ImageReadError(f"{name}: cannot be opened ({error.strerror})") from error
    except Exception as error:  # Broken files make Pillow's decoders raise nearly anything.
        raise ImageReadError(f"{name}: cannot be decoded ({_reason(error)})") from error


def _opened(source: Any) -> BinaryIO:
    if isinstance(source, _ENCODED):
        return io.BytesIO(source)
    if not is_local(source):
        return io.BytesIO(as_path(source).read_bytes())
    file = as_path(source).open("rb")
    if file.seekable():
        return file
    with file:  # a pipe
        return io.BytesIO(file.read())


def _without_metadata(file: BinaryIO, use: Any) -> Any:
    """The second try; None when that fails too."""
    try:
        file.seek(0)
        left = exif.bare(file.read())
        if left is None:
            return None
        data, value = left
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            return use(picture, value or 1)
    except ImageReadError:
        raise
    except Exception:  # the first try's reason is the one to tell
        return None


def _header(picture: Image.Image, found: int | None) -> Header:
    value = _orientation(picture) if found is None else found
    width, height = picture.size
    if _tiff_tags(picture).get(exif.ORIENTATION) in exif.SIDEWAYS:
        width, height = height, width  # Pillow gives the turned size
    return Header(height, width, value, picture.format or "", picture.mode)


def _tiff_tags(picture: Image.Image) -> Mapping[int, Any]:
    return getattr(picture, "tag_v2", {}) if picture.format == "TIFF" else {}


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 when none can be read."""
    block = picture.info.get("exif")
    value = exif.orientation(block) if isinstance(block, bytes) else None
    return value or _pillows_orientation(picture)


def _pillows_orientation(picture: Image.Image) -> int:
    """What Pillow finds, which also looks in PNG's text, XMP and TIFF's own tags."""
    try:
        value = picture.getexif().get(exif.ORIENTATION)
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _check_budget(size: tuple[int, int], max_pixels: int, name: str) -> None:
    if size[0] * size[1] > max_pixels:
        raise ImageReadError(
            f"{name}: {size[0]}x{size[1]} pixels are over the budget of {max_pixels}; scale the "
            "image down or raise max_pixels (data.max_pixels of a configuration, predict's "
            "--max-pixels)"
        )


def _reason(error: Exception) -> str:
    """An error in one short line; some of Pillow's quote what they found."""
    return printable(str(error) or type(error).__name__, most=200)
