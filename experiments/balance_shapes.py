"""DETR's own balance on the embedded set: 100 object queries, 300 auxiliary ones, K = 3.

python experiments/balance_shapes.py --work=DIR [--only=...] [--minutes=M] [--list]

Rare positives are the paper's point, and 25 queries for 4.5 objects have them less rare than DETR.
The float teacher is trained first; then 4-bit students of it by the quickstart's schedule, on three
seeds: LSQ, each of AQ-DETR's parts, both.
"""

from __future__ import annotations

from collections.abc import Iterator

from shapes_rows import JUDGE, student
from study import Row, run_study

METHODS, SEEDS, BITS = ("lsq", "auxiliary", "distill", "aqdetr"), (0, 1, 2), 4


def rows() -> Iterator[Row]:
    """The teacher, then by seed."""
    facts = {"family": "detr", "method": "float", "bits": 32, "seed": 0}
    yield Row("teacher", "configs/shapes_teacher.py:queries100", facts=facts, judge=JUDGE)
    for seed in SEEDS:
        for method in METHODS:
            name = f"w{BITS}_{method}_seed{seed}"
            facts = {"family": "detr"}
            yield student(
                name, "queries100", method, (), facts, bits=BITS, seed=seed, start="teacher"
            )


if __name__ == "__main__":
    run_study("balance_shapes", rows(), __doc__.splitlines()[0])
