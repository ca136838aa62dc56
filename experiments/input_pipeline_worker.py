"""One side of ``input_pipeline.py``: reads, augments and pads batches on one core, when told to.

python experiments/input_pipeline_worker.py SIDE FOLDER BATCH BATCHES

For every line of stdin it makes BATCHES batches and prints their CPU seconds as JSON. Sides: "ours"
(``data.pipeline`` with the COCO configuration's buckets, from a COCO folder), "ours_records" (the
same from what ``aqdetr prepare-data`` wrote), or torchvision's transforms v2, as
DETR's recipe is written with them, on a PyTorch loader without workers: "pil_float" (Pillow's
images, normalised floats, as the original), "pil_uint8" (Pillow's images, bytes) and
"tensor_uint8" (tensors of bytes from the decoder on). Imports are inside: no environment needs to
have both sides.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SCALES = tuple(range(480, 801, 32))
CROP_SCALES = (400, 500, 600)
CROP = (384, 600)
LONGEST = 1333


def ours(folder: Path, batch: int, records: bool = False) -> Iterator[Any]:
    """Our batches: bytes and masks, padded to the bucket of the step."""
    from aqdetr_jax.data.coco import CocoFolder
    from aqdetr_jax.data.pipeline import PipelineConfig, make_train_pipeline
    from aqdetr_jax.data.tfds_builder import TfdsDataset
    from aqdetr_jax.training.experiment import load_experiment

    data = load_experiment("coco:r50,float").data
    assert data.augment.scales == SCALES
    config = PipelineConfig(
        batch_size=batch, buckets=data.buckets, augment=data.augment, num_threads=0, prefetch=0
    )
    if records:
        return make_train_pipeline(TfdsDataset(folder / "prepared"), config)
    return make_train_pipeline(CocoFolder(folder / "images", folder / "annotations.json"), config)


def theirs(folder: Path, batch: int, backend: str, normalise: bool) -> Iterator[Any]:
    """Batches of torchvision: images and masks, padded to the largest image of the batch."""
    import torch
    from PIL import Image
    from torchvision import io, tv_tensors
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional

    torch.set_num_threads(1)
    torch.manual_seed(0)

    class SizeCrop(v2.Transform):
        """Each side drawn from CROP, but no longer than the image."""

        def make_params(self, flat: list[Any]) -> dict[str, int]:
            def draw(low: int, high: int) -> int:
                return int(torch.randint(low, high + 1, ())) if high > low else high

            height, width = functional.get_size(flat[0])
            high, wide = draw(CROP[0], min(height, CROP[1])), draw(CROP[0], min(width, CROP[1]))
            return {
                "top": draw(0, height - high),
                "left": draw(0, width - wide),
                "height": high,
                "width": wide,
            }

        def transform(self, value: Any, params: dict[str, int]) -> Any:
            return self._call_kernel(functional.crop, value, **params)

    last = v2.RandomShortestSize(list(SCALES), max_size=LONGEST)
    before_crop = v2.RandomShortestSize(list(CROP_SCALES))
    cropped = v2.Compose([before_crop, SizeCrop(), v2.SanitizeBoundingBoxes(), last])
    steps = [v2.RandomHorizontalFlip(0.5), v2.RandomChoice([last, cropped])]
    if backend == "pil":
        steps.append(v2.ToImage())
    if normalise:
        steps.append(v2.ToDtype(torch.float32, scale=True))
        steps.append(v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    transform = v2.Compose(steps)

    class Images(torch.utils.data.Dataset):
        def __init__(self) -> None:
            content = json.loads((folder / "annotations.json").read_text())
            self.names = [row["file_name"] for row in content["images"]]
            self.rows: list[list[Any]] = [[] for _ in self.names]
            for row in content["annotations"]:
                self.rows[row["image_id"]].append(row)

        def __len__(self) -> int:
            return len(self.names)

        def __getitem__(self, index: int) -> Any:
            path, rows = folder / "images" / self.names[index], self.rows[index]
            if backend == "pil":
                image = Image.open(path).convert("RGB")
            else:
                data = io.read_file(str(path))
                image = tv_tensors.Image(io.decode_image(data, mode="RGB"))
            boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32)
            size = tuple(functional.get_size(image))
            target = {
                "boxes": tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=size),
                "labels": torch.tensor([row["category_id"] for row in rows]),
            }
            return transform(image, target)

    def pad(rows: list[Any]) -> Any:
        height, width = (max(image.shape[axis] for image, _ in rows) for axis in (1, 2))
        images = torch.zeros(len(rows), 3, height, width, dtype=rows[0][0].dtype)
        mask = torch.zeros(len(rows), height, width, dtype=torch.bool)
        for i, (image, _) in enumerate(rows):
            images[i, :, : image.shape[1], : image.shape[2]] = image
            mask[i, : image.shape[1], : image.shape[2]] = True
        return images, mask, [target for _, target in rows]

    loader = torch.utils.data.DataLoader(Images(), batch, shuffle=True, collate_fn=pad)
    while True:
        yield from loader


SIDES: dict[str, Callable[[Path, int], Iterator[Any]]] = {
    "ours": ours,
    "ours_records": lambda folder, batch: ours(folder, batch, records=True),
    "pil_float": lambda folder, batch: theirs(folder, batch, "pil", True),
    "pil_uint8": lambda folder, batch: theirs(folder, batch, "pil", False),
    "tensor_uint8": lambda folder, batch: theirs(folder, batch, "tensor", False),
}


def main() -> None:
    """Serves until stdin ends."""
    side, folder, batch, batches = sys.argv[1:]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    stream = SIDES[side](Path(folder), int(batch))
    next(stream)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        for _ in range(int(batches)):
            next(stream)
        print(json.dumps(time.process_time() - start), flush=True)


if __name__ == "__main__":
    main()
