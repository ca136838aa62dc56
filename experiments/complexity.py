"""``aqdetr complexity`` of both COCO families, for the table of docs/complexity.md.

python experiments/complexity.py

Nothing is computed but shapes; a minute on one core.
"""

from __future__ import annotations

from pathlib import Path

from aqdetr_jax import host
from aqdetr_jax.deploy.complexity import complexity_of_config
from aqdetr_jax.deploy.published import MEAN_SIZE
from aqdetr_jax.io import write_json_atomic
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.training.experiment import load_experiment

BITS = ("float", "w8a8", "w4a4", "w4a4-attn8", "w3a3-attn8", "w2a2-attn8")
CONFIGS = (
    *(f"coco:r50,{bits}" for bits in BITS),
    "coco:r50-dc5,w4a4",
    "coco:r101,w4a4",
    *(
        f"coco_deformable:{name},w4a4"
        for name in ("r50", "r50-single", "r50-dc5", "r50-refine", "r50-two-stage")
    ),
)
OUT = Path("experiments/results/complexity.json")


def main() -> None:
    """Counts, and writes the JSON file."""
    rows = []
    for name in CONFIGS:
        made = complexity_of_config(load_experiment(name), MEAN_SIZE)
        del made["operations"]  # hundreds
        rows.append({"config": name, **made, "commit": git_commit()})
    print(f"written to {write_json_atomic(OUT, rows)}")


if __name__ == "__main__":
    host.use_cpu()
    main()
