"""Several sets as one."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from aqdetr_jax.data.dataset import BoxCollector, DatasetError, RecordDataset


class JoinedDataset(RecordDataset):
    """The images of several sets of files, one set after the other.

    Args:
      name: of the whole.
      parts: name -> set, all with the same classes; the name goes before the file names, and the
        images are numbered anew from 1.

    Raises:
      DatasetError: the classes differ.
    """

    def __init__(self, name: str, parts: Mapping[str, Any]) -> None:
        first, *others = parts.values()
        for other in others:
            if (other.class_names, other.category_ids) != (first.class_names, first.category_ids):
                raise DatasetError(f"{first.name} and {other.name} have other classes")
        self._places = [(part, i) for part in parts.values() for i in range(len(part))]
        records = [
            dataclasses.replace(record, file_name=f"{key}/{record.file_name}")
            for key, part in parts.items()
            for record in part.records
        ]
        collector = BoxCollector()
        drops = collections.Counter[str]()
        for part in parts.values():
            drops.update(part.drops)
            collector.examples.extend(part.drop_examples)
            collector.clipped += part.clipped
        collector.drops.update(drops)
        super().__init__(
            name=name,
            class_names=first.class_names,
            category_ids=first.category_ids,
            records=[dataclasses.replace(r, image_id=n) for n, r in enumerate(records, 1)],
            collector=collector,
            notes=[note for part in parts.values() for note in part.notes],
            source=first.source,
        )

    def _load_image(self, index: int) -> np.ndarray:
        part, inside = self._places[index]
        return part._load_image(inside)

    def image_path(self, index: int) -> pathlib.Path:
        """The path of image ``index``."""
        part, inside = self._places[index]
        return part.image_path(inside)
