"""Checks COCO ground truth and results, and writes them as pycocotools can take them.

pycocotools trusts its input: a doubled id, an unknown category or a NaN gives a wrong number, not
an error. Everything that reaches it passes through here first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def category_names(
    ground_truth: Mapping[str, Any],
    category_ids: Sequence[int] | None,
    class_names: Sequence[str] | None,
) -> dict[int, str]:
    """Names the evaluated categories, made distinct so that no class hides another.

    Args:
      ground_truth: a COCO instances dictionary.
      category_ids: the categories to evaluate; all by default.
      class_names: names for ``category_ids``, in order; the ground truth's by default.

    Returns:
      Category id to name, in the order of ``category_ids``.

    Raises:
      ValueError: unknown or doubled categories, or a wrong number of names.
    """
    known = {int(c["id"]): str(c.get("name", c["id"])) for c in ground_truth["categories"]}
    ids = list(known) if category_ids is None else [int(c) for c in category_ids]
    unknown = [c for c in ids if c not in known]
    if unknown or not ids or len(set(ids)) != len(ids):
        raise ValueError(
            f"category_ids must be distinct categories of the ground truth; unknown: {unknown}, "
            f"given: {ids[:10]}"
        )
    if class_names is not None and len(class_names) != len(ids):
        raise ValueError(f"{len(class_names)} class names for {len(ids)} categories")
    names = [known[c] for c in ids] if class_names is None else [str(n) for n in class_names]
    return {c: n if names.count(n) == 1 else f"{n} ({c})" for c, n in zip(ids, names, strict=True)}


def image_numbers(ground_truth: Mapping[str, Any]) -> dict[str, int]:
    """Maps each image id, as text, to its rank: the order in which pycocotools breaks ties.

    Args:
      ground_truth: a COCO instances dictionary; image ids may be integers or strings.

    Returns:
      Image id as text to a number from 1.

    Raises:
      ValueError: two images have the same id, or 7 and "7".
    """
    ids = [image["id"] for image in ground_truth["images"]]
    keys = [str(i) for i in ids]
    if len(set(keys)) != len(keys):
        twice = next(k for k in keys if keys.count(k) > 1)
        raise ValueError(f"ground truth: image id {twice} appears twice")
    if any(isinstance(i, str) for i in ids):
        return {key: rank for rank, key in enumerate(sorted(keys), start=1)}
    return {str(i): rank for rank, i in enumerate(sorted(ids), start=1)}


def image_number(numbers: Mapping[str, int], image_id: Any, where: str) -> int:
    """Looks an image id up in ``image_numbers``; raises ValueError with ``where`` if unknown."""
    number = numbers.get(str(image_id))
    if number is None:
        raise ValueError(f"{where}: image id {image_id!r} is not in the ground truth")
    return number


def _box(value: Any, where: str) -> list[float]:
    box = [float(v) for v in value]
    if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
        raise ValueError(f"{where}: bbox {box} is not [x, y, width, height] with finite numbers")
    return box


def truth_annotations(
    ground_truth: Mapping[str, Any], numbers: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Checks the ground truth's annotations and renumbers their images.

    Args:
      ground_truth: a COCO instances dictionary.
      numbers: from ``image_numbers``.

    Returns:
      Fresh annotations with ids from 1, ``area`` and ``iscrowd`` filled in.

    Raises:
      ValueError: annotation id 0, missing or doubled; an unknown image or category; a box that is
        not finite or has a negative size.
    """
    categories = {int(c["id"]) for c in ground_truth["categories"]}
    seen: set[Any] = set()
    annotations: list[dict[str, Any]] = []
    for annotation in ground_truth["annotations"]:
        key = annotation.get("id")
        if key is None or key == 0:
            raise ValueError(
                f"ground truth: an annotation of image {annotation['image_id']!r} has id {key}; "
                "pycocotools takes 0 for 'unmatched', so number annotations from 1"
            )
        if key in seen:
            raise ValueError(f"ground truth: annotation id {key} appears twice")
        seen.add(key)
        where = f"ground truth: annotation {key}"
        if annotation["category_id"] not in categories:
            raise ValueError(f"{where} has unknown category {annotation['category_id']!r}")
        box = _box(annotation["bbox"], where)
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": image_number(numbers, annotation["image_id"], where),
                "category_id": int(annotation["category_id"]),
                "bbox": box,
                "area": float(annotation.get("area", box[2] * box[3])),
                "iscrowd": int(annotation.get("iscrowd", 0)),
            }
        )
    return annotations


def detection_annotations(
    results: Sequence[Mapping[str, Any]], numbers: Mapping[str, int], categories: set[int]
) -> list[dict[str, Any]]:
    """Checks results and writes them as ``COCO.loadRes`` would, which cannot take an empty list.

    Args:
      results: COCO results in original pixels.
      numbers: from ``image_numbers``.
      categories: ids of the evaluated categories; other detections are left out.

    Returns:
      Annotations with ids from 1, box areas and scores.

    Raises:
      ValueError: an unknown image, or a box or score that is not finite; names the image id.
    """
    annotations: list[dict[str, Any]] = []
    for result in results:
        number = image_number(numbers, result["image_id"], "results")
        where = f"results: image {result['image_id']!r}"
        box, score = _box(result["bbox"], where), float(result["score"])
        if not math.isfinite(score):
            raise ValueError(f"{where}: score {score} is not finite")
        if result["category_id"] in categories:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(result["category_id"]),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "score": score,
                }
            )
    return annotations
