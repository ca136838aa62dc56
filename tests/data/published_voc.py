"""A small copy of Pascal VOC 2007 and 2012 in their authors' layout, with faults."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

from planted import (
    Box,
    Picture,
    Refused,
    broken_file,
    draw,
    encode,
    read_files,
    scene,
    text_fault,
    write_files,
)

KINDS = ("person", "car", "aeroplane", "tvmonitor", "sheep")
CLASSES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
TARS = {
    "VOCtrainval_06-Nov-2007": ("VOC2007", "trainval", 0),
    "VOCtest_06-Nov-2007": ("VOC2007", "test", 40),
    "VOCtrainval_11-May-2012": ("VOC2012", "trainval", 80),
}
_XML = """<annotation>
\t<folder>{year}</folder>
\t<filename>{name}</filename>
\t<source>
\t\t<database>The {year} Database</database>
\t\t<annotation>PASCAL {year}</annotation>
\t\t<image>flickr</image>
\t\t<flickrid>325991873</flickrid>
\t</source>
\t<owner>
\t\t<flickrid>archintent louisville</flickrid>
\t\t<name>?</name>
\t</owner>
\t<size>
\t\t<width>{width}</width>
\t\t<height>{height}</height>
\t\t<depth>3</depth>
\t</size>
\t<segmented>{segmented}</segmented>
{objects}</annotation>
"""
_OBJECT = """\t<object>
\t\t<name>{kind}</name>
\t\t<pose>Unspecified</pose>
\t\t<truncated>{truncated}</truncated>
{occluded}{difficult}{before}\t\t<bndbox>
\t\t\t<xmin>{xmin}</xmin>
\t\t\t<ymin>{ymin}</ymin>
\t\t\t<xmax>{xmax}</xmax>
\t\t\t<ymax>{ymax}</ymax>
\t\t</bndbox>
{parts}\t</object>
"""
# As 2012's files have them: the parts of a person before its own box too.
_PART = """\t\t<part>
\t\t\t<name>head</name>
\t\t\t<bndbox>
\t\t\t\t<xmin>2</xmin>
\t\t\t\t<ymin>2</ymin>
\t\t\t\t<xmax>6</xmax>
\t\t\t\t<ymax>7</ymax>
\t\t\t</bndbox>
\t\t</part>
"""


def pictures(tar: str, *, faults: bool = True) -> list[Picture]:
    """The images of an archive; with ``faults`` some that the program must make up for."""
    year, _, seed = TARS[tar]
    made = [_ordinary(seed + n, _name(year, 5 + 2 * n + seed)) for n in range(12)]
    if not faults:
        return made
    person = (8, 8, 40, 40)
    boxes: dict[str, list[Box]] = {
        "zero area": [Box("person", (9, 9, 9, 20), "zero_area", {"xmin": 9, "xmax": 9})],
        "inverted": [Box("car", (20, 20, 30, 30), "negative", {"ymin": 31, "ymax": 20})],
        "NaN": [Box("car", (5, 5, 9, 9), "non_finite", {"xmax": "nan"})],
        "outside": [Box("sheep", (70, 70, 80, 80), "outside")],
        "past the edge": [Box("person", (30, 20, 90, 70))],
        "counted from 0": [Box("sheep", (-1, -1, 20, 21))],
        "doubled": [Box("sheep", person), Box("sheep", person)],
        "fractions of a pixel": [Box("car", (4.70000076293945, 4, 24, 24.5))],
        "difficult past the edge": [Box("person", (20, 30, 70, 66), "ignored")],
        "not said to be easy": [Box("tvmonitor", (20, 9, 44, 33), "", {"difficult": None})],
    }
    number = 900 + seed
    for more in boxes.values():
        number += 1
        made.append(_ordinary(number, _name(year, number), more=more))
    for how in ("L", "CMYK", "RGBA", "turned", "tagged", "mirrored"):
        number += 1
        made.append(_ordinary(number, _name(year, number), how=how))
    made.append(_ordinary(number + 1, _name(year, number + 1), boxes=False))
    return made


def everything(*, faults: bool = True) -> dict[str, list[Picture]]:
    """The images of each archive."""
    return {tar: pictures(tar, faults=faults) for tar in TARS}


def _name(year: str, number: int) -> str:
    return f"{number:06d}.jpg" if year == "VOC2007" else f"2008_{number:06d}.jpg"


def _ordinary(seed: int, name: str, **options: Any) -> Picture:
    """A scene whose boxes are whole pixels, as VOC's."""
    options.setdefault("more", [Box("car", (2, 30, 46, 46), "ignored")] * (seed % 4 == 0))
    more = options.pop("more")
    made = scene(seed, name, name, KINDS, **options)
    for box in made.boxes:
        x1, y1, x2, y2 = (float(round(v)) for v in box.corners)
        box.corners = x1, y1, max(x2, x1 + 2), max(y2, y1 + 2)
    if more:
        made.boxes += more
        made.file = encode(draw(seed, made.size, made.boxes), options.get("how", "RGB"))
    return made


