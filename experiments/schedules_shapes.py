"""Schedules that later low-bit work found strong, each measured once: kept only if it helps.

python experiments/schedules_shapes.py --work=DIR [--only=...] [--minutes=M] [--list]

DETR, one seed, 4 bits, LSQ and AQ-DETR, by the quickstart's schedule from the packaged
teacher. "plain" is the quickstart itself, whose moving average is evaluated: ``main_shapes.py``'s
rows. "raw" is of the same runs without the average, for which they are made again where DIR lacks
them; the others change one thing of "plain".
"""

from __future__ import annotations

from collections.abc import Iterator

from shapes_rows import JUDGE, student
from study import Row, run_study

BACKBONE = "('^backbone/',)"
SHIFTS = "('_(step|offset)$', '(^|/)bias$')"
PHASES: dict[str, str] = {
    "backbone_first": f"{{'end': 0.33, 'quantized': {BACKBONE}}}",
    "backbone_alone": f"{{'end': 0.33, 'quantized': {BACKBONE}, 'trained': {BACKBONE}}}",
    # At the last rates of the cosine alone they would move by a percent.
    "steps_last": f"{{'begin': 0.9, 'trained': {SHIFTS}, 'from_average': True, 'rate': 10}}",
}
METHODS, BITS, SEED = ("lsq", "aqdetr"), 4, 0


def rows() -> Iterator[Row]:
    """By schedule."""
    for schedule in ("plain", "raw", *PHASES):
        for method in METHODS:
            plain = f"detr_w{BITS}_{method}_seed{SEED}"
            name = plain if schedule == "plain" else f"w{BITS}_{method}_{schedule}"
            phase = PHASES.get(schedule)
            words = (f"train.phases=({phase},)",) if phase else ()
            facts = {"schedule": schedule}
            study = "main_shapes" if schedule == "plain" else ""
            row = student(name, "detr", method, words, facts, bits=BITS, seed=SEED, study=study)
            if schedule == "raw":
                row = Row(name, row.config, "last", (), row.facts, start=plain, judge=JUDGE)
            yield row


if __name__ == "__main__":
    run_study("schedules_shapes", rows(), __doc__.splitlines()[0])
