"""BCCD on EfficientNet-Lite0 with ImageNet weights: Deformable DETR, 4 bits, one seed.

python experiments/main_bccd.py --work=DIR data.root=FOLDER [--only=...] [--minutes=M] [--list]

The weights are expected in runs/efficientnet_lite0 (configs/lite0.py has the commands). The float
teacher starts from them, the students from it. Numbers are of the 72 test images.
"""

from __future__ import annotations

from collections.abc import Iterator

from photo_rows import chain
from study import Row, run_study

ORDER = ((4, 0, ("aqdetr", "lsq", "qdetr", "lsq_plus")),)
"""(bits, seed, methods) of the trained rows."""


def rows() -> Iterator[Row]:
    """The teacher, its calibrations, then the students."""
    yield from chain("configs/bccd.py", "deformable", ORDER, lite=True)


if __name__ == "__main__":
    run_study("main_bccd", rows(), __doc__.splitlines()[0])
