"""What both sides compute: models, sizes and goals. Imports neither JAX nor torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CLASSES, BOXES = 91, 7
"""Of the full-size models; real boxes on every image."""

TINY_CLASSES = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """One computation on both sides, with random parameters, pixels and boxes.

    Attributes:
      config: our configuration.
      height: of the images.
      width: of the images.
      batch: images.
      goal: their CPU-seconds over ours shall be at least this.
      ours: what is measured here.
      theirs: and there.
    """

    config: str
    height: int
    width: int
    batch: int
    goal: float
    ours: str
    theirs: str


STEP = "forward, backward, clipping, AdamW; float32, dropout, auxiliary losses"
TRANSFORMERS = "transformers, PyTorch eager: the same, fused AdamW"

CASES = {
    "detr_step": Case("coco:r50,float", 480, 640, 2, 1.0, STEP, TRANSFORMERS),
    "deformable_step": Case("coco_deformable:r50,float", 480, 640, 1, 1.0, STEP, TRANSFORMERS),
    "tiny_step": Case("shapes_teacher", 128, 128, 16, 1.1, STEP, TRANSFORMERS),
    "detr_inference": Case(
        "coco:r50,float",
        800,
        1066,
        1,
        1.0,
        "jitted forward pass, float32",
        "ONNX Runtime, float32, transformers' model exported",
    ),
}
