"""Pictures and annotations of the small copies of COCO and VOC, and every fault they may have."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

ORIENTATION = 0x0112


@dataclasses.dataclass
class Box:
    """An annotated object, and what must become of it.

    Attributes:
      kind: name of its class.
      corners: (x1, y1, x2, y2) that are meant, pixels from 0 to the end of the last one.
      fate: "" = learnt and looked for; "ignored" = a crowd, or difficult; else why it is dropped.
      written: what its annotation says in place of what ``corners`` would give.
    """

    kind: str
    corners: tuple[float, float, float, float]
    fate: str = ""
    written: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Picture:
    """An image and its objects.

    Attributes:
      name: of its file.
      id: in the annotations.
      size: (height, width) as annotated.
      file: its bytes.
      boxes: its objects.
    """

    name: str
    id: int | str
    size: tuple[int, int]
    file: bytes
    boxes: list[Box]

    def seen(self) -> np.ndarray:
        """What a network must see, uint8 [H, W, 3]: turned where the annotated size says so."""
        with Image.open(io.BytesIO(self.file)) as picture:
            if picture.size != self.size[::-1]:
                picture = ImageOps.exif_transpose(picture)
            return np.asarray(picture.convert("RGB"))


@dataclasses.dataclass
class Refused:
    """A fault that stops the program until it is mended.

    Attributes:
      said: what the one line must say of it: file, id, and what is wrong.
      plant: puts it into the unpacked set.
      mend: takes it out again, as a user would.
      file: where it is.
    """

    said: str
    plant: Callable[[Path], Any]
    mend: Callable[[Path], Any]
    file: str


def broken_file(inside: str, said: str, content: bytes | None, whole: bytes) -> Refused:
    """A file that is damaged (None: missing), and mended by a whole one."""

    def plant(root: Path) -> None:
        if content is None:
            (root / inside).unlink()
        else:
            (root / inside).write_bytes(content)

    return Refused(said, plant, lambda root: (root / inside).write_bytes(whole), inside)


def json_fault(
    inside: str,
    said: str,
    find: Callable[[Any], dict[str, Any]],
    key: str,
    wrong: Any,
) -> Refused:
    """A wrong value in a JSON file."""

    def edit(root: Path, value: Any) -> Any:
        path = root / inside
        content = json.loads(path.read_text())
        entry = find(content)
        before = entry[key]
        entry[key] = value
        path.write_text(json.dumps(content))
        return before

    right: list[Any] = []
    return Refused(
        said,
        lambda root: right.append(edit(root, wrong)),
        lambda root: edit(root, right.pop()),
        inside,
    )


def text_fault(inside: str, said: str, right: str, wrong: str) -> Refused:
    """Wrong text in place of the first of right text."""

    def replace(root: Path, old: str, new: str) -> None:
        text = (root / inside).read_text()
        assert old in text
        (root / inside).write_text(text.replace(old, new, 1))

    return Refused(
        said,
        lambda root: replace(root, right, wrong),
        lambda root: replace(root, wrong, right),
        inside,
    )


def write_files(root: Path, files: dict[str, bytes]) -> None:
    """Writes files, and folders (whose names end in a slash)."""
    for path, data in files.items():
        target = root / path
        (target if path.endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
        if not path.endswith("/"):
            target.write_bytes(data)


def read_files(root: Path) -> dict[str, bytes]:
    """All files in a folder, by their paths."""
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


# --- pictures ------------------------------------------------------------------------------------

SHADES = ((230, 60, 60), (60, 200, 80), (70, 90, 240), (230, 220, 60))


def draw(seed: int, size: tuple[int, int], boxes: Sequence[Box]) -> Image.Image:
    """Noise, with a block of colour for each object."""
    pixels = np.random.default_rng(seed).integers(0, 60, (*size, 3), np.uint8)
    for box in boxes:
        x1, y1, x2, y2 = (max(round(v), 0) for v in box.corners)
        pixels[y1:y2, x1:x2] = SHADES[len(box.kind) % len(SHADES)]
    return Image.fromarray(pixels)


def encode(picture: Image.Image, how: str = "RGB") -> bytes:
    """A file of a photograph called ``.jpg``.

    Args:
      picture: as it is annotated.
      how: mode of Pillow's ("RGBA", which JPEG has not, is a PNG under that name); "turned",
        "mirrored" = stored otherwise, with the EXIF orientation that turns it upright; "tagged" =
        stored as annotated, with an orientation that would turn it away.
    """
    stream, exif = io.BytesIO(), Image.Exif()
    if how == "RGBA":
        picture.putalpha(128)
        picture.save(stream, "PNG")
    elif how in ("L", "CMYK"):
        picture.convert(how).save(stream, "JPEG", quality=90)
    elif how == "turned":  # 6: a viewer turns it by 90 degrees clockwise
        exif[ORIENTATION] = 6
        picture.transpose(Image.Transpose.ROTATE_90).save(stream, "JPEG", quality=90, exif=exif)
    else:
        if how != "RGB":
            exif[ORIENTATION] = {"tagged": 8, "mirrored": 2}[how]
        picture.save(stream, "JPEG", quality=90, exif=exif)
    return stream.getvalue()


def scene(
    seed: int,
    name: str,
    number: int | str,
    kinds: Sequence[str],
    *,
    how: str = "RGB",
    more: Sequence[Box] = (),
    boxes: bool = True,
) -> Picture:
    """One image: a large object of the first kind in the middle, some small ones, and ``more``."""
    rng = np.random.default_rng(seed)
    height, width = (48, 64) if rng.random() < 0.6 else (64, 48)
    objects: list[Box] = []
    if boxes:
        x, y = rng.uniform(4, 8, 2).round(2).tolist()
        objects = [Box(kinds[0], (x, y, round(width - x, 2), round(height - y - 1.5, 2)))]
        for _ in range(rng.integers(0, 4)):
            x, y = rng.uniform(1, 30, 2).round(2).tolist()
            w, h = rng.uniform(3, 16, 2).round(2).tolist()
            kind = kinds[int(rng.integers(0, len(kinds)))]
            objects.append(Box(kind, (x, y, round(x + w, 2), round(y + h, 2))))
    objects += more
    size = (height, width)
    return Picture(name, number, size, encode(draw(seed, size, objects), how), objects)
