"""Detection on images of one's own: ``aqdetr_jax.load(path).predict(image)``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from aqdetr_jax.checkpoint.model_folder import ModelBundle
from aqdetr_jax.data.dataset import DetectionDataset, Example
from aqdetr_jax.data.eval_batches import EvalBatches
from aqdetr_jax.data.images import MAX_PIXELS, ImageLike, as_array
from aqdetr_jax.data.pipeline import PipelineConfig
from aqdetr_jax.evaluation.evaluator import make_predict_fn


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Detections of one image, best first.

    Attributes:
      boxes: float32 [N, 4], (x1, y1, x2, y2) in pixels of the upright image (turned as its EXIF
        orientation says, as viewers show it), clipped to it.
      scores: float32 [N].
      labels: int32 [N], contiguous classes.
      names: N class names.
      size: (height, width) of the image.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        """Number of detections."""
        return len(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form, one dict a detection under "detections"."""
        rows = zip(self.names, self.labels, self.scores, self.boxes, strict=True)
        return {
            "size": list(self.size),
            "detections": [
                {"name": n, "label": int(k), "score": float(s), "box": [float(x) for x in b]}
                for n, k, s, b in rows
            ],
        }


class Detector:
    """A loaded model, ready to detect; compiles once for each image bucket.

    Args:
      bundle: the model.
    """

    def __init__(self, bundle: ModelBundle):
        self.bundle = bundle
        self._mesh = jax.sharding.Mesh(
            np.array(jax.local_devices()[:1]).reshape(1, 1), ("data", "model")
        )
        self._predict = make_predict_fn(bundle.module(), self._mesh, len(bundle.class_names))
        self._variables = jax.device_put(bundle.variables, jax.local_devices()[0])

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels."""
        return self.bundle.class_names

    def predict(
        self, image: ImageLike, *, threshold: float = 0.5, max_pixels: int = MAX_PIXELS
    ) -> Prediction:
        """Detects the objects of one image.

        Args:
          image: path, encoded file as bytes, Pillow image, or NumPy or JAX array uint8 [H, W, 3]
            (or [H, W]); see ``data.images.as_array``.
          threshold: smallest score.
          max_pixels: refuse larger files.

        Raises:
          ImageReadError, ValueError, TypeError: the image cannot be used; says why.
        """
        return self.predict_batch([image], threshold=threshold, max_pixels=max_pixels)[0]

    def predict_batch(
        self,
        images: Sequence[ImageLike],
        *,
        threshold: float = 0.5,
        batch_size: int = 1,
        max_pixels: int = MAX_PIXELS,
    ) -> list[Prediction]:
        """Detects the objects of several images; see ``predict``.

        Args:
          images: any number, of any sizes.
          threshold: smallest score.
          batch_size: images a batch.
          max_pixels: refuse larger files.
        """
        check_threshold(threshold)
        if not images:
            return []
        source = _Images([as_array(i, max_pixels=max_pixels) for i in images], self.bundle)
        config = PipelineConfig(
            batch_size=batch_size, num_threads=0, prefetch=0, **self.bundle.input.pipeline()
        )
        found: dict[int, Prediction] = {}
        for batch in EvalBatches(source, config):
            out = self._predict(
                self._variables, batch["images"], batch["mask"], batch["original_size"]
            )
            scores, labels, boxes = jax.device_get(out)
            for row, index in enumerate(batch["image_index"]):
                if index >= 0:
                    size = source.image_size(int(index))
                    found[int(index)] = self._prediction(
                        scores[row], labels[row], boxes[row], size, threshold
                    )
        return [found[i] for i in range(len(images))]

    def _prediction(self, scores, labels, boxes, size, threshold) -> Prediction:
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] >= threshold]
        height, width = size
        limit = np.array([width, height, width, height], np.float32)
        names = tuple(self.class_names[int(k)] for k in labels[order])
        return Prediction(
            np.clip(boxes[order], 0, limit), scores[order], labels[order], names, size
        )


def check_threshold(threshold: float) -> None:
    """Raises ValueError unless a threshold of scores is in [0, 1]."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")


class _Images(DetectionDataset):
    """Images in memory as a dataset without annotations."""

    def __init__(self, images: Sequence[np.ndarray], bundle: ModelBundle):
        self.name = "images"
        self.class_names = bundle.class_names
        self.category_ids = bundle.category_ids
        self.drops: dict[str, int] = {}
        self.drop_examples: tuple[str, ...] = ()
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        none = np.zeros(0, np.int32)
        return Example(
            self._images[index],
            np.zeros((0, 4), np.float32),
            none,
            none.astype(bool),
            index,
            self.file_name(index),
        )

    def image_size(self, index: int) -> tuple[int, int]:
        return self._images[index].shape[0], self._images[index].shape[1]

    def image_id(self, index: int) -> int:
        return index

    def file_name(self, index: int) -> str:
        return f"image {index}"

    def max_boxes_per_image(self) -> int:
        return 0

    def coco_ground_truth(self) -> dict[str, Any]:
        return {"images": [], "annotations": [], "categories": []}

    @property
    def fingerprint(self) -> str:
        return ""
