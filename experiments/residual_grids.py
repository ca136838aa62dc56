"""What grids for the backbone's residual sums cost: calibrated models at several widths of them.

python experiments/residual_grids.py --out=FILE [--residual=0,8,6,4] [a.b=value ...]

The teachers of the embedded set, calibrated without training by the quickstart's configurations and
judged on its validation images; 0 bits are float sums. The file is written anew after every model;
rows of the same command that it holds already are kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from aqdetr_jax import host
from aqdetr_jax.checkpoint.model_folder import TEACHERS, load_model
from aqdetr_jax.evaluation.models import evaluate_bundle
from aqdetr_jax.io import read_json, write_json_atomic
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.training.arguments import parse_arguments
from aqdetr_jax.training.bundles import calibrated_bundle
from aqdetr_jax.training.experiment import load_experiment

CONFIGS = {
    "detr": "shapes_quickstart",
    "deformable": "shapes_quickstart:deformable-aqdetr",
}
METRICS = ("AP", "AP50", "APs", "APm", "APl")


def main() -> None:
    """Calibrates, evaluates and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(overrides=True)
    parser.add_argument("--out", required=True, type=Path, help="JSON file of the rows")
    parser.add_argument("--residual", default="0,8,6,4", help="bits, 0 = float")
    options, overrides = parse_arguments(parser, sys.argv[1:])
    words = [f"--residual={options.residual}", *overrides]
    command = " ".join(["python experiments/residual_grids.py --out=FILE", *words])
    commit = git_commit()
    rows = []
    if options.out.is_file():
        before = read_json(options.out)
        rows = before["rows"] if before["command"] == command else []
    done = {(row["config"], row["residual"]) for row in rows}
    for family, name in CONFIGS.items():
        for bits in map(int, options.residual.split(",")):
            if (name, bits) in done:
                continue
            config = load_experiment(name, (*overrides, f"quant.residual={bits}"))
            bundle = calibrated_bundle(config, load_model(TEACHERS[family]))
            block, _ = evaluate_bundle(
                bundle, config.data, name, batch_size=config.train.eval_batch_size, seed=config.seed
            )
            rows.append(
                {
                    "config": name,
                    "policy": config.quant.policy,
                    "residual": bits,
                    **{metric: block[metric] for metric in METRICS},
                    "images": block["images"],
                    "seed": config.seed,
                    "commit": commit,
                }
            )
            write_json_atomic(options.out, {"command": command, "rows": rows})
            print(f"{name}, residual sums at {bits or 'float'}: AP {block['AP']:.4f}")


if __name__ == "__main__":
    host.prepare()
    main()
