"""Evaluation batches: each image goes to the smallest bucket that holds it after its resize."""

from __future__ import annotations

import math
from collections.abc import Iterator

import grain

from aqdetr_jax.data import transforms
from aqdetr_jax.data.batching import Batch, PipelineStats, Row, assemble
from aqdetr_jax.data.dataset import DetectionDataset, ImageReadError
from aqdetr_jax.data.pipeline import PipelineConfig, check_dataset, with_remedy


class EvalBatches:
    """The evaluation batches of this process: every image exactly once, not augmented.

    They can be iterated again and again.

    Batches hold the same arrays as in training. With one bucket they come in dataset order; with
    several, bucket by bucket, so that no image is scaled below the evaluation size because of its
    neighbours. The last batch of a bucket is filled up with rows of ``image_index`` -1: black
    images without boxes whose mask is all True (an all-False mask would make attention NaN).

    Boxes beyond ``max_boxes`` are truncated and counted: scores come from
    ``dataset.coco_ground_truth()``, not from here.

    Args:
      dataset: images with boxes.
      config: parameters; ``augment``, ``seed`` and ``start_step`` do not matter.

    Raises:
      DatasetError: the dataset is empty.
      ImageReadError: (while iterating) an image cannot be read and ``on_error`` is ``"error"``.

    Attributes:
      stats: what was left out so far.
    """

    def __init__(self, dataset: DetectionDataset, config: PipelineConfig) -> None:
        check_dataset(dataset, config, boxes_matter=False)
        self.stats = PipelineStats()
        self._dataset = dataset
        self._config = config
        self._batches = _eval_plan(dataset, config)

    def __len__(self) -> int:
        """Number of batches, the same on every process."""
        return len(self._batches)

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """The buckets that some batch has, in the order of the batches."""
        used = dict.fromkeys(bucket for bucket, _ in self._batches)
        return tuple(self._config.buckets[bucket] for bucket in used)

    def __iter__(self) -> Iterator[Batch]:
        """A fresh pass over the dataset."""
        config = self._config
        source = grain.MapDataset.range(len(self._batches)).map(lambda i: self._load(int(i)))
        options = grain.ReadOptions(
            num_threads=config.num_threads, prefetch_buffer_size=config.prefetch
        )
        return iter(source.to_iter_dataset(options))

    def _load(self, number: int) -> Batch:
        config = self._config
        bucket, images = self._batches[number]
        mine = images[config.process_index :: config.process_count]
        rows = [self._load_row(index, config.buckets[bucket]) for index in mine]
        return assemble(rows, config.buckets[bucket], config.max_boxes, self.stats)

    def _load_row(self, index: int, bucket: tuple[int, int]) -> Row | None:
        if index < 0:
            return None
        config = self._config
        try:
            with self.stats.reading(self._dataset.file_name(index)):
                example = self._dataset[index]
        except ImageReadError as error:
            if config.on_error == "error":
                raise with_remedy(error) from error
            self.stats.add_skipped(self._dataset.file_name(index), str(error))
            return None
        original_size = example.image.shape[0], example.image.shape[1]
        size = _eval_size(original_size, config)
        example = transforms.resize(example, transforms.fitted_size(*size, bucket))
        example = transforms.select(example, ~example.iscrowd)
        return Row(example, index, original_size)


def _eval_plan(
    dataset: DetectionDataset, config: PipelineConfig
) -> list[tuple[int, tuple[int, ...]]]:
    """(bucket, dataset indices with -1 for fillers) of each global evaluation batch."""
    order = sorted(range(len(config.buckets)), key=lambda b: math.prod(config.buckets[b]))
    members: dict[int, list[int]] = {b: [] for b in order}
    for index in range(len(dataset)):
        height, width = _eval_size(dataset.image_size(index), config)

        def shrink(b: int, height: int = height, width: int = width) -> float:
            return min(1.0, config.buckets[b][0] / height, config.buckets[b][1] / width)

        members[max(order, key=shrink)].append(index)  # The first of equals is the smallest.
    plan = []
    for bucket in order:
        rows = members[bucket]
        rows += [-1] * (-len(rows) % config.batch_size)
        for start in range(0, len(rows), config.batch_size):
            plan.append((bucket, tuple(rows[start : start + config.batch_size])))
    return plan


def _eval_size(size: tuple[int, int], config: PipelineConfig) -> tuple[int, int]:
    height, width = size
    if config.eval_short_side is None:
        return height, width
    return transforms.resized_size(height, width, config.eval_short_side, config.eval_max_size)
