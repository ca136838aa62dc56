"""Runs a model over a dataset and judges it by COCO's rules."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from aqdetr_jax.data.batching import PipelineStats
from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.data.eval_batches import EvalBatches
from aqdetr_jax.data.pipeline import PipelineConfig
from aqdetr_jax.data.remedies import smaller_images
from aqdetr_jax.evaluation.coco import evaluate_detections, postprocess, to_coco_results
from aqdetr_jax.io import read_json, write_json_atomic
from aqdetr_jax.models.detector import Detector
from aqdetr_jax.parallel.compiled import Programs
from aqdetr_jax.parallel.mesh import batch_sharding, on_accelerators, put_batch, replicated

logger = logging.getLogger(__name__)


class Detections(NamedTuple):
    """Detections of a whole dataset.

    Attributes:
      results: COCO results, list of dicts.
      seconds: wall-clock seconds, compilation included.
      images: file of each image id (as text), for readers of the results: only COCO's own sets
        have ids that mean something by themselves.
    """

    results: list[dict[str, Any]]
    seconds: float
    images: dict[str, str]

    def write(self, folder: Path) -> None:
        """``detections.json`` and ``images.json``."""
        write_json_atomic(folder / "images.json", self.images, indent=None)
        write_json_atomic(folder / "detections.json", self.results, indent=None)

    @classmethod
    def read(cls, folder: Path, seconds: float) -> Detections:
        """What ``write`` wrote."""
        names = ("detections.json", "images.json")
        results, images = (read_json(folder / name) for name in names)
        return cls(results, seconds, images)


Outputs = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
"""Takes a batch's dataset indices [B] (-1 = filler), logits [B, Q, C] and boxes [B, Q, 4]."""


def make_predict_fn(
    module: Detector, mesh: Mesh, num_classes: int, *, raw: bool = False
) -> Callable:
    """The jitted inference function.

    Args:
      module: the model.
      mesh: devices; the batch is split over "data".
      num_classes: classes that count (the head may have columns for more).
      raw: the last layer's logits and boxes come too.

    Returns:
      ``f(variables, images, mask, original_size) -> (scores, labels, boxes)``, or with ``raw``
      ``(scores, labels, boxes, logits, boxes)``; one compilation for each image bucket.
    """

    def predict(variables, images, mask, original_size):
        # Known to the sampling kernel, which is split by hand.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            output: Any = module.apply(variables, images, mask)
        found = postprocess(
            output.logits[-1],
            output.boxes[-1],
            original_size,
            kind=module.config.class_loss,
            num_classes=num_classes,
        )
        return (*found, output.logits[-1], output.boxes[-1]) if raw else found

    whole, split = replicated(mesh), batch_sharding(mesh)
    return jax.jit(predict, in_shardings=(whole, split, split, split), out_shardings=split)


