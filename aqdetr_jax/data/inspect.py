"""A look at a dataset before training: counts, and the first offenders by file and annotation."""

from __future__ import annotations

import collections
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from aqdetr_jax.data import exif
from aqdetr_jax.data.dataset import DetectionDataset, ImageReadError
from aqdetr_jax.data.images import read_header
from aqdetr_jax.data.suspicious import corner_boxes, normalised_boxes

_SMALL, _MEDIUM = 32.0**2, 96.0**2
_FIRST = 5
_TWIN_IOU = 0.9
_MOST_PICTURES = 48

TITLES = {
    "dropped": "dropped boxes",
    "normalised": "boxes that look normalised (within [0, 1])",
    "corners": "boxes that look like corners (x1, y1, x2, y2)",
    "over_queries": "images with more boxes than queries",
    "classes_without_boxes": "classes without boxes",
    "twin_boxes": "doubled boxes (same class, IoU > 0.9)",
    "unreadable": "unreadable images",
    "size_mismatch": "images of another size than annotated",
    "exif_rotated": "images with an EXIF rotation",
    "duplicates": "duplicate images",
    "leakage": "images shared with the other split",
}
"""What each list of offenders of a report holds."""

_OF_IMAGES = (
    "unreadable",
    "size_mismatch",
    "normalised",
    "corners",
    "exif_rotated",
    "over_queries",
    "twin_boxes",
    "duplicates",
    "leakage",
)
"""The lists whose offenders have a picture, the worst first."""

Found = list[tuple[int, str]]
"""(index of the image, description) of each offender."""


