"""What a minute of training buys: both families, the float teachers and the 4-bit students.

python experiments/per_minute.py [--rounds=12] [--out=FILE] [--runs=DIR,...]

The AP is what the ablations kept (``ablation_shapes.json``, ``deformable_shapes.json``: the float
teacher's, and AQ-DETR's mean over seeds). Minutes are the steps of the configuration times the
median step, all four steps measured here in turn in one process, round after round; compiling,
evaluation and the pretraining of the backbone are not in them. Of training runs that are given,
the evaluations on the way are added.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import jax
from results_files import RESULTS
from step_time import AS_IT_IS, Bench

from aqdetr_jax import host
from aqdetr_jax.io import read_json, write_json_atomic
from aqdetr_jax.parallel.mesh import make_mesh
from aqdetr_jax.provenance import git_commit, package_versions
from aqdetr_jax.training.experiment import load_experiment


class Model(NamedTuple):
    """One line: family, which model, its configuration, the ablation that has its AP."""

    family: str
    model: str
    config: str
    ablation: str


MODELS = (
    Model("DETR", "float", "shapes_teacher", "ablation_shapes.json"),
    Model("Deformable DETR", "float", "shapes_teacher:deformable", "deformable_shapes.json"),
    Model("DETR", "4-bit AQ-DETR", "shapes_quickstart", "ablation_shapes.json"),
    Model(
        "Deformable DETR",
        "4-bit AQ-DETR",
        "shapes_quickstart:deformable-aqdetr",
        "deformable_shapes.json",
    ),
)


def average_precision(model: Model) -> float:
    """AP of the model in its ablation's file."""
    found = read_json(RESULTS / model.ablation)
    if model.model == "float":
        return float(found["teacher"]["AP"])
    runs = [block for name, block in found["runs"].items() if "aqdetr_seed" in name]
    return statistics.mean(block["AP"] for block in runs)


def curves(runs: list[str]) -> dict[str, list[tuple[int, float]]]:
    """(step, AP) of the evaluations of each run, by the name of its configuration."""
    found = {}
    for run in runs:
        lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        name = read_json(Path(run) / "config.json")["name"]
        found[name] = [(r["step"], round(r["eval/AP"], 4)) for r in records if "eval/AP" in r]
    return found


def rows(rounds: int, on_the_way: dict[str, list[tuple[int, float]]]) -> list[dict[str, Any]]:
    """Measures and combines."""
    configs = [load_experiment(m.config, ("init_from=unused",)) for m in MODELS]
    mesh = make_mesh(batch_size=configs[0].train.batch_size)
    jax.set_mesh(mesh)
    benches = [Bench(m.config, ("init_from=unused",), mesh, (AS_IT_IS,)) for m in MODELS]
    for number in range(rounds + 2):  # the first two rounds warm up
        for bench in benches:
            bench.round(keep=number >= 2)
    found = []
    for model, config, bench in zip(MODELS, configs, benches, strict=True):
        seconds = bench.seconds[AS_IT_IS]
        a_minute = 60 / statistics.median(seconds)
        ap, minutes = average_precision(model), config.train.steps / a_minute
        curve = [
            {"step": step, "minutes": round(step / a_minute, 2), "AP": value}
            for step, value in on_the_way.get(config.name, [])
        ]
        found.append(
            {
                **model._asdict(),
                "AP": round(ap, 4),
                "steps": config.train.steps,
                "batch": config.train.batch_size,
                "seconds": [round(s, 4) for s in seconds],
                "median_seconds": round(statistics.median(seconds), 4),
                "minutes": round(minutes, 2),
                "AP_per_minute": round(ap / minutes, 4),
                "curve": curve,
            }
        )
    return found


def main() -> None:
    """Measures and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", default=str(RESULTS / "deformable_per_minute.json"))
    parser.add_argument("--runs", default="", help="work directories, for AP on the way")
    options = parser.parse_args()
    found = rows(options.rounds, curves([run for run in options.runs.split(",") if run]))
    result = {
        "commit": git_commit(),
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "versions": package_versions(),
        "rows": found,
    }
    write_json_atomic(options.out, result)
    for row in found:
        print(
            f"{row['family']:16s} {row['model']:14s} AP {row['AP']:.4f}  {row['minutes']:6.1f} min "
            f"({row['steps']} x {row['median_seconds'] * 1e3:.0f} ms)  "
            f"{row['AP_per_minute']:.4f} AP a minute"
        )


if __name__ == "__main__":
    host.prepare(compilation_cache=False)
    main()