def xml(picture: Picture, year: str) -> bytes:
    """An annotation file."""
    objects = ""
    for n, box in enumerate(picture.boxes):
        x1, y1, x2, y2 = (
            f"{v:.17g}" for v in (box.corners[0] + 1, box.corners[1] + 1, *box.corners[2:])
        )
        values: dict[str, Any] = {
            "kind": box.kind,
            "truncated": n % 2,
            "occluded": f"\t\t<occluded>{n % 2}</occluded>\n" if year == "VOC2012" else "",
            "difficult": int(box.fate == "ignored"),
            "parts": _PART * (box.kind == "person" and year == "VOC2007"),
            "before": _PART * (box.kind == "person" and year == "VOC2012"),
            **dict(zip(("xmin", "ymin", "xmax", "ymax"), (x1, y1, x2, y2), strict=True)),
            **box.written,
        }
        said = values["difficult"]
        values["difficult"] = "" if said is None else f"\t\t<difficult>{said}</difficult>\n"
        objects += _OBJECT.format(**values)
    height, width = picture.size
    return _XML.format(
        year=year,
        name=picture.name,
        width=width,
        height=height,
        segmented=0,
        objects=objects,
    ).encode()


def _lists(made: list[Picture], split: str) -> dict[str, str]:
    """``ImageSets/Main``: every list of images, and the three columns of values of each class."""
    half = len(made) // 2
    splits = {"test": made}
    if split == "trainval":
        splits = {"train": made[:half], "val": made[half:], "trainval": made}
    lists = {}
    for name, part in splits.items():
        lists[name] = "".join(f"{Path(p.name).stem}\n" for p in part)
        for kind in CLASSES:
            lines = []
            for picture in part:
                fates = {b.fate == "ignored" for b in picture.boxes if b.kind == kind}
                column = -1 if not fates else 0 if fates == {True} else 1
                lines.append(f"{Path(picture.name).stem} {column:2d}\n")
            lists[f"{kind}_{name}"] = "".join(lines)
    return lists


def truth(parts: list[list[Picture]]) -> dict[str, Any]:
    """What must be looked for, written by hand for pycocotools: images numbered from 1."""
    images, annotations = [], []
    for picture in (picture for part in parts for picture in part):
        images.append({"id": len(images) + 1})
        for box in picture.boxes:
            if box.fate in ("", "ignored"):
                x1, y1, x2, y2 = box.corners
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": len(images),
                        "category_id": 1 + CLASSES.index(box.kind),
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": int(box.fate == "ignored"),
                    }
                )
    kinds = [{"id": n, "name": name} for n, name in enumerate(CLASSES, 1)]
    return {"images": images, "annotations": annotations, "categories": kinds}


