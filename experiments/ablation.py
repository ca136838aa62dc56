"""The two contributions on and off: LSQ, + auxiliary queries, + distillation, both.

python experiments/ablation.py --config=shapes_w4a4 --teacher=DIR --out=FILE --work=DIR \
    [--seeds=0,1] [--variants=lsq,auxiliary,distill,aqdetr] [a.b=value ...]

Every variant and seed is one ordinary training run under WORK; run the command again to go on
after an interruption. FILE collects the results block of each, the float teacher's, and that of
the calibrated model before training, and is written anew after every run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from aqdetr_jax import host
from aqdetr_jax.checkpoint.model_folder import load_model
from aqdetr_jax.evaluation.models import evaluate_bundle
from aqdetr_jax.io import read_json, write_json_atomic
from aqdetr_jax.training.arguments import parse_arguments
from aqdetr_jax.training.bundles import calibrated_bundle
from aqdetr_jax.training.experiment import load_experiment
from aqdetr_jax.training.loop import train


def command(
    options: argparse.Namespace, parser: argparse.ArgumentParser, overrides: Sequence[str]
) -> str:
    """The command as others would type it, without this machine's folders."""
    packaged = options.teacher.startswith("packaged:")
    words = [
        "python experiments/ablation.py",
        f"--config={options.config}",
        f"--teacher={options.teacher if packaged else 'TEACHER'}",
        f"--work=DIR --out={options.out}",
    ]
    for name in ("seeds", "variants"):
        if getattr(options, name) != parser.get_default(name):
            words.append(f"--{name}={getattr(options, name)}")
    for override in overrides:
        key, _, value = override.partition("=")
        words.append(f"{key}={'FOLDER' if key.endswith('data.root') else value}")
    return " ".join(words)


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
    options, overrides = parse_arguments(parser, sys.argv[1:])
    variants, seeds = options.variants.split(","), [int(s) for s in options.seeds.split(",")]

    def config_of(variant, seed):
        return load_experiment(
            f"{options.config}:{variant}",
            (f"init_from={options.teacher}", f"seed={seed}", *overrides),
        )

    first = config_of(variants[0], seeds[0])
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
    if not result["teacher"]:
        result["teacher"], _ = evaluate_bundle(
            teacher, first.data, "teacher", batch_size=first.train.eval_batch_size
        )
        calibrated = calibrated_bundle(first, teacher)
        result["calibrated"], _ = evaluate_bundle(
            calibrated, first.data, "calibrated", batch_size=first.train.eval_batch_size
        )
        write_json_atomic(options.out, result)
    for seed in seeds:
        for variant in variants:
            name = f"{variant}_seed{seed}"
            if name in result["runs"]:
                continue
            print(f"=== {name}")
            run = train(config_of(variant, seed), Path(options.work) / name)
            result["runs"][name] = run.block
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
