"""Trained students leave the program: codes at every quantizer, AP and bytes of what was written.

python experiments/exports.py RUN=CONFIG [RUN=CONFIG ...] [--images=200] [--to=DIR] [--out=FILE]

RUN: a run's folder (of ``aqdetr quickstart`` or ``train``), CONFIG: configs/NAME.py:VARIANT, whose
evaluation images judge it. Every run is exported as a packed and as an ONNX model by ``aqdetr
export``'s own gate; a row a run and format goes to the JSON file, in place of an earlier one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from aqdetr_jax import host
from aqdetr_jax.checkpoint.model_folder import load_model
from aqdetr_jax.deploy.export import export_model
from aqdetr_jax.deploy.gate import GateData, format_report
from aqdetr_jax.io import read_json, write_json_atomic
from aqdetr_jax.training.experiment import load_experiment

FORMATS = ("packed", "onnx")


def measure(run: str, config_name: str, kind: str, images: int, to: Path) -> dict[str, Any]:
    """Exports one run in one format and returns its row."""
    config = load_experiment(config_name)
    model = load_model(run)
    given = GateData(config.data, images, name=config_name)
    report = export_model(run, to, kind, given, force=True)
    print(f"{run} {kind}\n{format_report(report)}", flush=True)
    codes = {
        pair: {
            **{key: value for key, value in found.items() if key != "sites"},
            "quantizers": len(found["sites"]),
            "quantizers_with_a_difference": sum(
                site["different"] > 0 for site in found["sites"].values()
            ),
            "different_in_backbone": sum(
                site["different"]
                for name, site in found["sites"].items()
                if name.startswith("backbone/")
            ),
        }
        for pair, found in report["codes"].items()
    }
    return {
        "family": model.config.family,
        "policy": model.quant.policy,
        "format": kind,
        "config": config_name,
        "steps": model.info.get("steps"),
        "seed": model.info.get("seed"),
        "trained_at_commit": model.info.get("commit"),
        "set": report["set"],
        "bytes": report["bytes"],
        "codes": codes,
        "ap": {name: found["AP"] for name, found in report["ap"].items()},
        "failures": report["failures"],
        "commit": report["commit"],
    }


def main() -> None:
    """Exports what is given and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN=CONFIG")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--to", type=Path, default="runs/exports")
    parser.add_argument("--out", type=Path, default="experiments/results/exports.json")
    options = parser.parse_args()
    for pair in options.runs:
        run, _, config = pair.partition("=")
        for kind in FORMATS:
            name = f"{Path(run).parent.name}-{Path(run).name}-{kind}"
            row = measure(run, config, kind, options.images, options.to / name)
            rows = read_json(options.out) if options.out.is_file() else []
            same = ("family", "policy", "format")
            rows = [r for r in rows if any(r[key] != row[key] for key in same)]
            write_json_atomic(options.out, [*rows, row])


if __name__ == "__main__":
    host.use_cpu()
    main()
