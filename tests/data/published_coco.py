"""A small copy of COCO 2017 in its authors' layout, with faults that are mended and refused."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from planted import (
    Box,
    Picture,
    Refused,
    broken_file,
    draw,
    encode,
    json_fault,
    read_files,
    scene,
    write_files,
)

SPLITS = ("train2017", "val2017")
_GROUPS = {
    "person": "person",
    "vehicle": "bicycle car motorcycle airplane bus train truck boat",
    "outdoor": "traffic_light fire_hydrant _ stop_sign parking_meter bench",
    "animal": "bird cat dog horse sheep cow elephant bear zebra giraffe",
    "accessory": "_ backpack umbrella _ _ handbag tie suitcase",
    "sports": "frisbee skis snowboard sports_ball kite baseball_bat baseball_glove skateboard "
    "surfboard tennis_racket",
    "kitchen": "bottle _ wine_glass cup fork knife spoon bowl",
    "food": "banana apple sandwich orange broccoli carrot hot_dog pizza donut cake",
    "furniture": "chair couch potted_plant bed _ dining_table _ _ toilet",
    "electronic": "_ tv laptop mouse remote keyboard cell_phone",
    "appliance": "microwave oven toaster sink refrigerator",
    "indoor": "_ book clock vase scissors teddy_bear hair_drier toothbrush",
}
CATEGORIES = [
    {"supercategory": group, "id": number, "name": name.replace("_", " ")}
    for number, (group, name) in enumerate(
        ((group, name) for group, names in _GROUPS.items() for name in names.split()), start=1
    )
    if name != "_"
]
"""COCO's 80, numbered 1 to 90."""
IDS = {c["name"]: c["id"] for c in CATEGORIES}
KINDS = ("person", "car", "toothbrush", "dining table", "zebra")
FIRST = {"train2017": 9, "val2017": 139}


def pictures(split: str, *, faults: bool = True) -> list[Picture]:
    """The images of a split; with ``faults`` some that the program must mend or make up for."""
    seed = 100 * SPLITS.index(split)
    made = [_ordinary(seed + n, FIRST[split] + 37 * n) for n in range(16)]
    if not faults:
        return made
    person = (8.0, 8.0, 40.0, 40.0)
    boxes: dict[str, list[Box]] = {
        "zero area": [Box("person", (9, 9, 9, 20), "zero_area", {"bbox": [9.0, 9.0, 0, 11.0]})],
        "inverted": [Box("car", (20, 20, 30, 30), "negative", {"bbox": [30.0, 30.0, -10, -10]})],
        "no number": [Box("car", (5, 5, 9, 9), "non_finite", {"bbox": [5.0, 10**400, 4.0, 4.0]})],
        "outside": [Box("zebra", (70, 70, 80, 80), "outside")],
        "past the edge": [Box("person", (30.5, 20.25, 90.75, 70.5))],
        "doubled": [Box("zebra", person), Box("zebra", person)],
        "area 0": [Box("car", (4, 4, 24, 24), "", {"area": 0})],
        "no area": [Box("car", (5, 5, 29, 29), "", {"area": None})],
        "annotation id 0": [Box("toothbrush", (4, 24, 30, 40), "", {"id": 0})],
        "crowd past the edge": [Box("person", (20, 30, 70, 66), "ignored")],
    }
    number = FIRST[split] + 10_000
    for more in boxes.values():
        number += 11
        made.append(_ordinary(seed + number, number, more=more))
    for how in ("L", "CMYK", "RGBA", "turned", "tagged", "mirrored"):
        number += 11
        made.append(_ordinary(seed + number, number, how=how))
    made.append(_ordinary(seed + 6000, number + 5, boxes=False, more=()))
    made.append(scene(seed + 5000, "text_id.jpg", f"image {split}", KINDS))
    return made


