"""Which images a run sees, as a frozen dataclass."""

from __future__ import annotations

import dataclasses
from typing import Literal

from aqdetr_jax.data.images import MAX_PIXELS
from aqdetr_jax.data.transforms import AugmentConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, and how they become batches.

    Attributes:
      kind: "shapes" (generated), "coco", "voc", "yolo", "tfds" (prepared by ``aqdetr
        prepare-data``), or "auto": what the files in ``root`` say.
      root: folder of the set.
      train_split: name of the training split; "" = told from the names that are there.
      eval_split: name of the split for evaluation, likewise.
      train_images: image folder of a "coco" set, in place of the one that ``root`` has, or without
        ``root``; a relative path starts here or in ``root``.
      train_annotations: its JSON file, likewise.
      eval_images: image folder for evaluation, likewise.
      eval_annotations: its JSON file, likewise.
      num_train: size of the generated training set.
      num_eval: size of the generated evaluation set.
      image_size: side of generated images, pixels.
      set_seed: seed of the generated set (another seed, another set of the same kind).
      cache_dir: folder in which a generated set is kept between runs; "" = in memory only.
      fit: root of the area of a padded image at most, pixels: buckets, the resize at evaluation and
        the scales of training then follow from the images and their boxes
        (``data.fit``); 0 = the keys below say them.
      buckets: (height, width) of padded training images, pixels.
      eval_buckets: the same for evaluation; () = ``buckets``.
      max_boxes: padded number of boxes an image; 0 = as many as the fullest image has.
      allow_truncation: drop (and count) boxes beyond ``max_boxes`` instead of refusing the set.
      augment: training augmentation.
      eval_short_side: short side of evaluation images, pixels; None = as they are.
      eval_max_size: limit of their long side.
      max_pixels: refuse image files with more pixels (an unreadable image, see ``on_error``).
      on_error: "error" stops at an unreadable image, "skip" replaces and counts it.
      follow_links: read images through links that leave the folder of the set.
      workers: processes that read and augment for training, each with ``num_threads``; 0 = this
        one's threads. (Evaluation is read by threads.)
      num_threads: reader threads.
      prefetch: batches read ahead.
    """

    kind: Literal["shapes", "auto", "coco", "voc", "yolo", "tfds"] = "shapes"
    root: str = ""
    train_split: str = ""
    eval_split: str = ""
    train_images: str = ""
    train_annotations: str = ""
    eval_images: str = ""
    eval_annotations: str = ""
    num_train: int = 8000
    num_eval: int = 1200
    image_size: int = 128
    set_seed: int = 0
    cache_dir: str = ""
    fit: int = 0
    buckets: tuple[tuple[int, int], ...] = ((128, 128),)
    eval_buckets: tuple[tuple[int, int], ...] = ()
    max_boxes: int = 12
    allow_truncation: bool = False
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    eval_short_side: int | None = None
    eval_max_size: int | None = None
    max_pixels: int = MAX_PIXELS
    on_error: Literal["error", "skip"] = "error"
    follow_links: bool = False
    workers: int = 0
    num_threads: int = 1
    prefetch: int = 4

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
          ValueError: a value is out of range; the message names the field.
        """
        if self.fit != 0 and self.fit < 32:
            raise ValueError(f"data.fit must be 0 or at least 32 pixels, got {self.fit}")
        if self.workers < 0:
            raise ValueError(f"data.workers must not be negative, got {self.workers}")
        if self.max_boxes < 0:
            raise ValueError(f"data.max_boxes must not be negative, got {self.max_boxes}")
