"""Decoded, augmented and padded images a second and core, beside torchvision's transforms.

python experiments/input_pipeline.py [--theirs=PYTHON] [--images=200] [--rounds=8] [--out=FILE]

DETR's augmentation for COCO on generated JPEGs of 640 x 480 (quality 90), batches of 8. The list
names every file many times over: a set has thousands of images. Every side
is a process on one core (``input_pipeline_worker.py``); they take turns, in the opposite order
every other round, and are compared by CPU seconds of the same round. ``--theirs`` is a Python with
``requirements-parity.lock``, by default that of ``make test-parity``; without one only ours is
measured and the file says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from aqdetr_jax.data.coco import CocoFolder
from aqdetr_jax.data.tfds_builder import prepare
from aqdetr_jax.io import write_json_atomic
from aqdetr_jax.provenance import git_commit, package_versions

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("input_pipeline_worker.py")
OURS = ("ours", "ours_records")
THEIRS = ("pil_float", "pil_uint8", "tensor_uint8")
BATCH, BATCHES = 8, 6
LISTED = 20_000
HEIGHT, WIDTH = 480, 640


def write_images(folder: Path, count: int) -> None:
    """A COCO folder, and each of its images once as records.

    Coloured patches with noise, and rectangles on them, which are the boxes.
    """
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    boxes: list[list[list[int]]] = []
    for number in range(count):
        patches = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8))
        smooth = np.asarray(patches.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), float)
        noisy = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        picture = Image.fromarray(noisy)
        draw = ImageDraw.Draw(picture)
        boxes.append([])
        for _ in range(int(rng.integers(1, 12))):
            width, height = (int(side) for side in rng.integers(20, 200, 2))
            x, y = int(rng.integers(WIDTH - width)), int(rng.integers(HEIGHT - height))
            colour = tuple(int(value) for value in rng.integers(0, 256, 3))
            draw.rectangle([x, y, x + width, y + height], fill=colour)
            boxes[-1].append([x, y, width, height])
        picture.save(folder / "images" / f"{number}.jpg", quality=90)
    sizes = {"width": WIDTH, "height": HEIGHT}
    images, annotations = [], []
    for number in range(LISTED):
        images.append({"id": number, "file_name": f"{number % count}.jpg", **sizes})
        for box in boxes[number % count]:
            row = {"id": len(annotations) + 1, "image_id": number, "bbox": box, "iscrowd": 0}
            annotations.append({**row, "area": box[2] * box[3], "category_id": 1 + number % 80})
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    own = [row for row in annotations if row["image_id"] < count]
    content = {**content, "images": images[:count], "annotations": own}
    (folder / "once.json").write_text(json.dumps(content))
    prepare({"train": CocoFolder(folder / "images", folder / "once.json")}, folder / "prepared")


class Side:
    """A worker process that waits to be told."""

    def __init__(self, python: str, name: str, folder: Path):
        # Spinning threads would count as work; huge pages are what our programs ask for.
        quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "JAX_PLATFORMS": "cpu"}
        quiet["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        path = {"PYTHONPATH": str(ROOT)} if name in OURS else {}
        self.process = subprocess.Popen(
            [python, str(WORKER), name, str(folder), str(BATCH), str(BATCHES)],
            env={**os.environ, **quiet, **path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.milliseconds: list[float] = []
        if self._line() != "ready":
            raise RuntimeError(f"{python}: the worker {name!r} failed, for the reason above")

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def round(self, keep: bool) -> None:
        """One measurement, in CPU milliseconds an image."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds = float(self._line())
        if keep:
            self.milliseconds.append(round(seconds / (BATCH * BATCHES) * 1e3, 3))

    def stop(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def versions_of(python: str) -> dict[str, str]:
    """Versions of what the other side uses."""
    names = ("torch", "torchvision", "pillow", "numpy")
    source = (
        "import importlib.metadata as m, json; "
        f"print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    )
    run = subprocess.run([python, "-c", source], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def main() -> None:
    """Measures and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--theirs", default=str(ROOT / ".venv-parity" / "bin" / "python"))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", default="experiments/results/input_pipeline.json")
    options = parser.parse_args()
    there = Path(options.theirs).exists()
    if not there:
        print(f"no {options.theirs} (make test-parity installs it): ours is measured alone")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, options.images)
        sides = {name: Side(sys.executable, name, folder) for name in OURS}
        for other in THEIRS if there else ():
            sides[other] = Side(options.theirs, other, folder)
        for number in range(options.rounds + 1):  # the first round warms up
            order = list(sides.values())
            for side in order if number % 2 else reversed(order):
                side.round(keep=number > 0)
        for side in sides.values():
            side.stop()
    own = sides["ours"].milliseconds
    rows = {
        name: {
            "cpu_milliseconds_an_image": side.milliseconds,
            "images_a_second": round(1e3 / statistics.median(side.milliseconds), 1),
            "theirs_by_ours": round(
                statistics.median(t / o for t, o in zip(side.milliseconds, own, strict=True)), 3
            ),
        }
        for name, side in sides.items()
    }
    result = {
        "commit": git_commit(),
        "images": f"{options.images} JPEGs of {WIDTH} x {HEIGHT}, batches of {BATCH}, one core",
        "versions": package_versions(),
        "versions_of_theirs": versions_of(options.theirs) if there else None,
        "rounds": options.rounds,
        "sides": rows,
    }
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(options.out, result)
    for name, row in rows.items():
        print(f"{name:13s} {row['images_a_second']:7.1f} images/s  x{row['theirs_by_ours']:.2f}")


if __name__ == "__main__":
    main()
