"""The main table: both families, all methods, 4, 3 and 2 bits, three seeds, on the embedded set.

python experiments/main_shapes.py --work=DIR [--only=detr,w4] [--minutes=M] [--list]

Students are trained by the quickstart's schedule from the packaged float teachers; calibration
alone by each of its methods. ``experiments/render_results.py`` makes the tables.
"""

from __future__ import annotations

from collections.abc import Iterator

from study import Row, run_study

FAMILIES = {"detr": "", "deformable": "deformable-"}
TEACHERS = {"detr": "packaged:shapes_teacher", "deformable": "packaged:shapes_deformable_teacher"}
METHODS = ("lsq", "aqdetr", "qdetr", "lsq_plus")
CALIBRATIONS = ("minmax", "percentile", "mse")
BITS, SEEDS = (4, 3, 2), (0, 1, 2)


def rows() -> Iterator[Row]:
    """What is cheap first, then 4 bits of all methods before another seed or fewer bits."""
    for family, prefix in FAMILIES.items():
        config = f"configs/shapes_quickstart.py:{prefix}lsq"
        facts = {"family": family, "method": "float", "bits": 32, "seed": 0}
        yield Row(f"{family}_float", config, "eval", facts=facts, model=TEACHERS[family])
        for bits in BITS:
            for way in CALIBRATIONS:
                yield Row(
                    f"{family}_w{bits}_ptq_{way}",
                    config,
                    "ptq",
                    (f"quant.policy=w{bits}a{bits}", f"quant.calibration_method={way}"),
                    {"family": family, "method": f"ptq_{way}", "bits": bits, "seed": 0},
                )
    order = [(4, s) for s in SEEDS] + [(b, s) for s in SEEDS for b in BITS if b != 4]
    for bits, seed in order:
        for family, prefix in FAMILIES.items():
            for method in METHODS:
                yield Row(
                    f"{family}_w{bits}_{method}_seed{seed}",
                    f"configs/shapes_quickstart.py:{prefix}{method}",
                    "train",
                    (f"quant.policy=w{bits}a{bits}", f"seed={seed}"),
                    {"family": family, "method": method, "bits": bits, "seed": seed},
                )


if __name__ == "__main__":
    run_study("main_shapes", rows(), __doc__.splitlines()[0])
