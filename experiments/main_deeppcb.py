"""The main table on DeepPCB: both families, 4 and 3 bits, two seeds of LSQ and AQ-DETR.

python experiments/main_deeppcb.py --work=DIR data.root=FOLDER [--only=detr] [--minutes=M] [--list]

FOLDER: see configs/deeppcb.py. Deformable DETR's backbone is pretrained on the training images, a
float teacher trained from it; DETR's teacher goes on from the packaged one. Students start from the
teachers. Numbers are of the 500 test images.
"""

from __future__ import annotations

from collections.abc import Iterator

from photo_rows import chain
from study import Row, run_study

MAIN, PARTS, OTHERS = ("lsq", "aqdetr"), ("distill", "auxiliary"), ("qdetr", "lsq_plus")
ORDER = {
    # Its students take twice as long.
    "detr": ((4, 0, MAIN), (4, 1, MAIN), (3, 0, MAIN)),
    "deformable": (
        *((4, seed, MAIN) for seed in (0, 1)),
        *((3, seed, MAIN) for seed in (0, 1)),
        (4, 0, (*PARTS, *OTHERS)),
    ),
}
"""(bits, seed, methods) of each family's trained rows."""


def rows() -> Iterator[Row]:
    """By family."""
    for family, order in ORDER.items():
        pretrain = family == "deformable"
        yield from chain("configs/deeppcb.py", family, order, pretrain=pretrain)


if __name__ == "__main__":
    run_study("main_deeppcb", rows(), __doc__.splitlines()[0])
