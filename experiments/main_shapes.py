"""The main table and the ablation: both families, all methods, 4 to 2 bits, on the embedded set.

python experiments/main_shapes.py --work=DIR [--only=detr,w4] [--minutes=M] [--list]

Three seeds; at 3 and 2 bits Q-DETR and LSQ+ on one. Students are trained by the quickstart's
schedule from the packaged float teachers; calibration alone by each of its methods.
``experiments/render_results.py`` makes the tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shapes_rows import FAMILIES, JUDGE, student
from study import Row, calibrations, run_study

from aqdetr_jax.checkpoint.model_folder import TEACHERS

MAIN, OTHERS = ("lsq", "aqdetr"), ("qdetr", "lsq_plus")
PARTS = ("distill", "auxiliary")
"""Each of AQ-DETR's contributions alone, at 4 bits; distillation at 2 bits as well."""
OFFSET = "aqdetr_offset"
"""AQ-DETR on the grids of LSQ+ and Q-DETR: what the method gives, and what its grids do."""
LONGER = "lsq_longer"
"""LSQ for 5/3 of the steps, which take the time of AQ-DETR's or more."""
LONGER_STEPS = {"detr": 2000, "deformable": 1500}
BITS, SEEDS = (4, 3, 2), (0, 1, 2)
ORDER = (
    *((4, seed, (*MAIN, LONGER)) for seed in SEEDS),
    (2, 0, (*MAIN, "distill")),
    (3, 0, MAIN),
    (4, 0, (*PARTS, *OTHERS, OFFSET)),
    *((2, seed, (*MAIN, "distill")) for seed in SEEDS[1:]),
    *((3, seed, MAIN) for seed in SEEDS[1:]),
    *((bits, 0, OTHERS) for bits in (2, 3)),
    *((4, seed, (*PARTS, *OTHERS)) for seed in SEEDS[1:]),
)
"""(bits, seed, methods) of the trained rows."""


def floats(families: Iterable[str] = tuple(FAMILIES)) -> Iterator[Row]:
    """The packaged teachers."""
    for family in families:
        config = f"configs/shapes_quickstart.py:{FAMILIES[family]}lsq"
        facts = {"family": family, "method": "float", "bits": 32, "seed": 0}
        model = str(TEACHERS[family])
        yield Row(f"{family}_float", config, "eval", facts=facts, model=model, judge=JUDGE)


def rows() -> Iterator[Row]:
    """What is cheap first; then the method beside plain LSQ; then what else tells most."""
    yield from floats()
    for family, prefix in FAMILIES.items():
        for bits in BITS:
            config = f"configs/shapes_quickstart.py:{prefix}lsq"
            yield from calibrations(config, family, bits, judge=JUDGE)
    for bits, seed, methods in ORDER:
        for family in FAMILIES:
            for method in methods:
                name = f"{family}_w{bits}_{method}_seed{seed}"
                variant, words = method, ()
                if method == OFFSET:
                    variant, words = "aqdetr", ("quant.grid=offset",)
                elif method == LONGER:
                    variant, words = "lsq", (f"train.steps={LONGER_STEPS[family]}",)
                facts = {"method": method}
                yield student(name, family, variant, words, facts, bits=bits, seed=seed)


if __name__ == "__main__":
    run_study("main_shapes", rows(), __doc__.splitlines()[0])
