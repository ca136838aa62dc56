"""What a reader left out or decided, said once."""

from __future__ import annotations

from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.parallel.hosts import say


def say_drops(dataset: DetectionDataset) -> None:
    """Says which boxes of a set were left out, if any, and the reader's notes."""
    for note in dataset.notes:
        say(f"{dataset.name}: {note}")
    if dataset.drops:
        counts = ", ".join(f"{n} {reason}" for reason, n in dataset.drops.items())
        first = "; ".join(dataset.drop_examples[:3])
        say(f"{dataset.name}: left out boxes: {counts} ({first})")
