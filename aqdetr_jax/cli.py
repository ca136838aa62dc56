"""The command ``aqdetr``: verbs only, no logic.

A verb imports what it needs when it runs: help and mistyped arguments must not wait for JAX.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from aqdetr_jax import host
from aqdetr_jax.training.arguments import parse_arguments

EXIT_STOPPED = 75
"""Exit status of a run that was asked to stop and saved its state (EX_TEMPFAIL: try again)."""


def entry_point() -> None:
    """Console script."""
    host.print_any_name()
    arguments, overrides = parse_arguments(_parser(), sys.argv[1:])
    if arguments.computes:
        host.prepare()
    sys.exit(_run(arguments, overrides))


def main(argv: Sequence[str]) -> int:
    """Runs one verb.

    Args:
      argv: arguments without the program's name.

    Returns:
      Exit status: 0, 1 for bad input (one line on stderr says what), 75 for a run that was asked
      to stop and can go on.
    """
    return _run(*parse_arguments(_parser(), argv))


def _run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    try:
        return arguments.run(arguments, overrides) or 0
    except host.StoppedError as stop:
        print(f"aqdetr: {stop}", file=sys.stderr)
        return EXIT_STOPPED
    except (ValueError, OSError, RuntimeError) as error:
        if arguments.traceback:
            raise
        print(f"aqdetr: {type(error).__name__}: {error}", file=sys.stderr)
        print("(--traceback shows where this came from)", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aqdetr",
        description="Low-bit detection transformers: train, evaluate, predict.",
        epilog="Verbs that take --config, and quickstart and finetune, take overrides of the "
        "configuration: a.b=value, --config.a.b=value or --config.a.b value, any number of them. "
        "Options and arguments take their words first: the value of --workdir lr=1e-3 is none.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name, run, text, *, config=False, workdir=False, computes=True, overrides=False):
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run, overrides=config or overrides, computes=computes)
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        if config:
            sub.add_argument("--config", required=True, metavar="configs/NAME.py")
        if workdir:
            sub.add_argument("--workdir", required=True, metavar="DIR")
        return sub

    verb("train", _train, "train, evaluate and report one run", config=True, workdir=True)
    verb("pretrain", _pretrain, "dense pretraining of a backbone", config=True, workdir=True)
    sub = verb("eval", _eval, "COCO numbers of a model", config=True)
    sub.add_argument("--model", required=True, metavar="DIR", help="a run or its model folder")
    sub.add_argument("--out", metavar="DIR", help="where results.json and detections.json go")
    sub = verb("predict", _predict, "detect on images")
    sub.add_argument("images", nargs="+", metavar="IMAGE")
    sub.add_argument("--model", metavar="DIR", help="a run or its model folder")
    sub.add_argument("--out", default="predictions", metavar="DIR")
    sub.add_argument("--threshold", type=float, default=0.5)
    sub.add_argument("--max-pixels", type=int, metavar="N", help="refuse larger images")
    sub = verb("convert", _convert, "a published checkpoint becomes a model folder")
    sub.add_argument("source", metavar="SOURCE", help="weights file, or transformers' model folder")
    sub.add_argument("--to", required=True, metavar="DIR", help="the model folder to write")
    sub.add_argument("--num-classes", type=int, metavar="N", help="a new class head, N classes")
    sub.add_argument(
        "--classes", metavar="FILE|a,b,c", help="names of the classes; see docs/weights.md"
    )
    sub.add_argument(
        "--weights", metavar="KEY", help="which set of weights, of a file with several: ema"
    )
    sub.add_argument("--name", help="name in results")
    sub.add_argument(
        "--dilation",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the backbone is (not) dilated (DC5), where the source does not say",
    )
    sub = verb("export", _export, "a model for devices, or for another library", overrides=True)
    sub.add_argument("--model", required=True, metavar="DIR", help="a run or its model folder")
    sub.add_argument("--to", required=True, metavar="DIR", help="the folder to write")
    sub.add_argument(
        "--format",
        choices=("packed", "onnx", "stablehlo", "huggingface"),
        required=True,
        help="packed: low-bit integers at their size; onnx: for ONNX Runtime on CPUs; stablehlo: "
        "for XLA; huggingface: transformers' float weights",
    )
    sub.add_argument(
        "--config",
        metavar="configs/NAME.py",
        help="whose evaluation images the export is judged on",
    )
    sub.add_argument(
        "--images", type=int, default=200, metavar="N", help="of those, the first N (200)"
    )
    sub.add_argument("--batch", type=int, metavar="N", help="onnx: images at once (1)")
    sub.add_argument(
        "--activations",
        choices=("uint8", "int8"),
        help="onnx: uint8 (x86), int8 (ARM)",
    )
    sub.add_argument(
        "--detections", action="store_true", help="onnx: boxes and scores come out, no logits"
    )
    sub.add_argument(
        "--force", action="store_true", help="export even what differs from the trained model"
    )
    sub.add_argument(
        "--fake-quantized",
        action="store_true",
        help="weights of a low-bit model as the values on their grids; the rest is float",
    )
    text = "latency, memory and size of models side by side"
    sub = verb("benchmark", _benchmark, text, computes=False)
    sub.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a run or its model folder, a packed model, an ONNX file or a folder of such",
    )
    sub.add_argument("--height", type=int, metavar="H", help="of the images; default: the model's")
    sub.add_argument("--width", type=int, metavar="W")
    sub.add_argument("--threads", default="", metavar="1,2", help="default: one a core")
    sub.add_argument("--seconds", type=float, default=10.0, help="for each model (10)")
    sub.add_argument("--runs", type=int, metavar="N", help="timed runs of each model instead")
    sub.add_argument("--image", metavar="FILE", help="default: one of the embedded set")
    sub.add_argument("--openvino", action="store_true", help="ONNX files in OpenVINO too")
    sub.add_argument("--json", type=Path, metavar="FILE", help="where rows and raw figures go")
    text = "a float detector becomes a 4-bit one, in minutes"
    sub = verb("quickstart", _quickstart, text, overrides=True)
    sub.add_argument("--workdir", default="runs/quickstart", metavar="DIR")
    sub.add_argument("--model", choices=("detr", "deformable"), default="detr")
    sub.add_argument("--from-scratch", action="store_true", help="train the float teacher too")
    sub.add_argument("--baseline", action="store_true", help="also train plain LSQ as long")
    text = "a folder of your own images becomes a low-bit detector"
    sub = verb("finetune", _finetune, text, overrides=True)
    sub.add_argument("data", metavar="DIR", help="COCO, Roboflow, Pascal VOC, YOLO or prepared")
    sub.add_argument("--workdir", metavar="DIR", help="default: runs/finetune-NAME")
    sub.add_argument("--model", choices=("detr", "deformable"), help="default: deformable")
    sub.add_argument("--from", dest="source", metavar="DIR", help="a float model to start from")
    sub.add_argument("--baseline", action="store_true", help="also train plain LSQ as long")
    sub.add_argument(
        "--effort", type=float, default=1.0, metavar="X", help="length of every stage, 1 = recipe"
    )
    sub = verb("prepare-data", _prepare, "write a data set as TFDS or COCO folder", config=True)
    sub.add_argument("--format", choices=("tfds", "coco"), default="tfds")
    sub.add_argument("--out", required=True, metavar="DIR")
    sub = verb("inspect-data", _inspect, "check a data set before training", config=True)
    sub.add_argument(
        "--pictures",
        type=Path,
        metavar="FILE.png|DIR",
        help="draw images with their boxes, those with problems first: one picture, or one a set",
    )
    sub = verb(
        "plan", _plan, "what a slice of TPUs gives, without a TPU", config=True, computes=False
    )
    sub.add_argument("--topology", required=True, metavar="v5e:16x16", help="the slice")
    sub.add_argument("--per_chip", type=int, metavar="N", help="images a chip in a step")
    sub.add_argument("--bucket", metavar="HxW", help="of the images; default: every bucket")
    sub.add_argument("--kind", choices=("train", "eval", "both"), default="both")
    sub.add_argument("--images", type=int, metavar="N", help="size of the training set")
    sub.add_argument("--fast", action="store_true", help="stop before code is generated")
    sub.add_argument("--search", action="store_true", help="find the largest batch that fits")
    sub.add_argument("--out", type=Path, metavar="FILE.json", help="where the plan is written too")
    text = "parameters, multiply-adds, bits, and bytes of the packed file"
    sub = verb("complexity", _complexity, text, computes=False)
    sub.set_defaults(overrides=True)
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="configs/NAME.py")
    what.add_argument("--model", metavar="DIR", help="a run or its model folder")
    sub.add_argument("--height", type=int, metavar="N", help="of an image, pixels")
    sub.add_argument("--width", type=int, metavar="N", help="default: the largest in evaluation")
    sub.add_argument("--operations", action="store_true", help="list every operation too")
    sub.add_argument("--json", type=Path, metavar="FILE", help="where all of it is written too")
    sub = verb("sensitivity", _sensitivity, "which operations can do with few bits", config=True)
    sub.add_argument("--model", required=True, metavar="DIR", help="the float model")
    sub.add_argument("--out", required=True, metavar="DIR", help="where measurements are kept")
    sub.add_argument("--images", type=int, default=200, metavar="N", help="of the evaluation set")
    sub.add_argument("--bits", default="8,4,3,2", metavar="8,4,3,2", help="to choose from")
    sub.add_argument(
        "--budget",
        metavar="900KiB|0.02AP",
        help="bytes of the packed model, or AP lost by calibration; default: the policy's bytes",
    )
    verb("config", _config, "print a resolved configuration", config=True, computes=False)
    return parser


def _experiment(arguments, overrides, **options):
    from aqdetr_jax.training.experiment import load_experiment

    return load_experiment(arguments.config, overrides, **options)


def _train(arguments, overrides, **options) -> None:
    from aqdetr_jax.parallel.hosts import initialize_distributed, is_main
    from aqdetr_jax.reporting import report_training
    from aqdetr_jax.training.loop import train

    initialize_distributed()
    result = train(_experiment(arguments, overrides, **options), arguments.workdir)
    if is_main():
        report_training(result, arguments.workdir)


def _pretrain(arguments, overrides) -> None:
    _train(arguments, overrides, pretrain=True)


def _eval(arguments, overrides) -> None:
    from aqdetr_jax.deploy.load import open_model
    from aqdetr_jax.evaluation.coco import format_results
    from aqdetr_jax.evaluation.models import INPUT_KEYS, evaluate_bundle, input_rule
    from aqdetr_jax.io import write_json_atomic
    from aqdetr_jax.training.effects import check_evaluation_keys
    from aqdetr_jax.training.sizing import eval_batch_size

    check_evaluation_keys(overrides)
    given = [text.partition("=")[0] for text in overrides]
    if any(key in INPUT_KEYS for key in given) and "data.fit" not in given:
        overrides = (*overrides, "data.fit=0")  # the keys it would decide are given
    config = _experiment(arguments, overrides)
    if arguments.out:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)
    bundle = open_model(arguments.model)
    rule = input_rule(bundle, config.data, given)
    block, detections = evaluate_bundle(
        bundle,
        config.data,
        bundle.info.get("name", config.name),
        batch_size=eval_batch_size(config),
        seed=config.seed,
        rule=rule,
        progress=_counter("evaluated", "batches"),
    )
    if arguments.out:  # before anything is said of it
        out = Path(arguments.out)
        write_json_atomic(out / "results.json", block)
        detections.write(out)
        print(f"written to {out}")
    print(format_results(block))


def _counter(verb: str, things: str) -> Callable[[int, int], None]:
    """Shows "VERB 3/20 THINGS", rewritten on a terminal, else once at the end."""

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else "\r"
        if sys.stderr.isatty() or done == total:
            print(f"{verb} {done}/{total} {things}", end=end, file=sys.stderr, flush=True)

    return show


def _predict(arguments, overrides) -> None:
    from aqdetr_jax.predicting import predict_files

    options = {} if arguments.max_pixels is None else {"max_pixels": arguments.max_pixels}
    predict_files(
        arguments.images,
        arguments.out,
        model=arguments.model,
        threshold=arguments.threshold,
        **options,
    )


def _convert(arguments, overrides) -> None:
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


def _export(arguments, overrides) -> None:
    if arguments.format != "huggingface":
        _export_to_devices(arguments, overrides)
        return
    from aqdetr_jax.interop.export import REPORT, export

    if arguments.config or overrides:
        raise ValueError(
            "--format=huggingface looks at no images: leave --config and its overrides out"
        )
    made = export(arguments.model, arguments.to, fake_quantized=arguments.fake_quantized)
    print(made.summary())
    for note in made.report["notes"]:
        print(f"note: {note}")
    print(f"written to {arguments.to} ({REPORT} says what was left out)")


def _export_to_devices(arguments, overrides) -> None:
    from aqdetr_jax.deploy.export import REPORT, export_model
    from aqdetr_jax.deploy.gate import GateData, format_report
    from aqdetr_jax.training.effects import check_evaluation_keys
    from aqdetr_jax.training.sizing import eval_batch_size

    if arguments.fake_quantized:
        raise ValueError("--fake-quantized is of --format=huggingface: here integers are integers")
    if not arguments.config:
        raise ValueError(
            f"--format={arguments.format} is judged on real images: name a configuration whose "
            "evaluation images it is tried on, --config=configs/NAME.py (data.root=DIR for yours)"
        )
    options = {
        name: value
        for name, value in (
            ("batch", arguments.batch),
            ("activations", arguments.activations),
            ("outputs", "detections" if arguments.detections else None),
        )
        if value is not None
    }
    if options and arguments.format != "onnx":
        raise ValueError("--batch, --activations and --detections are of --format=onnx")
    check_evaluation_keys(overrides)
    config = _experiment(arguments, overrides)
    report = export_model(
        arguments.model,
        arguments.to,
        arguments.format,
        GateData(config.data, arguments.images, eval_batch_size(config), config.name),
        force=arguments.force,
        progress=_stages(),
        **options,
    )
    print(format_report(report))
    for failure in report["failures"]:
        print(f"note: {failure}")
    print(f"written to {arguments.to}, {report['bytes'] / 1024:.0f} KiB ({REPORT} has the numbers)")


def _benchmark(arguments, overrides) -> None:
    from aqdetr_jax.deploy.benchmark import benchmark, format_benchmark, parse_threads
    from aqdetr_jax.io import write_json_atomic

    if (arguments.height is None) != (arguments.width is None):
        raise ValueError("--height and --width go together")
    if arguments.json:  # not found out after all the timing
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
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


def _quickstart(arguments, overrides) -> None:
    from aqdetr_jax.quickstart import quickstart

    quickstart(
        arguments.workdir,
        model=arguments.model,
        from_scratch=arguments.from_scratch,
        baseline=arguments.baseline,
        overrides=overrides,
    )


def _finetune(arguments, overrides) -> None:
    from aqdetr_jax.finetune import finetune

    finetune(
        arguments.data,
        arguments.workdir or f"runs/finetune-{Path(arguments.data).resolve().name}",
        family=arguments.model,
        source=arguments.source or "",
        baseline=arguments.baseline,
        effort=arguments.effort,
        overrides=overrides,
    )


def _prepare(arguments, overrides) -> None:
    from aqdetr_jax.data.coco_writer import write_coco_folder
    from aqdetr_jax.data.open import find_places, open_dataset
    from aqdetr_jax.data.tfds_builder import prepare

    data = _experiment(arguments, overrides).data
    places = find_places(data)
    if len({place.split for place in places}) < 2:
        raise ValueError(
            f"config.data.train_split and eval_split are both {places[0].split!r}: a prepared set "
            "needs two"
        )
    sets = {
        place.split: open_dataset(data, train=train)
        for train, place in zip((True, False), places, strict=True)
    }
    if arguments.format == "tfds":
        print(f"written to {prepare(sets, arguments.out)}")
    else:
        for dataset in sets.values():
            print(f"written to {write_coco_folder(dataset, arguments.out)}")


def _inspect(arguments, overrides) -> int:
    from aqdetr_jax.data.inspect import format_report, inspect_dataset
    from aqdetr_jax.data.open import open_dataset
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
        for path in write_contact_sheets(arguments.pictures, sets, seed=config.seed):
            print(f"written to {path}")
    reasons = reasons_to_stop(config, train, evaluation, reports)
    for reason in reasons:
        print(f"training would stop: {reason}")
    return int(bool(reasons))


def _plan(arguments, overrides) -> int:
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


def _complexity(arguments, overrides) -> None:
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


def _sensitivity(arguments, overrides) -> None:
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
    )
    print(as_text(result))
    report_sensitivity(result, arguments.out)


def _config(arguments, overrides) -> None:
    from aqdetr_jax.config_types import from_dataclass

    print(json.dumps(from_dataclass(_experiment(arguments, overrides)), indent=2))
