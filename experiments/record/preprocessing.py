"""Records what transformers' image processors make of pictures, for tests that must not need torch.

python -m experiments.record.preprocessing [--out=tests/fixtures/preprocessing.npz]
    [--bccd=FOLDER]

Needs the extra "parity". The pictures are made here by integer arithmetic, so that a test makes the
same ones without a file; with ``--bccd`` a few photographs of the BCCD set are recorded as well. Of
every picture: the size after the official resize (800 / 1333), the pixels on a grid and the means
of some rows and columns, from the processor that resizes with Pillow and from the one that resizes
with torchvision; the boxes that it makes of annotations; and what the processors of both families
make of network outputs.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SHORT, LONG = 800, 1333
GRID = 20
"""Points of the grid on each side."""

EVERY = 8
"""The means of every so many rows and columns are kept."""

PICTURES: dict[str, tuple[int, int, str, str]] = {
    # name: (height, width, content, kind of file)
    "landscape": (480, 640, "smooth", "RGB"),
    "portrait": (333, 250, "noise", "RGB"),
    "shrunk": (1151, 1601, "noise", "RGB"),
    "tiny": (37, 53, "noise", "RGB"),
    "odd": (427, 641, "mixed", "RGB"),
    "as_it_is": (800, 1000, "noise", "RGB"),
    "square": (501, 501, "mixed", "RGB"),
    "long": (200, 700, "mixed", "RGB"),
    "very_long": (100, 1001, "mixed", "RGB"),
    "very_high": (997, 113, "noise", "RGB"),
    "grey": (240, 321, "mixed", "L"),
    "transparent": (240, 321, "mixed", "RGBA"),
    "palette": (150, 201, "smooth", "P"),
    "turned": (300, 401, "mixed", "EXIF"),
}
PHOTOGRAPHS = ("BloodImage_00007", "BloodImage_00113", "BloodImage_00342")

BOXES = (
    # [x, y, width, height] in parts of the picture, class, crowd
    ((0.1, 0.2, 0.3, 0.25), 0, 0),
    ((0.55, 0.5, 0.4, 0.49), 2, 0),
    ((0.8, 0.7, 0.5, 0.5), 1, 0),  # over the border
    ((0.3, 0.3, 0.0, 0.2), 1, 0),  # no width
    ((0.2, 0.1, 0.5, 0.5), 2, 1),  # a crowd
)


def picture(name: str) -> bytes:
    """One of PICTURES as a PNG file."""
    height, width, content, kind = PICTURES[name]
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    smooth = (x * 255 // width * (3 - c) + y * 255 // height * (1 + c)) // 4
    rings = ((x - width // 3) ** 2 + (y - height // 2) ** 2) // (200 + 40 * c) % 256
    noise = (x * 73_856_093 ^ y * 19_349_663 ^ (c + 1) * 83_492_791) * 2_654_435_761 >> 13 & 255
    half = np.where(x < width // 2, noise, rings)
    values = {"smooth": smooth, "noise": noise, "mixed": half}[content].astype(np.uint8)
    image, options = Image.fromarray(values), {}
    if kind == "RGBA":
        alpha = Image.fromarray(noise[..., 0].astype(np.uint8))
        image.putalpha(alpha)
    elif kind == "P":
        image, options = image.quantize(64, dither=Image.Dither.NONE), {"transparency": 3}
    elif kind == "EXIF":
        exif = Image.Exif()
        exif[0x0112] = 6  # stored lying on its side
        options = {"exif": exif}
    elif kind == "L":
        image = image.convert("L")
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def annotations(height: int, width: int) -> list[dict[str, Any]]:
    """BOXES as COCO annotations of a picture."""
    scale = np.array([width, height, width, height])
    rows = []
    for number, (part, category, crowd) in enumerate(BOXES, 1):
        box = (np.array(part) * scale).round(2)
        rows.append(
            {
                "id": number,
                "image_id": 1,
                "category_id": category,
                "bbox": box.tolist(),
                "area": float(box[2] * box[3]),
                "iscrowd": crowd,
            }
        )
    return rows


def samples(image: np.ndarray) -> dict[str, np.ndarray]:
    """What is kept of an image [H, W, 3] of values 0 to 255."""
    height, width = image.shape[:2]
    rows = np.linspace(0, height - 1, GRID).astype(int)
    columns = np.linspace(0, width - 1, GRID).astype(int)
    return {
        "size": np.array([height, width], np.int32),
        "grid": image[np.ix_(rows, columns)].astype(np.float32),
        "rows": image[::EVERY].mean((1, 2), dtype=np.float64).astype(np.float32),
        "columns": image[:, ::EVERY].mean((0, 2), dtype=np.float64).astype(np.float32),
    }


def record(files: dict[str, bytes]) -> dict[str, np.ndarray]:
    """All arrays of the fixture."""
    import torch
    import transformers
    from transformers import DetrImageProcessor
    from transformers.image_utils import load_image
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

    arrays: dict[str, np.ndarray] = {
        "about/versions": np.array(
            [f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
        )
    }
    size = {"shortest_edge": SHORT, "longest_edge": LONG}
    processors = {"pil": DetrImageProcessorPil(size=size), "fast": DetrImageProcessor(size=size)}
    images = {name: load_image(Image.open(io.BytesIO(data))) for name, data in files.items()}
    for name, image in images.items():
        target = {"image_id": 1, "annotations": annotations(image.height, image.width)}
        for kind, processor in processors.items():
            plain = processor(images=image, annotations=target, do_normalize=False)
            values = np.asarray(plain["pixel_values"][0]).transpose(1, 2, 0) * 255.0
            key = f"{name}/{kind}"
            arrays |= {f"{key}/{part}": array for part, array in samples(values).items()}
            assert np.asarray(plain["pixel_mask"][0]).all()
        normal = processors["pil"](images=image, annotations=target)
        values = np.asarray(normal["pixel_values"][0]).transpose(1, 2, 0)
        arrays[f"{name}/normalised"] = samples(values)["grid"]
        arrays[f"{name}/boxes"] = np.asarray(normal["labels"][0]["boxes"], np.float32)
        arrays[f"{name}/labels"] = np.asarray(normal["labels"][0]["class_labels"], np.int32)
    pair = [images["landscape"], images["portrait"]]
    batch = processors["pil"](images=pair)
    masks = np.stack([np.asarray(m) for m in batch["pixel_mask"]]).astype(bool)
    arrays["batch/mask"] = np.packbits(masks, axis=-1)
    arrays["batch/shape"] = np.array(masks.shape, np.int32)
    padding = [np.asarray(v)[:, ~m] for v, m in zip(batch["pixel_values"], masks, strict=True)]
    arrays["batch/padding"] = np.unique(np.concatenate([p.ravel() for p in padding]))
    return arrays | postprocessing()


def postprocessing() -> dict[str, np.ndarray]:
    """What both families' processors make of network outputs."""
    import torch
    from transformers import DeformableDetrImageProcessor, DetrImageProcessor
    from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

    rng = np.random.default_rng(3)
    sizes = np.array([[480, 640], [333, 250]], np.int32)
    arrays: dict[str, np.ndarray] = {"outputs/sizes": sizes}
    for family, processor, columns in (
        ("detr", DetrImageProcessor(), 12),
        ("deformable", DeformableDetrImageProcessor(), 11),
    ):
        logits = rng.normal(0, 2, (2, 40, columns)).astype(np.float32)
        boxes = rng.uniform(0.05, 0.6, (2, 40, 4)).astype(np.float32)
        output = DetrObjectDetectionOutput(
            logits=torch.from_numpy(logits), pred_boxes=torch.from_numpy(boxes)
        )
        found = processor.post_process_object_detection(
            output, threshold=0.0, target_sizes=torch.from_numpy(sizes)
        )
        arrays |= {f"outputs/{family}/logits": logits, f"outputs/{family}/boxes": boxes}
        for part in ("scores", "labels", "boxes"):
            values = np.stack([np.asarray(image[part]) for image in found])
            arrays[f"outputs/{family}/found_{part}"] = values
    return arrays


def main() -> None:
    """Writes the fixture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="tests/fixtures/preprocessing.npz")
    parser.add_argument("--bccd", help="folder of the BCCD set")
    options = parser.parse_args(sys.argv[1:])
    files = {name: picture(name) for name in PICTURES}
    if options.bccd:
        folder = Path(options.bccd) / "JPEGImages"
        files |= {name: (folder / f"{name}.jpg").read_bytes() for name in PHOTOGRAPHS}
    arrays = record(files)
    np.savez_compressed(options.out, **arrays)
    print(f"{options.out}: {len(arrays)} arrays, {Path(options.out).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
