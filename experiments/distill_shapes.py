"""Where to distil, what, and from whom: 4-bit students of both families, without auxiliary queries.

python experiments/distill_shapes.py --work=DIR [--only=...] [--minutes=M] [--list]

Embedded set, the quickstart's schedule. Weights of the terms are those of configs/shapes_w4a4.py
where its kind of distance is used, and are chosen to give terms of the same size elsewhere. Those
with both places' probabilities are ``main_shapes.py``'s rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from shapes_rows import FAMILIES, JUDGE, student
from study import Row, run_study

KL, LOGITS, OUTPUT = (20.0, 10.0), (0.5, 0.25), (2.0, 1.0)
PLACES = {
    "encoder": ("kl", KL[0], 0.0),
    "decoder": ("kl", 0.0, KL[1]),
    "both": ("kl", *KL),
    "both_logits": ("logits", *LOGITS),
    "both_output": ("output", *OUTPUT),
}
SOURCES = {"both": "teacher", "both_float_path": "float_path"}
SEED = 0
DEEP = "deep_teacher"
"""A DETR of twice the residual blocks, gone on with from the packaged one."""


def rows() -> Iterator[Row]:
    """By family, then by place; the deeper teacher and its student last."""
    for family in FAMILIES:
        for name in (*PLACES, "both_float_path"):
            kind, encoder, cross = PLACES[name.removesuffix("_float_path")]
            words = (
                f"distill.weights.encoder={encoder}",
                f"distill.weights.kind={kind}",
                f"distill.weights.decoder_cross={cross}",
                f"distill.source={SOURCES.get(name, 'teacher')}",
            )
            of_row, study = f"{family}_{name}_seed{SEED}", ""
            if name == "both":
                of_row, study = f"{family}_w4_distill_seed{SEED}", "main_shapes"
            facts = {"method": name}
            yield student(of_row, family, "distill", words, facts, seed=SEED, study=study)
    yield Row(
        DEEP,
        "configs/shapes_teacher.py",
        overrides=(
            "init_from=packaged:shapes_teacher",
            "model.backbone.depths=(2, 4, 2)",
            "optimizer.lr=7e-4",
            "train.steps=3000",
        ),
        facts={"family": "detr", "method": "deeper float", "bits": 32, "seed": 0},
        judge=JUDGE,
    )
    name = "both_deep"
    of_row = f"detr_{name}_seed{SEED}"
    yield student(of_row, "detr", "distill", (), {"method": name}, seed=SEED, teacher=DEEP)


if __name__ == "__main__":
    run_study("distill_shapes", rows(), __doc__.splitlines()[0])
