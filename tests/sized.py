"""A data set of sizes alone, whose images are never read."""

from __future__ import annotations

import numpy as np

from aqdetr_jax.data.dataset import Record, RecordDataset, stack_boxes


class Sized(RecordDataset):
    """Images of given (height, width), each with boxes of one side, never read."""

    def __init__(self, sizes, side=40.0, boxes=1):
        box = (0.0, 0.0, side, side)
        truth = {"bbox": box, "area": side * side}
        records = [
            Record(
                i,
                f"{i}.png",
                *size,
                stack_boxes([box] * boxes),
                [0] * boxes,
                np.zeros(boxes, bool),
                (truth,) * boxes,
            )
            for i, size in enumerate(sizes, 1)
        ]
        super().__init__(name="sized", class_names=("a",), category_ids=(1,), records=records)

    def _load_image(self, index):
        raise AssertionError(f"image {index} is read")
