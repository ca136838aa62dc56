"""Is one run better than another, or were the evaluation images kind to it?

python experiments/compare_runs.py --out=FILE [--draws=N] [--config.a.b=VALUE] REFERENCE RUN ...

Paired bootstrap over the evaluation images: AP of every run on the same images drawn with
replacement, and the difference to the reference on each draw. Prints and keeps the mean difference,
its standard deviation, and the share of draws in which the run is better. It says nothing of other
noise: another seed of the same training differs too.

REFERENCE and RUN are work directories of finished runs on one evaluation set; the set is that of
the reference's configuration (--config.data.root=... and the like as overrides).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from aqdetr_jax import host
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.evaluation.bootstrap import bootstrap_ap, image_draws
from aqdetr_jax.evaluation.evaluator import Detections
from aqdetr_jax.io import read_json, write_json_atomic
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.training.arguments import parse_arguments
from aqdetr_jax.training.experiment import load_experiment


def main() -> None:
    """Draws, evaluates, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(overrides=True)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    options, overrides = parse_arguments(parser, sys.argv[1:])
    config = load_experiment(str(options.runs[0] / "config.json"), overrides)
    dataset = open_dataset(config.data, train=False)
    truth = dataset.coco_ground_truth()
    draws = image_draws(len(truth["images"]), options.draws, options.seed)
    result = {
        "images": len(truth["images"]),
        "draws": options.draws,
        "seed": options.seed,
        "reference": options.runs[0].name,
        "commit": git_commit(),
        "runs": {},
    }
    images, reference = None, None
    for folder in options.runs:
        found = Detections.read(folder, 0.0)
        if images is not None and found.images != images:
            raise ValueError(f"{folder} was evaluated on other images than {options.runs[0]}")
        images = found.images
        ap = bootstrap_ap(truth, found.results, draws)
        reference = ap if reference is None else reference
        difference = ap - reference
        row = {
            "AP": read_json(folder / "results.json")["AP"],
            "AP_deviation": float(np.std(ap)),
            "difference": float(np.mean(difference)),
            "difference_deviation": float(np.std(difference)),
            "better": float(np.mean(difference > 0)),
        }
        result["runs"][folder.name] = row
        print(
            f"{folder.name:20s} AP {row['AP']:.4f} ± {row['AP_deviation']:.4f}, to "
            f"{result['reference']} {row['difference']:+.4f} ± {row['difference_deviation']:.4f}, "
            f"better in {row['better']:.0%} of the draws"
        )
    write_json_atomic(options.out, result)


if __name__ == "__main__":
    host.prepare()
    main()