def _ordinary(seed: int, number: int, **options: Any) -> Picture:
    options.setdefault("more", [Box("person", (2, 30, 46, 46), "ignored")] * (seed % 5 == 0))
    return scene(seed, f"{number:012d}.jpg", number, KINDS, **options)


def everything(*, faults: bool = True) -> dict[str, list[Picture]]:
    """Both splits."""
    return {split: pictures(split, faults=faults) for split in SPLITS}


def instances(made: list[Picture], split: str) -> dict[str, Any]:
    """The content of ``instances_SPLIT.json``, with all that the authors' file has."""
    number = 1768 if split == "train2017" else 42_000
    annotations = []
    for picture in made:
        for box in picture.boxes:
            number += 17
            annotation = _annotation(box, picture, number)
            if annotation["area"] is None:
                del annotation["area"]
            annotations.append(annotation)
    return {
        "info": {
            "description": "COCO 2017 Dataset",
            "url": "http://cocodataset.org",
            "version": "1.0",
            "year": 2017,
            "contributor": "COCO Consortium",
            "date_created": "2017/09/01",
        },
        "licenses": [{"url": "http://creativecommons.org/", "id": 4, "name": "Attribution"}],
        "images": [
            {
                "license": 4,
                "file_name": picture.name,
                "coco_url": f"http://images.cocodataset.org/{split}/{picture.name}",
                "height": picture.size[0],
                "width": picture.size[1],
                "date_captured": "2013-11-14 17:02:52",
                "flickr_url": "http://farm7.staticflickr.com/6116/6255196340_da26cf2c9e_z.jpg",
                "id": picture.id,
            }
            for picture in made
        ],
        "annotations": annotations,
        "categories": CATEGORIES,
    }


def _annotation(box: Box, picture: Picture, number: int) -> dict[str, Any]:
    x1, y1, x2, y2 = box.corners
    x, y, w, h = x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)
    crowd = box.fate == "ignored"
    outline: Any = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    if crowd:
        outline = {"counts": run_lengths(box, picture.size), "size": list(picture.size)}
    return {
        "segmentation": outline,
        "area": round(w * h * 0.9, 4),  # of the outline, in general less than the box's
        "iscrowd": int(crowd),
        "image_id": picture.id,
        "bbox": [x, y, w, h],
        "category_id": IDS[box.kind],
        "id": number,
        **box.written,
    }


def run_lengths(box: Box, size: tuple[int, int]) -> list[int]:
    """COCO's uncompressed mask: lengths of runs down the columns, the first of zeros."""
    mask = np.zeros(size, bool)
    x1, y1, x2, y2 = (round(v) for v in box.corners)
    mask[y1:y2, x1:x2] = True
    flat = np.concatenate([[False], mask.ravel(order="F")])
    ends = np.flatnonzero(np.diff(flat, append=~flat[-1:])) + 1
    return np.diff(np.concatenate([[1], ends])).tolist()


def truth(made: list[Picture]) -> dict[str, Any]:
    """What must be looked for, written by hand for pycocotools: numbers for ids, from 1."""
    annotations = []
    # Of ids of which some are text, pycocotools would make one type: it is given their order.
    order = {p.id: n for n, p in enumerate(sorted(made, key=lambda p: str(p.id)), 1)}
    for picture in made:
        for box in picture.boxes:
            if box.fate not in ("", "ignored"):
                continue
            entry = _annotation(box, picture, 0)
            x, y, w, h = entry["bbox"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": order[picture.id],
                    "category_id": IDS[box.kind],
                    "bbox": [x, y, w, h],
                    "area": entry["area"] or w * h,
                    "iscrowd": int(box.fate == "ignored"),
                }
            )
    images = [{"id": order[p.id], "was": p.id} for p in made]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def write(root: Path, sets: dict[str, list[Picture]]) -> None:
    """Writes the set into a folder as its archives unpack."""
    for split, made in sets.items():
        content = {"instances": instances(made, split), "captions": {}, "person_keypoints": {}}
        parts = {f"annotations/{k}_{split}.json": json.dumps(v) for k, v in content.items()}
        write_files(root, {f"{split}/{picture.name}": picture.file for picture in made})
        write_files(root, {path: text.encode() for path, text in parts.items()})


