"""COCO detection metrics: from network outputs to the twelve numbers and the results block.

This is the only module that imports pycocotools. Its quirks are dealt with here: it prints, it
crashes on an empty list of detections, and it takes annotation id 0 for "unmatched".
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from aqdetr_jax.evaluation import inputs
from aqdetr_jax.ops.boxes import cxcywh_to_xyxy

METRIC_NAMES = (
    "AP",
    "AP50",
    "AP75",
    "APs",
    "APm",
    "APl",
    "AR1",
    "AR10",
    "AR100",
    "ARs",
    "ARm",
    "ARl",
)
"""The twelve COCO numbers in the order of ``COCOeval.stats``."""

UNDEFINED = -1.0
"""What pycocotools gives for a number without ground truth (say APs when no box is small)."""

MAX_DETECTIONS = 100
"""Detections kept per image and category, as in the COCO challenge."""


def postprocess(
    logits: jax.Array,
    boxes: jax.Array,
    original_size: jax.Array,
    *,
    kind: str = "softmax",
    max_detections: int = MAX_DETECTIONS,
    num_classes: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Turns head outputs into scored boxes in original pixels. Pure and jit-able.

    ``softmax`` is DETR's rule (Carion et al. 2020, section 3): one detection per query, its best
    real class, no-object left out. ``focal`` is Deformable DETR's (Zhu et al. 2021): the best
    ``max_detections`` of all (query, class) sigmoid scores, so a query may appear more than once.

    Args:
      logits: float [B, Q, C + 1] for ``softmax``, the last class being no-object; float [B, Q, C]
        for ``focal``, where every column is a real class.
      boxes: float [B, Q, 4] (cx, cy, w, h) in [0, 1], relative to the unpadded image.
      original_size: int [B, 2] (height, width) in pixels.
      kind: "softmax" or "focal".
      max_detections: detections per image for ``focal``, at most Q * C.
      num_classes: classes that the data have, where the head has columns for more (COCO's 91 for
        80 classes); the others cannot be detected. All by default.

    Returns:
      scores float32 [B, K], labels int32 [B, K] (contiguous classes) and boxes float32 [B, K, 4]
      (x1, y1, x2, y2) in pixels, not clipped to the image, as in DETR. K is Q for ``softmax``,
      sorted by query; min(max_detections, Q * C) for ``focal``, sorted by falling score.

    Raises:
      ValueError: an unknown ``kind``, or shapes that do not fit together.
    """
    batch, queries, columns = logits.shape
    if boxes.shape != (batch, queries, 4) or original_size.shape != (batch, 2):
        raise ValueError(
            f"postprocess wants boxes [{batch}, {queries}, 4] and original_size [{batch}, 2] for "
            f"logits {logits.shape}, got {boxes.shape} and {original_size.shape}"
        )
    logits = logits.astype(jnp.float32)
    if kind == "softmax":
        if columns < 2:
            raise ValueError(f"softmax logits need a class and no-object, got {columns} column(s)")
        probabilities = jax.nn.softmax(logits, axis=-1)[..., :-1][..., :num_classes]
        scores = probabilities.max(axis=-1)
        labels = probabilities.argmax(axis=-1)
        chosen = boxes.astype(jnp.float32)
    elif kind == "focal":
        columns = min(columns, num_classes or columns)
        flat = jax.nn.sigmoid(logits[..., :columns]).reshape(batch, queries * columns)
        scores, index = jax.lax.top_k(flat, min(max_detections, queries * columns))
        labels = index % columns
        chosen = jnp.take_along_axis(
            boxes.astype(jnp.float32), (index // columns)[..., None], axis=1
        )
    else:
        raise ValueError(f"kind must be 'softmax' or 'focal', got {kind!r}")
    height, width = original_size[:, 0], original_size[:, 1]
    scale = jnp.stack([width, height, width, height], axis=-1).astype(jnp.float32)
    corners = cxcywh_to_xyxy(chosen) * scale[:, None, :]
    return scores, labels.astype(jnp.int32), corners


def to_coco_results(
    image_ids: Sequence[int | str | None],
    scores: Any,
    labels: Any,
    boxes: Any,
    category_ids: Sequence[int | None],
) -> list[dict[str, Any]]:
    """Turns arrays of detections into COCO results: plain Python, ready for JSON.

    Args:
      image_ids: B image ids; None marks a filler row of the last batch, which is skipped.
      scores: float [B, K].
      labels: int [B, K], contiguous classes.
      boxes: float [B, K, 4] (x1, y1, x2, y2) in pixels.
      category_ids: the dataset's category id of each contiguous class; detections of a class that
        has none are left out.

    Returns:
      One dict {image_id, category_id, bbox [x, y, w, h], score} per detection.

    Raises:
      ValueError: shapes disagree, a label has no category, or a score or a box is not finite; the
        message names the image id.
    """
    scores = np.asarray(scores, np.float64)
    labels = np.asarray(labels)
    boxes = np.asarray(boxes, np.float64)
    if (
        scores.ndim != 2
        or len(image_ids) != scores.shape[0]
        or labels.shape != scores.shape
        or boxes.shape != (*scores.shape, 4)
    ):
        raise ValueError(
            f"want {len(image_ids)} rows of scores [B, K], labels [B, K] and boxes [B, K, 4], got "
            f"{scores.shape}, {labels.shape}, {boxes.shape}"
        )
    categories = [None if c is None else int(c) for c in category_ids]
    results = []
    for row, image_id in enumerate(image_ids):
        if image_id is None:
            continue
        if not isinstance(image_id, str):
            image_id = int(image_id)
        if not (np.isfinite(scores[row]).all() and np.isfinite(boxes[row]).all()):
            raise ValueError(
                f"image {image_id!r}: the network gave a score or a box that is not finite; "
                "look for NaN in the parameters or the step sizes"
            )
        if labels[row].size and not (0 <= labels[row].min() <= labels[row].max() < len(categories)):
            raise ValueError(
                f"image {image_id!r}: labels span {labels[row].min()}..{labels[row].max()}, but "
                f"there are {len(categories)} categories"
            )
        for score, label, (x1, y1, x2, y2) in zip(
            scores[row].tolist(), labels[row].tolist(), boxes[row].tolist(), strict=True
        ):
            if categories[label] is None:
                continue
            results.append(
                {
                    "image_id": image_id,
                    "category_id": categories[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": score,
                }
            )
    return results


def evaluate_detections(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    category_ids: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    image_ids: Sequence[int | str] | None = None,
) -> dict[str, Any]:
    """Computes the twelve COCO numbers and each class's AP, silently.

    The protocol is pycocotools' own: IoU 0.50:0.95, 100 detections per image and category, crowds
    neither right nor wrong. Image ids may be integers or strings; 7 and "7" are the same image.
    Detections of categories that the evaluation does not cover are left out, as COCO does.
    Missing ``area`` is the box's area, missing ``iscrowd`` is 0. Nothing passed in is changed.

    Args:
      ground_truth: a COCO instances dictionary: images, annotations, categories.
      results: COCO results, [{image_id, category_id, bbox [x, y, w, h] in pixels, score}].
      category_ids: the categories to evaluate; all of ``ground_truth`` by default.
      class_names: names for ``category_ids``, in order; the ground truth's names by default.
      image_ids: evaluate these images only; all by default.

    Returns:
      The numbers of ``METRIC_NAMES`` as fractions, -1.0 where undefined, and "per_class", a dict
      from class name to {"AP", "AP50"}. Without any detection, every defined number is 0.

    Raises:
      ValueError: inconsistent ground truth (annotation id 0, an unknown image or category, a box
        that is not finite), or results that are not finite or name unknown images.
    """
    evaluation, names = prepared_evaluation(
        ground_truth, results, category_ids, class_names, image_ids
    )
    # Every print of pycocotools goes to a buffer that nobody reads.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics: dict[str, Any] = {
        name: float(value) for name, value in zip(METRIC_NAMES, evaluation.stats, strict=True)
    }
    # [IoU thresholds, recall levels, categories, areas, detection limits]: all areas, 100.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    position = {category: k for k, category in enumerate(evaluation.params.catIds)}
    metrics["per_class"] = {
        name: {
            "AP": _mean_defined(precision[:, :, position[category]]),
            "AP50": _mean_defined(precision[0, :, position[category]]),
        }
        for category, name in names.items()
    }
    return metrics


def prepared_evaluation(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    category_ids: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    image_ids: Sequence[int | str] | None = None,
) -> tuple[COCOeval, dict[int, str]]:
    """Evaluation by pycocotools of checked inputs, nothing computed yet, and the classes' names.

    Arguments and errors are those of ``evaluate_detections``.
    """
    names = inputs.category_names(ground_truth, category_ids, class_names)
    numbers = inputs.image_numbers(ground_truth)
    if image_ids is None:
        selected = sorted(numbers.values())
    else:
        selected = sorted({inputs.image_number(numbers, i, "image_ids") for i in image_ids})
    if not selected:
        raise ValueError("nothing to evaluate: the ground truth or the subset has no image")
    truth = inputs.truth_annotations(ground_truth, numbers)
    detections = inputs.detection_annotations(results, numbers, set(names))
    known = {int(c["id"]) for c in ground_truth["categories"]}
    if results and not any(r["category_id"] in known for r in results):
        found = sorted({str(r["category_id"]) for r in results})[:5]
        raise ValueError(
            f"no detection has a category of the ground truth ({sorted(known)[:5]}...); the "
            f"results have {found}... Were contiguous labels written where category ids belong?"
        )

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_index(ground_truth, truth), _index(ground_truth, detections), "bbox")
    evaluation.params.imgIds = selected
    evaluation.params.catIds = sorted(names)
    return evaluation, names


