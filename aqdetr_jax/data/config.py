"""Which images a run sees, as a frozen dataclass."""

from __future__ import annotations

import dataclasses
from typing import Literal

from aqdetr_jax.data.transforms import AugmentConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, and how they become batches.

    Attributes:
      kind: "shapes" (generated), "coco" (folder), "voc" (folder) or "tfds" (prepared by
        ``aqdetr prepare-data``).
      root: folder of a "voc" or "tfds" set, or of a "coco" set laid out as COCO's own.
      train_split: split name ("shapes", "voc", "tfds").
      eval_split: split name for evaluation.
      train_images: image folder of a "coco" set.
      train_annotations: its JSON file.
      eval_images: image folder for evaluation.
      eval_annotations: its JSON file.
      num_train: size of the generated training set.
      num_eval: size of the generated evaluation set.
      image_size: side of generated images, pixels.
      set_seed: seed of the generated set (another seed, another set of the same kind).
      cache_dir: folder in which a generated set is kept between runs; "" = in memory only.
      buckets: (height, width) of padded training images, pixels.
      eval_buckets: the same for evaluation; () = ``buckets``.
      max_boxes: padded number of boxes an image.
      allow_truncation: drop (and count) boxes beyond ``max_boxes`` instead of refusing the set.
      augment: training augmentation.
      eval_short_side: short side of evaluation images, pixels; None = as they are.
      eval_max_size: limit of their long side.
      on_error: "error" stops at an unreadable image, "skip" replaces and counts it.
      num_threads: reader threads.
      prefetch: batches read ahead.
    """

    kind: Literal["shapes", "coco", "voc", "tfds"] = "shapes"
    root: str = ""
    train_split: str = "train"
    eval_split: str = "validation"
    train_images: str = ""
    train_annotations: str = ""
    eval_images: str = ""
    eval_annotations: str = ""
    num_train: int = 8000
    num_eval: int = 1200
    image_size: int = 128
    set_seed: int = 0
    cache_dir: str = ""
    buckets: tuple[tuple[int, int], ...] = ((128, 128),)
    eval_buckets: tuple[tuple[int, int], ...] = ()
    max_boxes: int = 12
    allow_truncation: bool = False
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    eval_short_side: int | None = None
    eval_max_size: int | None = None
    on_error: Literal["error", "skip"] = "error"
    num_threads: int = 1
    prefetch: int = 4
