"""The first images of a data set, as a set of its own."""

from __future__ import annotations

from typing import Any

from aqdetr_jax.data.dataset import DetectionDataset, Example, json_digest


class FirstImages(DetectionDataset):
    """The first images of another set, with all of its classes.

    Args:
      whole: the set.
      count: images, at least 1; a smaller set is taken whole.
    """

    def __init__(self, whole: DetectionDataset, count: int) -> None:
        if count < 1:
            raise ValueError(f"the first {count} images of {whole.name} are none: at least 1")
        self._whole, self._count = whole, min(count, len(whole))
        self.name = whole.name if self._count == len(whole) else f"{whole.name}[:{self._count}]"
        self.class_names, self.category_ids = whole.class_names, whole.category_ids
        self.drops, self.drop_examples = whole.drops, whole.drop_examples
        self.clipped, self.notes = whole.clipped, whole.notes
        self.source, self.images_dir = whole.source, whole.images_dir

    def __len__(self) -> int:
        """Number of images."""
        return self._count

    def __getitem__(self, index: int) -> Example:
        """Image ``index``."""
        return self._whole[self._check_index(index)]

    def image_size(self, index: int) -> tuple[int, int]:
        """``(height, width)`` as annotated."""
        return self._whole.image_size(self._check_index(index))

    def image_id(self, index: int) -> int | str:
        """The id of image ``index``."""
        return self._whole.image_id(self._check_index(index))

    def file_name(self, index: int) -> str:
        """The name of image ``index``."""
        return self._whole.file_name(self._check_index(index))

    def max_boxes_per_image(self) -> int:
        """That of the whole set."""
        return self._whole.max_boxes_per_image()

    def coco_ground_truth(self) -> dict[str, Any]:
        """Of these images."""
        truth = self._whole.coco_ground_truth()
        kept = {self.image_id(index) for index in range(len(self))}
        return {
            **truth,
            "images": [image for image in truth["images"] if image["id"] in kept],
            "annotations": [a for a in truth["annotations"] if a["image_id"] in kept],
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the whole set's and the number of images."""
        return json_digest([self._whole.fingerprint, self._count])
