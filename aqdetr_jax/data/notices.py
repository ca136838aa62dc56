"""What a data set left out, said once."""

from __future__ import annotations

from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.parallel.hosts import say


def say_drops(dataset: DetectionDataset) -> None:
    """Says which boxes of a set were left out, if any."""
    if dataset.drops:
        counts = ", ".join(f"{n} {reason}" for reason, n in dataset.drops.items())
        first = "; ".join(dataset.drop_examples[:3])
        say(f"{dataset.name}: left out boxes: {counts} ({first})")
