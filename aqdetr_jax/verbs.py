"""What the verbs of the command do: they call the package, and print what it says; no logic.

A verb imports what it needs when it runs: help and mistyped arguments must not wait for JAX.

Each takes the parsed arguments and the overrides of the configuration, and returns an exit status
(None = 0).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from aqdetr_jax import host


def _experiment(arguments, overrides, **options):
    from aqdetr_jax.training.experiment import load_experiment

    return load_experiment(arguments.config, overrides, **options)


def train(arguments: argparse.Namespace, overrides: Sequence[str], **options: Any) -> None:
    """Trains one run."""
    from aqdetr_jax.parallel.hosts import initialize_distributed, is_main
    from aqdetr_jax.reporting import report_training
    from aqdetr_jax.training.loop import train

    initialize_distributed()
    result = train(_experiment(arguments, overrides, **options), arguments.workdir)
    if is_main():
        report_training(result, arguments.workdir)


def pretrain(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Pretrains a backbone."""
    train(arguments, overrides, pretrain=True)


def rerun(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Does a run again from its manifest."""
    from aqdetr_jax.parallel.hosts import initialize_distributed, say
    from aqdetr_jax.training.rerun import format_rerun, rerun

    initialize_distributed()
    made = rerun(arguments.manifest, arguments.workdir)
    say(format_rerun(made))
    return int(not made["equal"])


def replay(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Takes the step of a dump again."""
    from aqdetr_jax.training.dump import format_replay, replay

    made = replay(arguments.dump)
    print(format_replay(made))
    return int(not made["reproduced"])


def evaluate(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Judges a model."""
    from aqdetr_jax.deploy.load import open_model
    from aqdetr_jax.evaluation.coco import format_results
    from aqdetr_jax.evaluation.models import INPUT_KEYS, evaluate_bundle, input_rule
    from aqdetr_jax.io import write_json_atomic
    from aqdetr_jax.parallel.hosts import initialize_distributed, is_main
    from aqdetr_jax.paths import as_path
    from aqdetr_jax.training.effects import check_evaluation_keys
    from aqdetr_jax.training.sizing import eval_batch_size

    check_evaluation_keys(overrides)
    initialize_distributed()
    given = [text.partition("=")[0] for text in overrides]
    if any(key in INPUT_KEYS for key in given) and "data.fit" not in given:
        overrides = (*overrides, "data.fit=0")  # the keys it would decide are given
    config = _experiment(arguments, overrides)
    if arguments.out:
        as_path(arguments.out).mkdir(parents=True, exist_ok=True)
    bundle = open_model(arguments.model)
    rule = input_rule(bundle, config.data, given)
    block, detections = evaluate_bundle(
        bundle,
        config.data,
        bundle.info.get("name", config.name),
        batch_size=eval_batch_size(config),
        seed=config.seed,
        rule=rule,
        progress=_counter("evaluated", "batches") if is_main() else None,
    )
    if not is_main():
        return
    if arguments.out:  # before anything is said of it
        out = as_path(arguments.out)
        write_json_atomic(out / "results.json", block)
        detections.write(out)
        print(f"written to {out}")
    print(format_results(block))


def ptq(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Calibrates and judges a model."""
    from aqdetr_jax.evaluation.coco import format_results
    from aqdetr_jax.ptq import ptq
    from aqdetr_jax.training.effects import check_calibration_keys

    check_calibration_keys(overrides)
    config = _experiment(arguments, overrides)
    block = ptq(config, arguments.out, _counter("evaluated", "batches"))
    print(f"written to {arguments.out}")
    print(format_results(block))


def _counter(verb: str, things: str) -> Callable[[int, int], None]:
    """Shows "VERB 3/20 THINGS", rewritten on a terminal, else once at the end."""

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else "\r"
        if sys.stderr.isatty() or done == total:
            print(f"{verb} {done}/{total} {things}", end=end, file=sys.stderr, flush=True)

    return show


def predict(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Detects on images."""
    from aqdetr_jax.predicting import predict_files

    options = {} if arguments.max_pixels is None else {"max_pixels": arguments.max_pixels}
    predict_files(
        arguments.images,
        arguments.out,
        model=arguments.model,
        threshold=arguments.threshold,
        **options,
    )


def convert(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Reads a published checkpoint."""
    from aqdetr_jax.interop.convert import REPORT, convert

    made = convert(
        arguments.source,
        arguments.to,
        num_classes=arguments.num_classes,
        classes=arguments.classes,
        weights=arguments.weights,
        name=arguments.name,
        dilation=arguments.dilation,
    )
    print(made.title)
    print(made.summary())
    for note in made.notes:
        print(f"note: {note}")
    print(f"written to {arguments.to} ({REPORT} has every parameter)")


def export(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Writes a model for devices or another library."""
    if arguments.format != "huggingface":
        _export_to_devices(arguments, overrides)
        return
    from aqdetr_jax.interop.export import REPORT, export

    if arguments.config or overrides:
        raise ValueError(
            "--format=huggingface looks at no images: leave --config and its overrides out"
        )
    others = ("images", "batch", "activations", "chip", "detections", "force")
    values = {name: getattr(arguments, name) for name in others}
    given = [f"--{n}" for n, value in values.items() if value is not None and value is not False]
    if given:
        raise ValueError(f"of other formats than --format=huggingface: {', '.join(given)}")
    made = export(arguments.model, arguments.to, fake_quantized=arguments.fake_quantized)
    print(made.summary())
    for note in made.report["notes"]:
        print(f"note: {note}")
    print(f"written to {arguments.to} ({REPORT} says what was left out)")


def _export_to_devices(arguments, overrides) -> None:
    from aqdetr_jax.deploy.export import REPORT, export_model
    from aqdetr_jax.deploy.gate import IMAGES, GateData, format_report
    from aqdetr_jax.evaluation.models import INPUT_KEYS
    from aqdetr_jax.training.effects import check_evaluation_keys
    from aqdetr_jax.training.sizing import eval_batch_size

    if arguments.fake_quantized:
        raise ValueError("--fake-quantized is of --format=huggingface: here integers are integers")
    if not arguments.config:
        raise ValueError(
            f"--format={arguments.format} is judged on real images: name a configuration whose "
            "evaluation images it is tried on, --config=configs/NAME.py (data.root=DIR for yours)"
        )
    given = {
        "onnx": {
            "batch": arguments.batch,
            "activations": arguments.activations,
            "outputs": "detections" if arguments.detections else None,
        },
        "stablehlo": {"chip": arguments.chip},
    }
    options = {k: v for k, v in given.pop(arguments.format, {}).items() if v is not None}
    for other, names in given.items():
        if any(value is not None for value in names.values()):
            words = {"outputs": "detections"}
            listed = ", ".join(f"--{words.get(name, name)}" for name in names)
            raise ValueError(f"of --format={other} alone: {listed}")
    check_evaluation_keys(overrides)
    for key in (text.partition("=")[0] for text in overrides):
        if key in ("data.fit", *INPUT_KEYS):
            raise ValueError(
                f"config.{key} has no effect: images are those of the model's own rule"
            )
    config = _experiment(arguments, overrides)
    images = IMAGES if arguments.images is None else arguments.images
    report = export_model(
        arguments.model,
        arguments.to,
        arguments.format,
        GateData(config.data, images, eval_batch_size(config), config.name),
        force=arguments.force,
        progress=_stages(),
        **options,
    )
    print(format_report(report))
    for failure in report["failures"]:
        print(f"note: {failure}")
    print(f"written to {arguments.to}, {report['bytes'] / 1024:.0f} KiB ({REPORT} has the numbers)")


def benchmark(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Times models side by side."""
    from aqdetr_jax.deploy.benchmark import benchmark, format_benchmark, parse_threads
    from aqdetr_jax.io import write_json_atomic
    from aqdetr_jax.paths import as_path

    if (arguments.height is None) != (arguments.width is None):
        raise ValueError("--height and --width go together")
    if arguments.json:  # not found out after all the timing
        as_path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
    result = benchmark(
        arguments.models,
        size=None if arguments.height is None else (arguments.height, arguments.width),
        threads=parse_threads(arguments.threads),
        seconds=arguments.seconds,
        runs=arguments.runs,
        image=arguments.image,
        openvino=arguments.openvino,
        progress=_line,
    )
    print(format_benchmark(result))
    if arguments.json:
        print(f"written to {write_json_atomic(arguments.json, result)}")


def _line(text: str) -> None:
    """Shows what is being done on a terminal, rewritten."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="\r", file=sys.stderr, flush=True)


def _stages() -> Callable[[str, int, int], None]:
    """Shows "THINGS done 3/20", rewritten on a terminal, else once at the end of each."""

    def show(things: str, done: int, total: int) -> None:
        _counter(things, "batches")(done, total)

    return show


def quickstart(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Compresses the packaged teacher."""
    from aqdetr_jax.quickstart import quickstart

    quickstart(
        arguments.workdir,
        model=arguments.model,
        from_scratch=arguments.from_scratch,
        baseline=arguments.baseline,
        overrides=tuple(overrides),
    )


def finetune(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Trains on a folder of images."""
    from aqdetr_jax.finetune import finetune
    from aqdetr_jax.paths import as_path

    finetune(
        arguments.data,
        arguments.workdir or f"runs/finetune-{as_path(arguments.data).resolve().name}",
        family=arguments.model,
        source=arguments.source or "",
        baseline=arguments.baseline,
        effort=arguments.effort,
        overrides=overrides,
    )


def prepare(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Writes a data set."""
    from aqdetr_jax.data.coco_writer import write_coco_folders
    from aqdetr_jax.data.notices import say_contents, say_findings
    from aqdetr_jax.data.official import open_official
    from aqdetr_jax.data.open import open_both
    from aqdetr_jax.data.tfds_builder import prepare

    if arguments.set and overrides:
        raise ValueError(f"{overrides[0]} has no effect: --set reads no configuration")
    if arguments.set:
        sets = open_official(arguments.set, arguments.manual, partial=arguments.partial)
    elif arguments.manual or arguments.partial:
        raise ValueError("--manual and --partial are of --set")
    else:
        sets = open_both(_experiment(arguments, overrides).data)
    for dataset in sets.values():
        say_contents(dataset)
        say_findings(dataset)
    show = _counter("written", "images")
    if arguments.format == "tfds":
        print(f"written to {prepare(sets, arguments.out, progress=show)}")
    else:
        for file in write_coco_folders(sets.values(), arguments.out, progress=show):
            print(f"written to {file}")


def inspect(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Checks a data set."""
    from aqdetr_jax.data.inspect import format_report, inspect_dataset
    from aqdetr_jax.data.open import open_dataset
    from aqdetr_jax.paths import as_path
    from aqdetr_jax.training.data_check import reasons_to_stop
    from aqdetr_jax.viz.contact_sheet import write_contact_sheets

    config = _experiment(arguments, overrides)
    evaluation = open_dataset(config.data, train=False)
    train = open_dataset(config.data, train=True)
    queries = config.model.num_queries or None
    show = _counter("read", "images")
    reports = [
        inspect_dataset(train, queries, other=evaluation, progress=show),
        inspect_dataset(evaluation, queries, progress=show),
    ]
    for report in reports:
        print(format_report(report))
    if arguments.pictures:
        sets = list(zip((train, evaluation), reports, strict=True))
        for path in write_contact_sheets(as_path(arguments.pictures), sets, seed=config.seed):
            print(f"written to {path}")
    reasons = reasons_to_stop(config, train, evaluation, reports)
    for reason in reasons:
        print(f"training would stop: {reason}")
    return int(bool(reasons))


def plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Compiles for TPUs."""
    from aqdetr_jax.io import write_json_atomic
    from aqdetr_jax.planning.plan import KINDS, as_json, make_plan
    from aqdetr_jax.planning.table import format_plan

    host.use_cpu()
    plan = make_plan(
        _experiment(arguments, overrides),
        arguments.topology,
        per_chip=arguments.per_chip,
        bucket=arguments.bucket,
        kinds=KINDS if arguments.kind == "both" else (arguments.kind,),
        images=arguments.images,
        fast=arguments.fast,
        search=arguments.search,
    )
    print(format_plan(plan))
    if arguments.out:
        print(f"written to {write_json_atomic(arguments.out, as_json(plan))}")
    return int(not plan.fits)


def complexity(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Counts parameters and operations."""
    from aqdetr_jax.deploy import complexity
    from aqdetr_jax.io import write_json_atomic
    from aqdetr_jax.quant.report import format_bit_report

    host.use_cpu()
    size = complexity.given_size(arguments.height, arguments.width)
    complexity.check_complexity_keys(overrides, model=arguments.model)
    if arguments.model:
        made = complexity.complexity_of_model(arguments.model, size)
    else:
        made = complexity.complexity_of_config(_experiment(arguments, overrides), size)
    if arguments.operations:
        print(format_bit_report({**made, "rows": made["operations"]}), end="\n\n")
    print(complexity.format_complexity(made))
    if arguments.json:
        print(f"written to {write_json_atomic(arguments.json, made)}")


def sensitivity(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Ranks operations by what few bits cost."""
    from aqdetr_jax.deploy.ranking import as_text
    from aqdetr_jax.deploy.sensitivity import parse_bits, sensitivity
    from aqdetr_jax.reporting import report_sensitivity

    result = sensitivity(
        _experiment(arguments, overrides),
        arguments.model,
        arguments.out,
        images=arguments.images,
        candidates=parse_bits(arguments.bits),
        budget=arguments.budget,
        by=arguments.by,
    )
    print(as_text(result))
    report_sensitivity(result, arguments.out)


def config(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Prints a configuration."""
    from aqdetr_jax.config_types import from_dataclass

    print(json.dumps(from_dataclass(_experiment(arguments, overrides)), indent=2))
