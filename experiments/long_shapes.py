"""What longer training changes: LSQ and AQ-DETR beyond the quickstart's schedule.

python experiments/long_shapes.py --work=DIR [--only=...] [--minutes=M] [--list]

Embedded set, DETR, which the quickstart's schedule leaves furthest from float, one seed: the whole
schedule of configs/shapes_w4a4.py, at 4 and 2 bits, and three times the quickstart's steps. Beside
them the teacher itself trained on by the whole schedule, since a student has had more steps than
its teacher. The float row is ``main_shapes.py``'s.
"""

from __future__ import annotations

from collections.abc import Iterator

from main_shapes import floats
from shapes_rows import student
from study import Row, run_study

FAMILY = "detr"
LONG, WHOLE = 3600, 8000
METHODS = ("lsq", "aqdetr")
FLOAT = "float_longer"
"""The teacher trained on by the student's schedule, in float."""
ORDER = ((4, METHODS), (32, (FLOAT,)), (2, METHODS))
"""(bits, methods) of the rows with the whole schedule."""


def rows() -> Iterator[Row]:
    """4 bits first."""
    yield from floats((FAMILY,))
    for method in METHODS:
        name = f"{FAMILY}_w4_{method}_{LONG}_seed0"
        # The average is as long a part of the run, and so is the warm-up.
        words = (f"train.steps={LONG}", "optimizer.warmup=100", "optimizer.ema=0.995")
        yield student(name, FAMILY, method, words, {"steps": "three times"})
    for bits, methods in ORDER:
        for method in methods:
            name = f"{FAMILY}_w{bits}_{method}_{WHOLE}_seed0"
            # Looks on the way cost half a minute each.
            variant, word = method, "train.quantizers_every=0"
            if method == FLOAT:
                variant, word = "lsq", "quant.policy=float"
            chosen = ("train.eval_every=0", word)
            facts = {"steps": "whole", "method": method}
            yield student(name, FAMILY, variant, chosen, facts, bits=bits, config="shapes_w4a4")


if __name__ == "__main__":
    run_study("long_shapes", rows(), __doc__.splitlines()[0])