def write(root: Path, sets: dict[str, list[Picture]]) -> None:
    """Writes the set into a folder as its archives unpack."""
    for tar, made in sets.items():
        year, split, _ = TARS[tar]
        first = Path(made[0].name).stem
        files = {f"Annotations/{Path(p.name).stem}.xml": xml(p, year) for p in made}
        files |= {f"JPEGImages/{p.name}": p.file for p in made}
        files |= {f"ImageSets/Main/{n}.txt": t.encode() for n, t in _lists(made, split).items()}
        files[f"ImageSets/Layout/{split}.txt"] = f"{first} 1\n".encode()
        files[f"ImageSets/Segmentation/{split}.txt"] = f"{first}\n".encode()
        files[f"SegmentationClass/{first}.png"] = encode(draw(0, (8, 8), []), "RGBA")
        if year == "VOC2012":  # an image that no list of Main has
            other = scene(7, "2007_000032.jpg", 0, KINDS)
            files["Annotations/2007_000032.xml"] = xml(other, year)
            files["JPEGImages/2007_000032.jpg"] = other.file
        write_files(root / "VOCdevkit" / year, files)


def pack(root: Path, target: Path) -> None:
    """Packs what ``write`` wrote into the archives of the authors' page."""
    target.mkdir()
    for tar, (year, split, _) in TARS.items():
        others = {Path(p.name).stem for o in TARS if o != tar for p in pictures(o)}
        with tarfile.open(target / f"{tar}.tar", "w") as archive:
            for path in ("VOCdevkit", f"VOCdevkit/{year}"):
                folder = tarfile.TarInfo(path)
                folder.type = tarfile.DIRTYPE
                archive.addfile(folder)
            for path, data in read_files(root).items():
                stem = Path(path).stem
                listed = path.split("/")[2] == "ImageSets"
                of_test = stem == "test" or stem.endswith("_test")
                mine = of_test == (split == "test") if listed else stem not in others
                if path.startswith(f"VOCdevkit/{year}/") and mine:
                    info = tarfile.TarInfo(path)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def refusals(sets: dict[str, list[Picture]]) -> dict[str, Refused]:
    """Faults that nobody can mend but the user, each on images of its own."""
    old, test, new = sets.values()
    small = encode(draw(1, (20, 30), []))

    def annotation(year: str, picture: Picture) -> str:
        return f"VOCdevkit/{year}/Annotations/{Path(picture.name).stem}.xml"

    def image(year: str, picture: Picture) -> str:
        return f"VOCdevkit/{year}/JPEGImages/{picture.name}"

    def edit(year: str, picture: Picture, said: str, right: str, wrong: str) -> Refused:
        where = Path(picture.name).stem
        return text_fault(annotation(year, picture), rf"{where}\.xml: {said}", right, wrong)

    a, b, c, d, g = old[:5]
    e, f, h = new[:3]
    stem = Path(b.name).stem
    last = f"<ymax>{test[0].boxes[0].corners[3]:g}</ymax>"
    return {
        "size 0": edit(
            "VOC2007",
            a,
            r"<size> must be 1 to \d+ pixels each way, got 0x",
            f"<width>{a.size[1]}</width>",
            "<width>0</width>",
        ),
        "malformed": edit("VOC2012", e, "malformed XML", "</bndbox>", "</bnd>"),
        "no class": edit(
            "VOC2012", f, "object 1 is a 'persons'", "<name>person<", "<name>persons<"
        ),
        "no corner": edit("VOC2007", test[0], "<bndbox> has no <ymax>", last, "<!-- -->"),
        "no number": edit("VOC2007", test[1], "<xmin> is no number: 'left", "<xmin>", "<xmin>left"),
        "no annotation": broken_file(
            annotation("VOC2007", b), rf"{stem}\.xml does not exist", None, xml(b, "VOC2007")
        ),
        "other size": broken_file(
            image("VOC2007", c), rf"{c.name} is 30x20 pixels but annotated", small, c.file
        ),
        "cut": broken_file(
            image("VOC2007", g), rf"{g.name}: cannot be decoded", g.file[:400], g.file
        ),
        "no picture": broken_file(
            image("VOC2012", h), rf"{h.name}: not an image file", b"", h.file
        ),
        "no image": broken_file(
            image("VOC2007", d), rf"no image .*{Path(d.name).stem} with one of", None, d.file
        ),
        "in two lists": text_fault(
            "VOCdevkit/VOC2007/ImageSets/Main/test.txt",
            rf"test\.txt: '{Path(test[3].name).stem}' is listed twice, in lines 3 and 4",
            f"{Path(test[2].name).stem}\n",
            f"{Path(test[3].name).stem}\n",
        ),
    }
