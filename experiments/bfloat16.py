"""bfloat16 between the layers beside float32: the same training, from the same teacher and seed.

python experiments/bfloat16.py --work=DIR --out=FILE [--config=shapes_quickstart] [--seeds=0] \
    [a.b=value ...]

Both dtypes of every seed are ordinary training runs under WORK; run the command again to go on
after an interruption. FILE collects the results block of each, and its losses, each the mean of so
many metric lines, and is written anew after every run. A CPU rounds where a TPU does, but computes
bfloat16 by way of float32: the accuracy is what this shows, not the speed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aqdetr_jax import host
from aqdetr_jax.io import read_json, write_json_atomic
from aqdetr_jax.training.arguments import parse_arguments
from aqdetr_jax.training.experiment import load_experiment
from aqdetr_jax.training.loop import train
from aqdetr_jax.viz.records import read_metrics

DTYPES = ("float32", "bfloat16")
POINTS = 20
"""Of a loss curve."""


def curve(folder: Path) -> dict[str, list[float]]:
    """Steps and mean losses of a run's metrics, at most ``POINTS`` of them."""
    lines = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    pieces = np.array_split([(r["step"], r["loss"]) for r in lines], min(POINTS, len(lines)))
    return {
        "steps": [float(piece[-1, 0]) for piece in pieces],
        "losses": [round(float(piece[:, 1].mean()), 4) for piece in pieces],
    }


def main() -> None:
    """Runs what is missing and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(overrides=True)
    parser.add_argument("--config", default="shapes_quickstart")
    parser.add_argument("--work", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--out", required=True, help="JSON file of the results")
    parser.add_argument("--seeds", default="0")
    options, overrides = parse_arguments(parser, sys.argv[1:])
    words = [f"--config={options.config}", f"--seeds={options.seeds}", *overrides]
    settings = {
        "command": " ".join(["python experiments/bfloat16.py --work=DIR --out=FILE", *words])
    }
    result: dict[str, Any] = {**settings, "runs": {}}
    if Path(options.out).is_file():
        result = read_json(options.out)
        if result["command"] != settings["command"]:
            raise ValueError(
                f"{options.out} holds another comparison ({result['command']}): give another "
                "--out, or delete it"
            )
    result["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    for seed in options.seeds.split(","):
        for dtype in DTYPES:
            name = f"{dtype}_seed{seed}"
            if name in result["runs"]:
                continue
            folder = options.work / name
            given = (*overrides, f"seed={seed}", f"model.dtype={dtype}")
            block = train(load_experiment(options.config, given), folder).block
            assert block is not None  # no pretraining
            result["runs"][name] = {**block, **curve(folder)}
            write_json_atomic(options.out, result)
        low, full = (result["runs"][f"{dtype}_seed{seed}"] for dtype in reversed(DTYPES))
        print(
            f"seed {seed}: AP {full['AP']:.4f} in float32, {low['AP']:.4f} in bfloat16; last "
            f"losses {full['losses'][-1]:.3f} and {low['losses'][-1]:.3f}"
        )


if __name__ == "__main__":
    host.prepare()
    main()