class Evaluator:
    """One evaluation set and one model architecture; call it with variables.

    Args:
      module: the model.
      dataset: evaluation set.
      pipeline: input parameters.
      mesh: devices.
      category_ids: the set's category id of each of the model's classes, None for a class that the
        set has not (it is detected and left out, as COCO does); the set's own by default.
      reserved: bytes on each device that other things take meanwhile.
      outputs: is given what the network says of every batch, before it becomes detections.
      last_remedy: what helps where one image a device does not fit, a sentence.
    """

    def __init__(
        self,
        module: Detector,
        dataset: DetectionDataset,
        pipeline: PipelineConfig,
        mesh: Mesh,
        category_ids: Sequence[int | None] | None = None,
        reserved: int = 0,
        outputs: Outputs | None = None,
        last_remedy: str = smaller_images("eval_buckets"),
    ):
        self._dataset, self._outputs = dataset, outputs
        self._category_ids = dataset.category_ids if category_ids is None else category_ids
        # The last batch is filled up anyway, so any batch size can be made to fit the devices.
        unit = (
            mesh.shape["data"]
            * pipeline.process_count
            // math.gcd(mesh.shape["data"], pipeline.process_count)
        )
        # A batch of nothing but fillers beyond the set would take memory for nothing.
        size = -(-min(pipeline.batch_size, len(dataset) or 1) // unit) * unit
        self._batches = EvalBatches(dataset, dataclasses.replace(pipeline, batch_size=size))
        self._mesh = mesh
        split = batch_sharding(mesh)
        self._programs = Programs(
            make_predict_fn(module, mesh, len(self._category_ids), raw=outputs is not None),
            [
                tuple(
                    jax.ShapeDtypeStruct((size, *shape), dtype, sharding=split)
                    for shape, dtype in (((*b, 3), np.uint8), (b, np.bool_), ((2,), np.int32))
                )
                for b in self._batches.buckets
            ],
            name="evaluation",
            remedies=f"try config.train.eval_batch_size={size // unit // 2 * unit}"
            if size > unit
            else last_remedy,
            reserved=reserved,
        )

    @property
    def stats(self) -> PipelineStats:
        """What is read, and was left out, in the evaluation under way."""
        return self._batches.stats

    def compile(self, variables: Any) -> None:
        """Compiles for every bucket that the set needs, on accelerators.

        What does not fit is found before anything is evaluated, or trained. On CPUs each program is
        compiled when it is first needed.

        Args:
          variables: the model's variables, or their shapes.

        Raises:
          DoesNotFitError: a bucket's batch does not fit the devices' memory.
        """
        if on_accelerators(self._mesh):
            whole = replicated(self._mesh)
            self._programs.compile_all(
                jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), variables
                )
            )

    def detect(self, variables: Any, progress: Callable[[int, int], None] | None = None):
        """Detections of every image of the set.

        Args:
          variables: the model's variables.
          progress: called with (batches done, batches).

        Returns:
          ``Detections``; in a multi-process run every process gets all of them.
        """
        start = time.perf_counter()
        results: list[dict[str, Any]] = []
        self._batches.stats = PipelineStats()
        self.compile(variables)
        variables = jax.device_put(variables, replicated(self._mesh))
        for number, batch in enumerate(self._batches, 1):
            arrays = {k: batch[k] for k in ("images", "mask", "original_size", "image_index")}
            placed = put_batch(arrays, self._mesh)
            inputs = placed["images"], placed["mask"], placed["original_size"]
            out = self._programs((variables,), inputs)(variables, *inputs)
            index, scores, labels, boxes, *raw = _to_host((placed["image_index"], *out))
            if self._outputs is not None:
                self._outputs(index, *raw)
            ids = [self._dataset.image_id(int(i)) if i >= 0 else None for i in index]
            results += to_coco_results(ids, scores, labels, boxes, self._category_ids)
            if progress is not None:
                progress(number, len(self._batches))
        if self._batches.stats.skipped_images:
            # They stay in the ground truth: what cannot be read is not detected.
            logger.warning("%s: %s", self._dataset.name, self._batches.stats.summary())
        images = {
            str(self._dataset.image_id(i)): self._dataset.file_name(i)
            for i in range(len(self._dataset))
        }
        return Detections(results, time.perf_counter() - start, images)

    def evaluate(
        self, variables: Any, progress: Callable[[int, int], None] | None = None
    ) -> tuple[dict[str, Any], Detections]:
        """COCO numbers of the set (see ``coco.evaluate_detections``), and the detections."""
        detections = self.detect(variables, progress)
        metrics = evaluate_detections(
            self._dataset.coco_ground_truth(),
            detections.results,
            category_ids=self._dataset.category_ids,
            class_names=self._dataset.class_names,
        )
        return metrics, detections


def _to_host(arrays: Sequence[jax.Array]) -> list[np.ndarray]:
    """Global arrays as numpy on every process."""
    if jax.process_count() > 1:
        return [np.asarray(multihost_utils.process_allgather(a, tiled=True)) for a in arrays]
    return list(jax.device_get(arrays))
