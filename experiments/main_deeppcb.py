"""The main table on DeepPCB: both families, all methods, 4 and 3 bits, two seeds.

python experiments/main_deeppcb.py --work=DIR data.root=FOLDER [--only=detr] [--minutes=M] [--list]

FOLDER: see configs/deeppcb.py. Deformable DETR's backbone is pretrained on the training images, a
float teacher trained from it; DETR's teacher goes on from the packaged one. Students start from the
teachers. Numbers are of the 500 test images.
"""

from __future__ import annotations

from collections.abc import Iterator

from photo_rows import chain
from study import Row, run_study

ORDER = (
    *((4, seed, ("lsq", "aqdetr")) for seed in (0, 1)),
    (3, 0, ("lsq", "aqdetr")),
    (4, 0, ("distill", "auxiliary", "qdetr", "lsq_plus")),
    (3, 1, ("lsq", "aqdetr")),
    (4, 1, ("distill", "auxiliary", "qdetr", "lsq_plus")),
    *((3, seed, ("qdetr", "lsq_plus")) for seed in (0, 1)),
)
"""(bits, seed, methods) of the trained rows."""


def rows() -> Iterator[Row]:
    """By family."""
    for family in ("detr", "deformable"):
        pretrain = family == "deformable"
        yield from chain("configs/deeppcb.py", family, ORDER, pretrain=pretrain)


if __name__ == "__main__":
    run_study("main_deeppcb", rows(), __doc__.splitlines()[0])
