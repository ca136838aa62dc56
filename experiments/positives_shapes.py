"""AP against positives a step: float and 4-bit students with other numbers M, K of them.

python experiments/positives_shapes.py --work=DIR [--only=...] [--minutes=M] [--list]

M auxiliary queries, every box K times; no distillation. DETR on the embedded set by the
quickstart's schedule, each from the packaged teacher (the float ones trained on as long). At 4 bits
M = 0 is LSQ. Those and M = 50, K = 2 are ``main_shapes.py``'s rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from shapes_rows import student
from study import Row, run_study

SETS = ((0, 0), (25, 1), (50, 1), (50, 2), (75, 3), (150, 6))
MAIN = ((0, 0), (50, 2))
"""(M, K) that ``main_shapes.py`` has."""
SEED = 0


def rows() -> Iterator[Row]:
    """By positives."""
    for count, repeats in SETS:
        for policy in ("w4a4", "float"):
            words = [f"quant.policy={policy}"]
            if count:
                words += [f"model.num_auxiliary={count}", f"auxiliary.repeats={repeats}"]
            bits = 4 if policy == "w4a4" else 32
            facts = {"M": count, "K": repeats}
            method = "auxiliary" if count else "lsq"
            name, study = f"{policy}_M{count}_K{repeats}_seed{SEED}", ""
            if bits == 4 and (count, repeats) in MAIN:
                name, study = f"detr_w4_{method}_seed{SEED}", "main_shapes"
            yield student(name, "detr", method, words, facts, bits=bits, seed=SEED, study=study)


if __name__ == "__main__":
    run_study("positives_shapes", rows(), __doc__.splitlines()[0])
