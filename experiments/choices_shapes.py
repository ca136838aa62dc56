"""Choices of ours undone, one at a time: DETR on the embedded set, one seed.

python experiments/choices_shapes.py --work=DIR [--only=...] [--minutes=M] [--list]

The quickstart's schedule. "plain" is the quickstart itself, ``main_shapes.py``'s rows; the others
change one thing of it.
"""

from __future__ import annotations

from collections.abc import Iterator

from shapes_rows import student
from study import Row, run_study

PLAIN, SEED = "plain", 0
CHOICES: dict[tuple[str, int], dict[str, str]] = {
    ("lsq", 4): {
        "symmetric": "quant.grid=symmetric",
        "zero_point": "quant.grid=zero_point",
        "a_tensor": "quant.attention_granularity=tensor",
        "probabilities": "quant.renormalize=False",
        "lsq_start": "quant.calibration_method=lsq",
        "float_sums": "quant.residual=0",
        "equal_scales": "quant.equalize=0.0",
    },
    ("auxiliary", 4): {
        "random_start": "auxiliary.start=random",
        "two_groups": "model.auxiliary_groups=2",
    },
    # LSQ's: a quarter of the float model's at 2 bits.
    ("lsq", 2): {"less_decay": "optimizer.weight_decay=0.0125"},
}


def rows() -> Iterator[Row]:
    """By method and bits."""
    for (method, bits), choices in CHOICES.items():
        for choice, word in {PLAIN: "", **choices}.items():
            plain = f"detr_w{bits}_{method}_seed{SEED}"
            name = plain if choice == PLAIN else f"w{bits}_{method}_{choice}"
            words = (word,) if word else ()
            facts = {"choice": choice}
            study = "main_shapes" if choice == PLAIN else ""
            yield student(name, "detr", method, words, facts, bits=bits, seed=SEED, study=study)


if __name__ == "__main__":
    run_study("choices_shapes", rows(), __doc__.splitlines()[0])
