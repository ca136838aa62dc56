"""The embedded detection set: generated scenes of ten kinds of object, nothing to download.

Every image is a pure function of (spec, seed, split, index), drawn with NumPy and Pillow. The set
is small but meant as a fair detection problem: outlines tell the class for certain, hue and fill
texture tell it in part (as in real things), and clutter, occlusion, rotation, noise and a broad
mix of sizes are in the way. Sizes follow COCO's absolute bins (small < 32^2 <= medium < 96^2 <=
large square pixels).

Rendering is in :mod:`aqdetr_jax.data.shapes.render`; this module holds the dataset and its cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import tempfile
import zipfile
from typing import Any

import numpy as np

from aqdetr_jax.data.dataset import (
    DatasetError,
    DetectionDataset,
    Example,
    Record,
    ground_truth_from_records,
    json_digest,
)
from aqdetr_jax.data.shapes.objects import CLASS_NAMES
from aqdetr_jax.data.shapes.render import GENERATOR_VERSION, Scene, render_scene
from aqdetr_jax.data.shapes.spec import ShapesSpec

SPLITS = {"train": 0, "validation": 1, "test": 2}
DEFAULT_NUM_IMAGES = {"train": 8000, "validation": 1200, "test": 1200}


class ShapesDataset(DetectionDataset):
    """Generated scenes; images are made on first use and then kept in memory as uint8.

    Args:
      split: ``"train"``, ``"validation"`` or ``"test"``; splits are independent draws.
      size: image side in pixels (square, 64 to 1024).
      num_images: number of images; None takes 8000 for train and 1200 for the others.
      seed: another seed gives another set of the same distribution.
      cache_dir: folder for a file with the whole set, made on first use (atomically) and loaded
        when its fingerprint fits, so that later runs start at once.
      cache_in_memory: keep generated images (size^2 * 3 bytes each).
      **spec: fields of :class:`ShapesSpec`.

    Raises:
      DatasetError: unknown split or parameter, or a value out of range.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 128,
        num_images: int | None = None,
        seed: int = 0,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_in_memory: bool = True,
        **spec: Any,
    ) -> None:
        if split not in SPLITS:
            raise DatasetError(f"shapes: unknown split {split!r} (known: {', '.join(SPLITS)})")
        if not 64 <= size <= 1024:
            raise DatasetError(f"shapes: size must be 64 to 1024 pixels, got {size}")
        known = {f.name for f in dataclasses.fields(ShapesSpec)}
        if unknown := sorted(set(spec) - known):
            raise DatasetError(
                f"shapes: unknown parameter {unknown[0]!r} (known: {', '.join(sorted(known))})"
            )
        if "size_mix" in spec:
            spec["size_mix"] = tuple(float(v) for v in spec["size_mix"])
        if num_images is None:
            num_images = DEFAULT_NUM_IMAGES[split]
        if num_images < 1:
            raise DatasetError(f"shapes: num_images must be at least 1, got {num_images}")
        self.name = f"shapes/{split}"
        self.split = split
        self.size = int(size)
        self.seed = int(seed)
        self.spec = ShapesSpec(**spec)
        self.class_names = CLASS_NAMES
        self.category_ids = tuple(range(1, len(CLASS_NAMES) + 1))
        self.drops = {}
        self.drop_examples = ()
        self._num_images = int(num_images)
        self._cache_in_memory = cache_in_memory
        self._scenes: list[Scene | None] = [None] * self._num_images
        self._fingerprint: str | None = None
        if cache_dir is not None:
            self._load_or_write_cache(pathlib.Path(cache_dir))

    def __len__(self) -> int:
        """Number of images."""
        return self._num_images

    def __getitem__(self, index: int) -> Example:
        """Image ``index``; see :meth:`DetectionDataset.__getitem__`."""
        scene = self._scene(self._check_index(index))
        return Example(
            image=scene.image.copy(),
            boxes=scene.boxes.copy(),
            labels=scene.labels.copy(),
            iscrowd=np.zeros(len(scene.labels), bool),
            image_id=self.image_id(index),
            file_name=self.file_name(index),
        )

    def image_size(self, index: int) -> tuple[int, int]:
        """``(size, size)``."""
        self._check_index(index)
        return self.size, self.size

    def image_id(self, index: int) -> int:
        """``index + 1``."""
        return self._check_index(index) + 1

    def file_name(self, index: int) -> str:
        """The name the image gets in :func:`write_coco_folder`."""
        return f"{self.split}_{self._check_index(index):06d}.png"

    def max_boxes_per_image(self) -> int:
        """``spec.max_objects``: no image needs to be drawn for it."""
        return self.spec.max_objects

    def visible_fractions(self, index: int) -> np.ndarray:
        """Share of each object's pixels that no later object covers, float32 [N]."""
        return self._scene(self._check_index(index)).visible.copy()

    def coco_ground_truth(self) -> dict[str, Any]:
        """The annotations as a COCO dict. Draws the images not yet drawn: boxes follow pixels."""
        records = []
        for i in range(len(self)):
            scene = self._scene(i)
            annotations = []
            for x1, y1, x2, y2 in scene.boxes.tolist():
                bbox = [x1, y1, x2 - x1, y2 - y1]
                annotations.append({"bbox": bbox, "area": bbox[2] * bbox[3]})
            records.append(
                Record(
                    image_id=self.image_id(i),
                    file_name=self.file_name(i),
                    height=self.size,
                    width=self.size,
                    boxes=scene.boxes,
                    labels=scene.labels,
                    iscrowd=np.zeros(len(scene.labels), bool),
                    annotations=tuple(annotations),
                )
            )
        return ground_truth_from_records(records, self.class_names, self.category_ids)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the parameters and two rendered images.

        The images are in it because another Pillow may draw an outline by another rule.
        """
        if self._fingerprint is None:
            probes = [self._render(i).image.tobytes().hex() for i in range(min(2, len(self)))]
            self._fingerprint = json_digest({"parameters": self._parameters(), "probes": probes})
        return self._fingerprint

    def _parameters(self) -> dict[str, Any]:
        return {
            "generator": GENERATOR_VERSION,
            "classes": self.class_names,
            "split": self.split,
            "size": self.size,
            "num_images": self._num_images,
            "seed": self.seed,
            "spec": dataclasses.asdict(self.spec),
        }

    def _render(self, index: int) -> Scene:
        # The spec is no part of the random key: two specs differ only where they must.
        rng = np.random.default_rng([self.seed, SPLITS[self.split], index])
        return render_scene(rng, self.spec, self.size)

    def _scene(self, index: int) -> Scene:
        scene = self._scenes[index]
        if scene is None:
            # Two threads may draw the same image at once; both get the same pixels.
            scene = self._render(index)
            if self._cache_in_memory:
                self._scenes[index] = scene
        return scene

    def _load_or_write_cache(self, folder: pathlib.Path) -> None:
        path = folder / f"shapes-{self.split}-{self.fingerprint[:16]}.npz"
        if not (path.exists() and self._load_cache(path)):
            scenes = [self._scene(i) for i in range(len(self))]
            self._write_cache(path, scenes)
            self._scenes = list(scenes)

    def _load_cache(self, path: pathlib.Path) -> bool:
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                if str(stored["fingerprint"]) != self.fingerprint:
                    return False
                images, counts = stored["images"], stored["counts"]
                boxes, labels = stored["boxes"], stored["labels"]
                visible = stored["visible"]
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
            return False  # A broken cache is made anew; it holds nothing that cannot be redrawn.
        ends = np.cumsum(counts)
        if (
            images.shape != (len(self), self.size, self.size, 3)
            or len(counts) != len(self)
            or len(boxes) != (ends[-1] if len(ends) else 0)
        ):
            return False
        self._scenes = [
            Scene(images[i], boxes[e - n : e], labels[e - n : e], visible[e - n : e])
            for i, (e, n) in enumerate(zip(ends, counts, strict=True))
        ]
        return True

    def _write_cache(self, path: pathlib.Path, scenes: list[Scene]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(
                    file,
                    fingerprint=np.array(self.fingerprint),
                    images=np.stack([s.image for s in scenes]),
                    counts=np.array([len(s.labels) for s in scenes], np.int32),
                    boxes=np.concatenate([s.boxes for s in scenes]),
                    labels=np.concatenate([s.labels for s in scenes]),
                    visible=np.concatenate([s.visible for s in scenes]),
                )
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