def inspect_dataset(
    dataset: DetectionDataset,
    num_queries: int | None = None,
    *,
    other: DetectionDataset | None = None,
    check_images: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Counts what matters to a detection transformer and finds what would go wrong later.

    Args:
      dataset: what to look at.
      num_queries: object queries of the model; images with more boxes are listed.
      other: another split; images that are in both (by hash) are listed as leakage.
      check_images: decode every image. Without it nothing is read but annotations.
      progress: called with (images read, images) after each one.

    Returns:
      A JSON-able dict. Counts: ``images``, ``boxes``, ``crowd_boxes``, ``empty_images``,
      ``clipped_boxes``, ``classes`` (boxes by name), ``areas`` (boxes by COCO's bins),
      ``boxes_per_image``, ``image_height``, ``image_width``, ``drops``, ``modes`` (image files by
      Pillow's mode). Lists of offenders, each
      ``{"count", "first"}``, by the keys of ``TITLES``. ``notes`` of the reader;
      ``checked_images`` says whether images were read; ``problem_images`` are pairs (index, titles
      of its problems), the worst first and each kind in turn, 48 at most.
    """
    truth = dataset.coco_ground_truth()
    report = _annotation_report(dataset, truth)
    report["num_queries"] = num_queries
    report["checked_images"] = check_images
    found = _box_offenders(dataset, truth, num_queries)
    modes: collections.Counter[str] = collections.Counter()
    found |= _image_offenders(dataset, other, progress, modes) if check_images else {}
    report["modes"] = dict(modes.most_common())
    for key in _OF_IMAGES:
        report[key] = _offenders([text for _, text in found.get(key, [])])
    report["problem_images"] = _problem_images(found)
    return report


def _annotation_report(dataset: DetectionDataset, truth: dict[str, Any]) -> dict[str, Any]:
    names = {c["id"]: c["name"] for c in truth["categories"]}
    targets = [a for a in truth["annotations"] if not a["iscrowd"]]
    classes = dict.fromkeys(dataset.class_names, 0)
    for annotation in targets:
        classes[names[annotation["category_id"]]] += 1
    counts = np.array([len(boxes) for boxes in _by_image(truth)], np.int64)
    areas = np.array([a["area"] for a in targets], np.float64)
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "images": len(dataset),
        "boxes": len(targets),
        "crowd_boxes": len(truth["annotations"]) - len(targets),
        "empty_images": int((counts == 0).sum()),
        "clipped_boxes": dataset.clipped,
        "classes": classes,
        "classes_without_boxes": _offenders([n for n, count in classes.items() if not count]),
        "areas": {
            "small": int((areas < _SMALL).sum()),
            "medium": int(((areas >= _SMALL) & (areas < _MEDIUM)).sum()),
            "large": int((areas >= _MEDIUM).sum()),
        },
        "boxes_per_image": _spread(counts),
        "image_height": _spread(np.array([i["height"] for i in truth["images"]], np.int64)),
        "image_width": _spread(np.array([i["width"] for i in truth["images"]], np.int64)),
        "notes": list(dataset.notes),
        "drops": dict(dataset.drops),
        "dropped": {
            "count": sum(dataset.drops.values()),
            "first": list(dataset.drop_examples[:_FIRST]),
        },
    }


def _by_image(truth: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The training boxes of each image, in the order of the images."""
    boxes: dict[int | str, list[dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        if not annotation["iscrowd"]:
            boxes[annotation["image_id"]].append(annotation)
    return list(boxes.values())


def _box_offenders(
    dataset: DetectionDataset, truth: dict[str, Any], num_queries: int | None
) -> dict[str, Found]:
    found: dict[str, Found] = {
        "normalised": list(normalised_boxes(dataset).offenders),
        "corners": list(corner_boxes(dataset).offenders),
        "over_queries": [],
        "twin_boxes": [],
    }
    for index, boxes in enumerate(_by_image(truth)):
        name = dataset.file_name(index)
        if num_queries is not None and len(boxes) > num_queries:
            found["over_queries"].append((index, f"{name}: {len(boxes)} boxes"))
        found["twin_boxes"] += [(index, text) for text in _twins(name, boxes)]
    return found


def _problem_images(found: dict[str, Found]) -> list[tuple[int, list[str]]]:
    """Images with problems, one of each kind in turn, and all problems of each."""
    problems: dict[int, list[str]] = {}
    kinds = [dict.fromkeys(index for index, _ in found.get(key, [])) for key in _OF_IMAGES]
    for turn in itertools.zip_longest(*kinds):
        for index in turn:
            if index is not None and len(problems) < _MOST_PICTURES:
                problems.setdefault(index, [])
    for key, images in zip(_OF_IMAGES, kinds, strict=True):
        for index in problems.keys() & images.keys():
            problems[index].append(TITLES[key])
    return list(problems.items())


def _twins(file_name: str, annotations: Sequence[dict[str, Any]]) -> list[str]:
    if len(annotations) < 2:
        return []
    xywh = np.array([a["bbox"] for a in annotations], np.float64)
    low, high = xywh[:, :2], xywh[:, :2] + xywh[:, 2:]
    overlap = np.minimum(high[:, None], high[None]) - np.maximum(low[:, None], low[None])
    inter = np.prod(np.maximum(overlap, 0), -1)
    area = np.prod(xywh[:, 2:], -1)
    iou = inter / (area[:, None] + area[None] - inter)
    category = np.array([a["category_id"] for a in annotations])
    same = np.triu((iou > _TWIN_IOU) & (category[:, None] == category[None]), 1)
    return [
        f"{file_name}: boxes {annotations[i]['bbox']} and {annotations[j]['bbox']}"
        for i, j in np.argwhere(same)
    ]


def _image_offenders(
    dataset: DetectionDataset,
    other: DetectionDataset | None,
    progress: Callable[[int, int], None] | None,
    modes: collections.Counter[str],
) -> dict[str, Found]:
    found: dict[str, Found] = {
        key: [] for key in ("unreadable", "size_mismatch", "exif_rotated", "duplicates", "leakage")
    }
    first_with: dict[str, int] = {}
    unreadable: set[str] = set()
    total = len(dataset) + (len(other) if other is not None else 0)
    for index in range(len(dataset)):
        if progress is not None:
            progress(index + 1, total)
        name = dataset.file_name(index)
        mismatch = _check_header(dataset, index, found, modes)
        try:
            digest = _digest(dataset, index)
            if not mismatch:
                _ = dataset[index]
        except ImageReadError as error:
            if name not in unreadable:  # Two entries may name one file.
                found["unreadable"].append((index, str(error)))
            unreadable.add(name)
            continue
        if digest in first_with:
            first = dataset.file_name(first_with[digest])
            found["duplicates"].append((index, f"{name} is the same as {first}"))
        else:
            first_with[digest] = index
    for index in range(len(other) if other is not None else 0):
        assert other is not None
        if progress is not None:
            progress(len(dataset) + index + 1, total)
        try:
            digest = _digest(other, index)
        except ImageReadError:
            continue  # The report on that split says so.
        if digest in first_with:
            mine = first_with[digest]
            text = f"{dataset.file_name(mine)} is also {other.file_name(index)} of {other.name}"
            found["leakage"].append((mine, text))
    return found


def _check_header(
    dataset: DetectionDataset,
    index: int,
    found: dict[str, Found],
    modes: collections.Counter[str],
) -> bool:
    """Notes mode, EXIF rotation and a size unlike the annotated one; True for the latter."""
    find_path: Callable[[int], pathlib.Path] | None = getattr(dataset, "image_path", None)
    if find_path is None:
        return False
    try:
        header = read_header(find_path(index))
    except ImageReadError:
        return False  # Decoding will name the reason.
    modes[header.mode] += 1
    height, width, orientation = header.height, header.width, header.orientation
    name, expected = dataset.file_name(index), dataset.image_size(index)
    if orientation != 1:
        found["exif_rotated"].append((index, f"{name}: EXIF orientation {orientation}"))
    sizes = [(height, width)] + ([(width, height)] if orientation in exif.SIDEWAYS else [])
    if expected not in sizes:
        text = f"{name}: {width}x{height} pixels, annotated as {expected[1]}x{expected[0]}"
        found["size_mismatch"].append((index, text))
        return True
    return False


def _digest(dataset: DetectionDataset, index: int) -> str:
    """Hash of the file where there is one, else of the pixels."""
    find_path = getattr(dataset, "image_path", None)
    if find_path is None:
        return hashlib.sha256(dataset[index].image.tobytes()).hexdigest()
    try:
        with find_path(index).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ImageReadError(f"{dataset.file_name(index)}: cannot be read ({error})") from error


def _offenders(items: Sequence[str]) -> dict[str, Any]:
    return {"count": len(items), "first": list(items[:_FIRST])}


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {"min": 0, "median": 0.0, "mean": 0.0, "max": 0}
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "max": int(values.max()),
    }


def format_report(report: dict[str, Any]) -> str:
    """The report of :func:`inspect_dataset` as a text table, offenders at the end.

    Args:
      report: from :func:`inspect_dataset`.

    Returns:
      Lines joined by newlines.
    """
    boxes = max(report["boxes"], 1)

    def spread(values: dict[str, float]) -> str:
        return (
            f"min {values['min']}, median {values['median']:g}, mean {values['mean']:.2f}, "
            f"max {values['max']}"
        )

    rows = [
        ("dataset", f"{report['name']} ({report['fingerprint'][:16]})"),
        ("images", f"{report['images']} ({report['empty_images']} without boxes)"),
        ("image height", spread(report["image_height"])),
        ("image width", spread(report["image_width"])),
        (
            "boxes",
            f"{report['boxes']} (and {report['crowd_boxes']} crowd or difficult; "
            f"{report['clipped_boxes']} clipped at the border)",
        ),
        ("boxes per image", spread(report["boxes_per_image"])),
    ]
    if report["num_queries"] is not None:
        rows.append(("object queries", str(report["num_queries"])))
    if report["modes"]:
        counts = ", ".join(f"{count} {mode}" for mode, count in report["modes"].items())
        rows.append(("image modes", counts + " (all read as RGB)" * (len(report["modes"]) > 1)))
    for size, count in report["areas"].items():
        rows.append((f"{size} boxes", f"{count} ({100 * count / boxes:.1f} %)"))
    for name, count in report["classes"].items():
        rows.append((f"class {name}", f"{count} ({100 * count / boxes:.1f} %)"))
    for reason, count in report["drops"].items():
        rows.append((f"dropped: {reason}", str(count)))
    rows += [("note", note) for note in report["notes"]]
    if not report["checked_images"]:
        rows.append(("image files", "not checked"))
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:<{width}}  {value}" for label, value in rows]
    problems = [(title, report[key]) for key, title in TITLES.items() if report[key]["count"]]
    for title, offenders in problems:
        lines.append(f"! {title}: {offenders['count']}")
        lines.extend(f"    {item}" for item in offenders["first"])
        if offenders["count"] > len(offenders["first"]):
            lines.append(f"    ... and {offenders['count'] - len(offenders['first'])} more")
    if not problems:
        lines.append("no problems found")
    return "\n".join(lines)
