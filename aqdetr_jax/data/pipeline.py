"""The input pipeline: datasets to padded NumPy batches, on Grain's lazy ``MapDataset``.

Training order::

    range -> seed -> shuffle -> repeat -> augment -> [process_index::process_count] -> batch

Every element has a global position ``p`` (its place before the slice). Position and seed alone
decide which image stands there, how it is augmented and, through the step ``s = p // batch_size``,
which bucket it is resized to fit. The images of step ``s`` are therefore the same for any number
of processes (dealt out like cards: process ``r`` of ``P`` gets positions ``s * batch + r``,
``s * batch + r + P``, ...), and a resumed run starts at ``start_step`` without iterator state.

Buckets: a short list of (height, width), one compilation each. In training the bucket of a step
is drawn from (seed, step), so all hosts agree without talking; images that exceed it are scaled
down to fit. Evaluation's batches are those of ``eval_batches``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from aqdetr_jax.data import transforms
from aqdetr_jax.data.batching import Batch, PipelineStats, Row, assemble
from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.dataset import DatasetError, DetectionDataset, Example, ImageReadError

_BUCKET_STREAM = 0xB0C
_MAX_SKIPS_IN_A_ROW = 100
_LEFT_OUT = "left_out"  # key of a worker's counts in its batches


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Parameters of the input pipeline.

    Attributes:
      batch_size: images per step over all processes.
      buckets: (height, width) of the padded images, pixels.
      max_boxes: T, padded number of boxes.
      seed: order, augmentation and buckets are functions of it and the step.
      augment: training augmentation.
      eval_short_side: evaluation resize of the short side (pixels); None keeps the size.
      eval_max_size: limit on the long side in evaluation, or None.
      allow_truncation: drop boxes beyond ``max_boxes`` (counted) instead of refusing the dataset.
      on_error: ``"error"`` stops at an unreadable image; ``"skip"`` takes the next image of the
        dataset in training and leaves the row empty in evaluation (both counted).
      workers: processes that read for training, each with ``num_threads``; 0 = none.
      num_threads: reader threads; 0 reads in the caller's thread.
      prefetch: batches read ahead.
      process_index: this process.
      process_count: number of processes; must divide ``batch_size``.
      start_step: first training step to deliver.
    """

    batch_size: int
    buckets: tuple[tuple[int, int], ...]
    max_boxes: int = 100
    seed: int = 0
    augment: transforms.AugmentConfig = dataclasses.field(default_factory=transforms.AugmentConfig)
    eval_short_side: int | None = None
    eval_max_size: int | None = None
    allow_truncation: bool = False
    on_error: str = "error"
    workers: int = 0
    num_threads: int = 2
    prefetch: int = 4
    process_index: int = 0
    process_count: int = 1
    start_step: int = 0

    @classmethod
    def from_data(
        cls, data: DataConfig, *, train: bool, batch_size: int, seed: int = 0, start_step: int = 0
    ) -> PipelineConfig:
        """The parameters that a data configuration asks for, on this process.

        Args:
          data: the configuration.
          train: buckets of training, else of evaluation.
          batch_size: images a step over all processes.
          seed: of order and augmentation.
          start_step: first training step to deliver.
        """
        return cls(
            batch_size=batch_size,
            buckets=data.buckets if train else (data.eval_buckets or data.buckets),
            # Evaluation scores come from the annotations, not from padded boxes.
            max_boxes=data.max_boxes if train else (data.max_boxes or 1),
            seed=seed,
            augment=data.augment,
            eval_short_side=data.eval_short_side,
            eval_max_size=data.eval_max_size,
            allow_truncation=data.allow_truncation,
            on_error=data.on_error,
            workers=data.workers if train else 0,
            num_threads=data.num_threads,
            prefetch=data.prefetch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            start_step=start_step,
        )

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
          ValueError: a value is out of range; the message names the field.
        """
        if self.process_count < 1 or not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index {self.process_index} of process_count {self.process_count}"
            )
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise ValueError(
                f"batch_size {self.batch_size} must be a positive multiple of process_count "
                f"{self.process_count}"
            )
        if not self.buckets or any(len(b) != 2 or min(b) < 1 for b in self.buckets):
            raise ValueError(f"buckets must be a list of (height, width): {self.buckets}")
        if self.max_boxes < 1:
            raise ValueError(f"max_boxes must be at least 1, got {self.max_boxes}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2^32), got {self.seed}")
        if self.on_error not in ("error", "skip"):
            raise ValueError(f"on_error must be 'error' or 'skip', got {self.on_error!r}")
        if min(self.workers, self.num_threads, self.prefetch, self.start_step) < 0:
            raise ValueError("workers, num_threads, prefetch and start_step must not be negative")


class TrainBatches:
    """Endless iterator over training batches, starting at ``config.start_step``.

    Attributes:
      stats: what was left out so far (including batches read ahead).
      steps_per_epoch: steps in which as many images pass as the dataset has (a float).
    """

    def __init__(self, dataset: DetectionDataset, config: PipelineConfig) -> None:
        self.stats = PipelineStats()
        self.steps_per_epoch = len(dataset) / config.batch_size
        batches = train_map_dataset(dataset, config, self.stats)[config.start_step :]
        options = grain.ReadOptions(
            num_threads=config.num_threads, prefetch_buffer_size=config.prefetch
        )
        stream = batches.to_iter_dataset(options)
        if config.workers:
            # Worker w reads batches w, w + workers, ..., and they are taken in turn: their order,
            # which is a function of (seed, step), stays what it is.
            if not flags.FLAGS.is_parsed():  # by Grain; this program has none of absl's flags
                flags.FLAGS.mark_as_parsed()
            ahead = max(1, config.prefetch // config.workers)
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=ahead)
            )
        self._iterator = iter(stream)

    def __iter__(self) -> TrainBatches:
        """Itself."""
        return self

    def __next__(self) -> Batch:
        """The next batch; see :func:`make_train_pipeline` for its contents."""
        batch = next(self._iterator)
        if (left_out := batch.pop(_LEFT_OUT, None)) is not None:
            self.stats.add(left_out)
        return batch

    def close(self) -> None:
        """Stops the readers; the iterator is of no use afterwards."""
        self._iterator.close()


def make_train_pipeline(dataset: DetectionDataset, config: PipelineConfig) -> TrainBatches:
    """Makes the endless stream of training batches of this process.

    With b = batch_size / process_count rows, bucket size (H, W) and T = max_boxes, a batch holds

    * ``images`` uint8 [b, H, W, 3], zero-padded at the bottom and right;
    * ``mask`` bool [b, H, W], True on real pixels;
    * ``boxes`` float32 [b, T, 4], cxcywh divided by the image's own unpadded size;
    * ``labels`` int32 [b, T]; ``valid`` bool [b, T]; padding slots hold zeros;
    * ``image_index`` int32 [b], index in the dataset;
    * ``size`` int32 [b, 2], (h, w) of the real area; ``original_size`` int32 [b, 2].

    Crowd regions are no training targets and are left out.

    Args:
      dataset: images with boxes.
      config: parameters.

    Raises:
      DatasetError: the dataset is empty, or an image has more boxes than ``max_boxes`` and
        truncation is not allowed.
      ImageReadError: (while iterating) an image cannot be read and ``on_error`` is ``"error"``.
    """
    return TrainBatches(dataset, config)


def train_map_dataset(
    dataset: DetectionDataset, config: PipelineConfig, stats: PipelineStats | None = None
) -> grain.MapDataset:
    """The training batches of this process by step: ``result[s]`` is the batch of step ``s``.

    A pure function of (seed, step); ``start_step`` is not applied.

    Args:
      dataset: images with boxes.
      config: parameters.
      stats: receives the counts.

    Raises:
      DatasetError: see :func:`make_train_pipeline`.
    """
    check_dataset(dataset, config)
    counts = stats or PipelineStats()

    def load(item: tuple[int, int], rng: np.random.Generator) -> tuple[Row, tuple[int, int]]:
        position, index = item
        bucket = config.buckets[train_bucket(config, position // config.batch_size)]
        index, example = _read_or_next(dataset, index, config.on_error, counts)
        original_size = example.image.shape[0], example.image.shape[1]
        example = transforms.select(example, ~example.iscrowd)
        example = transforms.augment(example, rng, config.augment, bucket)
        return Row(example, index, original_size), bucket

    def batch(rows: Sequence[tuple[Row, tuple[int, int]]]) -> dict[str, Any]:
        made = assemble([row for row, _ in rows], rows[0][1], config.max_boxes, counts)
        # In a worker the counts are a copy.
        return {**made, _LEFT_OUT: counts.take()} if config.workers else made

    elements = grain.MapDataset.range(len(dataset)).seed(config.seed).shuffle().repeat()
    # The position is attached before the slice, so that it is the global one on every process.
    elements = elements.map_with_index(lambda position, index: (position, int(index)))
    elements = elements.random_map(load)
    elements = elements[config.process_index :: config.process_count]
    # drop_remainder only keeps Grain's length of the endless stream within an integer.
    local_size = config.batch_size // config.process_count
    return elements.batch(local_size, drop_remainder=True, batch_fn=batch)


def train_bucket(config: PipelineConfig, step: int) -> int:
    """Index of the bucket of a training step: a function of (seed, step), the same on all hosts."""
    if len(config.buckets) == 1:
        return 0
    rng = np.random.default_rng([config.seed, _BUCKET_STREAM, step])
    return int(rng.integers(len(config.buckets)))


def check_dataset(
    dataset: DetectionDataset, config: PipelineConfig, boxes_matter: bool = True
) -> None:
    """Refuses a set that the pipeline cannot deliver.

    Args:
      dataset: images with boxes.
      config: parameters.
      boxes_matter: images with more than ``max_boxes`` are refused, unless it allows truncation.

    Raises:
      DatasetError: the dataset is empty, or an image has too many boxes.
    """
    if len(dataset) == 0:
        raise DatasetError(f"{dataset.name}: the dataset has no images")
    most = dataset.max_boxes_per_image()
    if boxes_matter and most > config.max_boxes and not config.allow_truncation:
        raise DatasetError(
            f"{dataset.name}: an image has up to {most} boxes but config.data.max_boxes is "
            f"{config.max_boxes}: set --config.data.max_boxes={most}, or leave boxes out with "
            "--config.data.allow_truncation=true"
        )


def _read_or_next(
    dataset: DetectionDataset, index: int, on_error: str, stats: PipelineStats
) -> tuple[int, Example]:
    """Reads image ``index``; when that fails and may be skipped, the next readable one."""
    reason = ""
    for _ in range(min(len(dataset), _MAX_SKIPS_IN_A_ROW)):
        try:
            with stats.reading(dataset.file_name(index)):
                return index, dataset[index]
        except ImageReadError as error:
            if on_error == "error":
                raise with_remedy(error) from error
            reason = str(error)
            stats.add_skipped(dataset.file_name(index), reason)
            index = (index + 1) % len(dataset)
    raise ImageReadError(
        f"{dataset.name}: {min(len(dataset), _MAX_SKIPS_IN_A_ROW)} images in a row cannot be "
        f"read; the last reason: {reason}"
    )


def with_remedy(error: ImageReadError) -> ImageReadError:
    """An image's error with what would help."""
    return ImageReadError(f"{error} (--config.data.on_error=skip goes on without such images)")