def pack(root: Path, target: Path) -> None:
    """Packs what ``write`` wrote into the archives of the authors' page."""
    target.mkdir()
    names = {"annotations": "annotations_trainval2017"}
    for part in ("annotations", *SPLITS):
        with zipfile.ZipFile(target / f"{names.get(part, part)}.zip", "w") as archive:
            if part != "annotations":
                archive.writestr(f"{part}/", b"")
            for path, data in read_files(root).items():
                if path.startswith(f"{part}/"):
                    archive.writestr(path, data)


def refusals(sets: dict[str, list[Picture]]) -> dict[str, Refused]:
    """Faults that nobody can mend but the user, each on images of its own."""
    train, val = (f"annotations/instances_{split}.json" for split in SPLITS)
    one, two, three, four, five = sets["train2017"][:5]
    small = encode(draw(1, (20, 30), []))

    def annotation(number: int) -> Any:
        return lambda content: content["annotations"][number]

    def image(number: int) -> Any:
        return lambda content: content["images"][number]

    first = instances(sets["train2017"], "train2017")["annotations"]
    others = instances(sets["val2017"], "val2017")["annotations"]
    a, c, d = (first[n]["id"] for n in (1, 5, 7))
    e, f = others[2]["id"], others[4]["id"]
    return {
        "NaN": json_fault(
            train,
            rf"_train2017\.json: .*\(NaN is no JSON number: annotations\[1\]\.bbox\[2\], id {a}\)",
            lambda content: content["annotations"][1],
            "bbox",
            [1.0, 2.0, float("nan"), 4.0],
        ),
        "id twice": json_fault(
            train, rf"train2017\.json: annotation id {a} is there twice", annotation(3), "id", a
        ),
        "text for a number": json_fault(
            train,
            rf"train2017\.json: annotation {c} names image id '.*numbers and strings are mixed",
            annotation(5),
            "image_id",
            str(first[5]["image_id"]),
        ),
        "category in a gap": json_fault(
            train,
            rf"train2017\.json: annotation {d} has category id 12, which is not among",
            annotation(7),
            "category_id",
            12,
        ),
        "three numbers": json_fault(
            val, rf"val2017\.json: annotation {e}: bbox must be", annotation(2), "bbox", [1, 2, 3]
        ),
        "no image": json_fault(
            val, rf"val2017\.json: annotation {f} names image id 77,", annotation(4), "image_id", 77
        ),
        "size 0": json_fault(
            train,
            rf"train2017\.json: image {one.id}: height must be 1 to \d+ pixels, got 0",
            image(0),
            "height",
            0,
        ),
        "image twice": json_fault(
            train,
            rf"train2017\.json: image {one.id}: the id is there twice",
            image(1),
            "id",
            one.id,
        ),
        "outside the folder": json_fault(
            val,
            rf"val2017\.json: image {sets['val2017'][3].id}: .*'\.\./a\.jpg' points outside",
            image(3),
            "file_name",
            "../a.jpg",
        ),
        "other size": broken_file(
            f"train2017/{two.name}", rf"{two.name} is 30x20 pixels but annotated", small, two.file
        ),
        "cut": broken_file(
            f"train2017/{three.name}",
            rf"{three.name}: cannot be decoded",
            three.file[:400],
            three.file,
        ),
        "missing": broken_file(
            f"train2017/{four.name}", rf"{four.name}: no such image file", None, four.file
        ),
        "no picture": broken_file(
            f"train2017/{five.name}", rf"{five.name}: not an image file", b"<html>", five.file
        ),
        "empty": broken_file(
            f"val2017/{sets['val2017'][6].name}",
            rf"val2017/{sets['val2017'][6].name}: not an image file",
            b"",
            sets["val2017"][6].file,
        ),
    }
