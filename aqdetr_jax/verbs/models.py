"""Models: judged, used, changed into other forms, measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from aqdetr_jax import host
from aqdetr_jax.verbs.shared import counter, experiment, show_line, show_stages


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
    config = experiment(arguments, overrides)
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
        progress=counter("evaluated", "batches") if is_main() else None,
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
    config = experiment(arguments, overrides)
    block = ptq(config, arguments.out, counter("evaluated", "batches"))
    print(f"written to {arguments.out}")
    print(format_results(block))


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
    config = experiment(arguments, overrides)
    images = IMAGES if arguments.images is None else arguments.images
    report = export_model(
        arguments.model,
        arguments.to,
        arguments.format,
        GateData(config.data, images, eval_batch_size(config), config.name),
        force=arguments.force,
        progress=show_stages(),
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
        progress=show_line,
    )
    print(format_benchmark(result))
    if arguments.json:
        print(f"written to {write_json_atomic(arguments.json, result)}")


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
        made = complexity.complexity_of_config(experiment(arguments, overrides), size)
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
        experiment(arguments, overrides),
        arguments.model,
        arguments.out,
        images=arguments.images,
        candidates=parse_bits(arguments.bits),
        budget=arguments.budget,
        by=arguments.by,
    )
    print(as_text(result))
    report_sensitivity(result, arguments.out)
