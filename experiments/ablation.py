"""The two contributions on and off: LSQ, + auxiliary queries, + distillation, both.

python experiments/ablation.py --config=shapes_w4a4 --teacher=DIR --out=FILE --work=DIR \
    [--seeds=0,1] [--variants=lsq,auxiliary,distill,aqdetr] [--jobs=1] [a.b=value ...]

Every variant and seed is one ordinary training run under WORK; run the command again to go on
after an interruption. FILE collects the results block of each, the float teacher's, and that of
the calibrated model before training, and is written anew after every run. With --jobs, so many runs
train side by side, in processes of their own: one of these small models leaves most of an
accelerator idle.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from aqdetr_jax import host
from aqdetr_jax.checkpoint.model_folder import load_model
from aqdetr_jax.evaluation.models import evaluate_bundle
from aqdetr_jax.io import read_json, write_json_atomic
from aqdetr_jax.training.arguments import parse_arguments
from aqdetr_jax.training.bundles import calibrated_bundle
from aqdetr_jax.training.experiment import load_experiment
from aqdetr_jax.training.loop import train

Run = tuple[str, tuple[str, ...], Path]
"""Configuration, overrides and work directory."""


def command(
    options: argparse.Namespace, parser: argparse.ArgumentParser, overrides: Sequence[str]
) -> str:
    """The command as others would type it, without this machine's folders."""
    packaged = options.teacher.startswith("packaged:")
    words = [
        "python experiments/ablation.py",
        f"--config={options.config}",
        f"--teacher={options.teacher if packaged else 'TEACHER'}",
        f"--work=DIR --out={'FILE' if Path(options.out).is_absolute() else options.out}",
    ]
    for name in ("seeds", "variants"):
        if getattr(options, name) != parser.get_default(name):
            words.append(f"--{name}={getattr(options, name)}")
    for override in overrides:
        key, _, value = override.partition("=")
        folder = key.endswith(("data.root", "data.cache_dir"))
        words.append(f"{key}={'FOLDER' if folder else value}")
    return " ".join(words)


def trained(config: str, overrides: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Results block of one run, which may have been finished before."""
    block = train(load_experiment(config, overrides), folder).block
    assert block is not None  # no pretraining
    return block


def side_by_side(runs: dict[str, Run], jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Starts the runs; (name, results block) of each as it is finished, ``jobs`` at a time."""
    if jobs == 1:
        return ((name, trained(*run)) for name, run in runs.items())
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=host.prepare,
        max_tasks_per_child=1,
    )
    return _as_finished({pool.submit(trained, *run): name for name, run in runs.items()})


def _as_finished(
    futures: dict[concurrent.futures.Future[dict[str, Any]], str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    failed = {}
    for future in concurrent.futures.as_completed(futures):
        try:
            yield futures[future], future.result()
        except Exception as error:  # the other runs are worth their results
            failed[futures[future]] = error
            print(f"=== {futures[future]} failed: {error}", file=sys.stderr)
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed: {', '.join(failed)}")


def main() -> None:
    """Runs what is missing and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(overrides=True)
    parser.add_argument("--config", required=True, help="configuration that takes :VARIANT")
    parser.add_argument("--teacher", required=True, help="the float teacher's folder")
    parser.add_argument("--work", required=True, help="folder of the runs")
    parser.add_argument("--out", required=True, help="JSON file of the results")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--variants", default="lsq,auxiliary,distill,aqdetr")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    options, overrides = parse_arguments(parser, sys.argv[1:])
    variants, seeds = options.variants.split(","), [int(s) for s in options.seeds.split(",")]

    def experiment(variant: str, seed: int) -> tuple[str, tuple[str, ...]]:
        given = (f"init_from={options.teacher}", f"seed={seed}", *overrides)
        return f"{options.config}:{variant}", given

    first = load_experiment(*experiment(variants[0], seeds[0]))
    teacher = load_model(options.teacher)
    settings = {
        "command": command(options, parser, overrides),
        "teacher_run": {k: teacher.info.get(k) for k in ("name", "seed", "steps", "commit")},
    }
    result = {**settings, "teacher": {}, "calibrated": {}, "runs": {}}
    if Path(options.out).is_file():
        result = read_json(options.out)
        for key, value in settings.items():
            if result[key] != value:
                raise ValueError(
                    f"{options.out} holds another ablation ({key}: {result[key]}, now {value}); "
                    "give another --out, or delete it"
                )
    result["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    wanted = {f"{variant}_seed{seed}": (variant, seed) for seed in seeds for variant in variants}
    missing = {
        name: (*experiment(*which), Path(options.work) / name)
        for name, which in wanted.items()
        if name not in result["runs"]
    }
    finished = side_by_side(missing, options.jobs)
    if not result["teacher"]:
        result["teacher"], _ = evaluate_bundle(
            teacher, first.data, "teacher", batch_size=first.train.eval_batch_size
        )
        calibrated = calibrated_bundle(first, teacher)
        result["calibrated"], _ = evaluate_bundle(
            calibrated, first.data, "calibrated", batch_size=first.train.eval_batch_size
        )
        write_json_atomic(options.out, result)
    for name, block in finished:
        print(f"=== {name}: AP {block['AP']:.4f}")
        result["runs"][name] = block
        write_json_atomic(options.out, result)
    reference = result["teacher"]["AP"]
    print(f"teacher AP {reference:.4f}; calibrated only {result['calibrated']['AP']:.4f}")
    for variant in variants:
        found = [result["runs"][f"{variant}_seed{s}"]["AP"] for s in seeds]
        mean = statistics.mean(found)
        print(
            f"{variant:10s} AP {mean:.4f} ({mean / reference:.1%} of the teacher) "
            + " ".join(f"{x:.4f}" for x in found)
        )


if __name__ == "__main__":
    host.prepare()
    main()