def results_block(
    metrics: Mapping[str, Any],
    *,
    images: int,
    config: str,
    seed: int,
    commit: str,
    seconds: float,
) -> dict[str, Any]:
    """Builds the one shape in which every result of the package is stored.

    Args:
      metrics: what ``evaluate_detections`` returned.
      images: number of images evaluated.
      config: name of the configuration.
      seed: the run's seed.
      commit: the code's commit, or "unknown".
      seconds: wall-clock seconds of the evaluation.

    Returns:
      A validated block: the twelve numbers, "per_class", and the five arguments.

    Raises:
      ValueError: see ``validate_results_block``.
    """
    block = {name: metrics[name] for name in METRIC_NAMES if name in metrics}
    block["per_class"] = {k: dict(v) for k, v in metrics.get("per_class", {}).items()}
    block.update(
        images=images, config=config, seed=seed, commit=commit, seconds=round(float(seconds), 3)
    )
    return validate_results_block(block)


def validate_results_block(block: Any) -> dict[str, Any]:
    """Checks a results block and returns it.

    Args:
      block: anything, usually read from JSON.

    Returns:
      The same object.

    Raises:
      ValueError: a key is missing, unknown or of the wrong kind; the message names it.
    """
    if not isinstance(block, dict):
        raise ValueError(f"a results block is a dictionary, got {type(block).__name__}")
    wanted = {*METRIC_NAMES, "per_class", "images", "config", "seed", "commit", "seconds"}
    if set(block) != wanted:
        raise ValueError(
            f"results block: missing {sorted(wanted - set(block))}, unknown "
            f"{sorted(set(block) - wanted)}"
        )
    for name in METRIC_NAMES:
        _check_fraction(block[name], name)
    if not isinstance(block["per_class"], dict):
        raise ValueError("results block: per_class must map class names to {'AP', 'AP50'}")
    for name, row in block["per_class"].items():
        if not isinstance(name, str) or not isinstance(row, dict) or set(row) != {"AP", "AP50"}:
            raise ValueError(f"results block: per_class[{name!r}] must be {{'AP', 'AP50'}}")
        for key, value in row.items():
            _check_fraction(value, f"per_class[{name!r}].{key}")
    for key, kind in (("images", int), ("seed", int), ("config", str), ("commit", str)):
        if not isinstance(block[key], kind) or isinstance(block[key], bool):
            raise ValueError(f"results block: {key} must be {kind.__name__}, got {block[key]!r}")
    if block["images"] < 1:
        raise ValueError(f"results block: images must be positive, got {block['images']}")
    seconds = block["seconds"]
    if not isinstance(seconds, int | float) or not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"results block: seconds must be a duration, got {seconds!r}")
    return block


