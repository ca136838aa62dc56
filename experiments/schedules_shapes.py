"""Schedules that later low-bit work found strong, each measured once: kept only if it helps.

python experiments/schedules_shapes.py --work=DIR [--only=...] [--minutes=M] [--list]

DETR, one seed, 4 and 2 bits, LSQ and AQ-DETR, by the quickstart's schedule from the packaged
teacher. "plain" is the quickstart itself (its moving average is evaluated), "raw" the same without
an average; the others change one thing of "plain".
"""

from __future__ import annotations

from collections.abc import Iterator

from study import Row, run_study

BACKBONE = "('^backbone/',)"
SHIFTS = "('_(step|offset)$', '(^|/)bias$')"
SCHEDULES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "raw": ("optimizer.ema=0",),
    "backbone_first": (f"train.phases=({{'end': 0.33, 'quantized': {BACKBONE}}},)",),
    "backbone_alone": (
        f"train.phases=({{'end': 0.33, 'quantized': {BACKBONE}, 'trained': {BACKBONE}}},)",
    ),
    "steps_last": (f"train.phases=({{'begin': 0.9, 'trained': {SHIFTS}, 'from_average': True}},)",),
}
METHODS, BITS, SEED = ("lsq", "aqdetr"), (4, 2), 0


def rows() -> Iterator[Row]:
    """Of all schedules at 4 bits first."""
    for bits in BITS:
        for schedule, overrides in SCHEDULES.items():
            for method in METHODS:
                yield Row(
                    f"w{bits}_{method}_{schedule}",
                    f"configs/shapes_quickstart.py:{method}",
                    "train",
                    (f"quant.policy=w{bits}a{bits}", f"seed={SEED}", *overrides),
                    {
                        "family": "detr",
                        "method": method,
                        "bits": bits,
                        "schedule": schedule,
                        "seed": SEED,
                    },
                )


if __name__ == "__main__":
    run_study("schedules_shapes", rows(), __doc__.splitlines()[0])
