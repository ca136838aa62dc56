"""What a reader left out or decided, said once."""

from __future__ import annotations

from collections.abc import Iterator

from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.data.suspicious import corner_boxes, normalised_boxes
from aqdetr_jax.parallel.hosts import say, say_once


def say_contents(dataset: DetectionDataset) -> None:
    """Says how many images and boxes a set has."""
    truth = dataset.coco_ground_truth()
    ignored = sum(annotation["iscrowd"] for annotation in truth["annotations"])
    empty = len(dataset) - len({annotation["image_id"] for annotation in truth["annotations"]})
    say(
        f"{dataset.name}: {len(dataset)} images ({empty} without boxes), "
        f"{len(truth['annotations'])} boxes ({ignored} crowd or difficult; {dataset.clipped} over "
        "the border, clipped for training)"
    )


def say_findings(dataset: DetectionDataset) -> None:
    """Says which boxes of a set were left out or look wrong, and the reader's notes.

    Once in a process for a set, however many runs and evaluations read it.
    """
    for line in _findings(dataset):
        say_once(line)


def _findings(dataset: DetectionDataset) -> Iterator[str]:
    for note in dataset.notes:
        yield f"{dataset.name}: {note}"
    if dataset.drops:
        counts = ", ".join(f"{n} {reason}" for reason, n in dataset.drops.items())
        first = "; ".join(dataset.drop_examples[:3])
        yield f"{dataset.name}: left out boxes: {counts} ({first})"
    for found, look in (
        (normalised_boxes(dataset), "normalised, as fractions of the image"),
        (corner_boxes(dataset), "like corners (x1, y1, x2, y2), not (x, y, width, height)"),
    ):
        if found.offenders:
            count, first = len(found.offenders), found.offenders[0][1]
            yield f"{dataset.name}: {count} of {found.boxes} boxes look {look} (first: {first})"
