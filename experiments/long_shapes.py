"""What longer training changes: LSQ, distillation and AQ-DETR beyond the quickstart's schedule.

python experiments/long_shapes.py --work=DIR [--only=...] [--minutes=M] [--list]

Embedded set. DETR, which the quickstart's schedule leaves furthest from float: 4 bits for three
times its steps, on three seeds; 2 bits by the whole schedule of configs/shapes_w4a4.py, on one. The
float rows are ``main_shapes.py``'s.
"""

from __future__ import annotations

from collections.abc import Iterator

from main_shapes import floats
from shapes_rows import student
from study import Row, run_study

FAMILY = "detr"
LONG, WHOLE = 3600, 8000
METHODS, SEEDS = ("lsq", "aqdetr"), (0, 1, 2)


def rows() -> Iterator[Row]:
    """4 bits by seed, then 2 bits; distillation alone last."""
    yield from floats((FAMILY,))
    for seed in SEEDS:
        yield from _long(seed, METHODS)
    yield from _whole(("aqdetr", "lsq"))
    for seed in SEEDS:
        yield from _long(seed, ("distill",))


def _long(seed: int, methods: tuple[str, ...]) -> Iterator[Row]:
    for method in methods:
        name = f"{FAMILY}_w4_{method}_{LONG}_seed{seed}"
        # The average is as long a part of the run, and so is the warm-up.
        words = (f"train.steps={LONG}", "optimizer.warmup=100", "optimizer.ema=0.995")
        yield student(name, FAMILY, method, words, {"steps": "three times"}, seed=seed)


def _whole(methods: tuple[str, ...]) -> Iterator[Row]:
    for method in methods:
        name = f"{FAMILY}_w2_{method}_{WHOLE}_seed0"
        # Looks on the way cost half a minute each.
        words = ("train.eval_every=0", "train.quantizers_every=0")
        facts = {"steps": "whole"}
        yield student(name, FAMILY, method, words, facts, bits=2, config="shapes_w4a4")


if __name__ == "__main__":
    run_study("long_shapes", rows(), __doc__.splitlines()[0])