def format_results(block: Mapping[str, Any]) -> str:
    """Writes metrics as a text table: the twelve numbers, then a line per class.

    Args:
      block: a results block, or what ``evaluate_detections`` returned.

    Returns:
      Lines without a trailing newline; numbers in percent, "-" where undefined.
    """
    lines = []
    if "config" in block:
        lines.append(
            f"{block['config']}  seed {block['seed']}  commit {block['commit']}  "
            f"{block['images']} images  {block['seconds']:.1f} s"
        )
    for part in (METRIC_NAMES[:6], METRIC_NAMES[6:]):
        lines.append("  ".join(f"{name:>5}" for name in part))
        lines.append("  ".join(f"{_percent(block[name]):>5}" for name in part))
    if block.get("per_class"):
        width = max(5, *(len(name) for name in block["per_class"]))
        lines.append(f"{'class':<{width}}  {'AP':>5}  {'AP50':>5}")
        lines += [
            f"{name:<{width}}  {_percent(row['AP']):>5}  {_percent(row['AP50']):>5}"
            for name, row in block["per_class"].items()
        ]
    return "\n".join(lines)


def _percent(value: float) -> str:
    return "-" if value == UNDEFINED else f"{100 * value:.1f}"


def _check_fraction(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"results block: {name} must be a number, got {value!r}")
    if value != UNDEFINED and not 0.0 <= value <= 1.0:
        raise ValueError(f"results block: {name} must be in [0, 1] or -1, got {value}")


def _mean_defined(precision: np.ndarray) -> float:
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else UNDEFINED


def _index(ground_truth: Mapping[str, Any], rows: list[dict[str, Any]]) -> COCO:
    index = COCO()
    index.dataset = {
        "images": [{"id": i + 1} for i in range(len(ground_truth["images"]))],
        "categories": [{"id": int(c["id"])} for c in ground_truth["categories"]],
        "annotations": rows,
    }
    index.createIndex()
    return index
