"""The command ``aqdetr``: its words; what each verb does is in ``verbs``."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from aqdetr_jax import host
from aqdetr_jax.training.arguments import parse_arguments
from aqdetr_jax.verbs import data, models, runs

EXIT_STOPPED = 75
"""Exit status of a run that was asked to stop and saved its state (EX_TEMPFAIL: try again)."""


def entry_point() -> None:
    """Console script."""
    host.print_any_name()
    arguments, overrides = parse_arguments(_parser(), sys.argv[1:])
    if arguments.computes:
        host.prepare()
    sys.exit(_run(arguments, overrides, leave=True))


def main(argv: Sequence[str]) -> int:
    """Runs one verb.

    Args:
      argv: arguments without the program's name.

    Returns:
      Exit status: 0, 1 for bad input (one line on stderr says what), 75 for a run that was asked
      to stop and can go on, 76 for one that another process left alone, or that hung, and that can
      go on.
    """
    return _run(*parse_arguments(_parser(), argv))


def _run(arguments: argparse.Namespace, overrides: Sequence[str], *, leave: bool = False) -> int:
    """Runs a verb; with ``leave``, one process of several that fails ends here."""
    try:
        return arguments.run(arguments, overrides) or 0
    except host.StoppedError as stop:
        print(f"aqdetr: {stop}", file=sys.stderr)
        return EXIT_STOPPED
    except host.ElsewhereError:  # one line, on one host
        status, reason = 1, ""
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if arguments.traceback:
            if not leave:
                raise
            traceback.print_exc()
        print(f"aqdetr: {type(error).__name__}: {error}", file=sys.stderr)
        if not arguments.traceback:
            print("(--traceback shows where this came from)", file=sys.stderr)
        lost = isinstance(error, host.LostError)
        status = host.EXIT_LOST if lost else 1
        reason = "" if lost else f"{type(error).__name__}: {error}"
    if leave and "jax" in sys.modules:
        from aqdetr_jax.parallel.watch import leave_others

        leave_others(status, reason)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aqdetr",
        description="Low-bit detection transformers: train, evaluate, predict.",
        epilog="Verbs that take --config, and quickstart and finetune, take overrides of the "
        "configuration: a.b=value, --config.a.b=value or --config.a.b value, any number of them. "
        "Options and arguments take their words first: the value of --workdir lr=1e-3 is none.",
    )
    commands = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name, run, text, *, config=False, workdir=False, computes=True, overrides=False):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run, overrides=config or overrides, computes=computes)
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        if config:
            sub.add_argument("--config", required=True, metavar="configs/NAME.py")
        if workdir:
            sub.add_argument("--workdir", required=True, metavar="DIR")
        return sub

    verb("train", runs.train, "train, evaluate and report one run", config=True, workdir=True)
    verb("pretrain", runs.pretrain, "dense pretraining of a backbone", config=True, workdir=True)
    text = "do a run again from its manifest, and compare"
    sub = verb("rerun", runs.rerun, text, workdir=True)
    sub.add_argument("manifest", metavar="MANIFEST", help="a run's manifest.json, or its folder")
    text = "take the step again that ended a run for values that are not finite"
    sub = verb("replay", runs.replay, text)
    sub.add_argument("dump", metavar="DUMP", help="WORKDIR/dumps/step_N")
    sub = verb("eval", models.evaluate, "COCO numbers of a model", config=True)
    anything = "a run, its model folder, a packed model"
    sub.add_argument("--model", required=True, metavar="DIR", help=anything)
    sub.add_argument("--out", metavar="DIR", help="where results.json and detections.json go")
    text = "a float model at few bits by calibration alone, and its COCO numbers"
    sub = verb("ptq", models.ptq, text, config=True)
    sub.add_argument("--out", required=True, metavar="DIR", help="where model and results go")
    sub = verb("predict", models.predict, "detect on images")
    sub.add_argument("images", nargs="+", metavar="IMAGE")
    sub.add_argument("--model", metavar="DIR", help=anything)
    sub.add_argument("--out", default="predictions", metavar="DIR")
    sub.add_argument("--threshold", type=float, default=0.5)
    sub.add_argument("--max-pixels", type=int, metavar="N", help="refuse larger images")
    sub = verb("convert", models.convert, "a published checkpoint becomes a model folder")
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
    sub = verb(
        "export", models.export, "a model for devices, or for another library", overrides=True
    )
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
    sub.add_argument("--images", type=int, metavar="N", help="of those, the first N (200)")
    sub.add_argument("--batch", type=int, metavar="N", help="onnx: images at once (1)")
    sub.add_argument(
        "--activations",
        choices=("uint8", "int8"),
        help="onnx: uint8 (x86), int8 (ARM)",
    )
    sub.add_argument("--chip", metavar="v5e", help="stablehlo: the kind of TPU it is fastest on")
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
    sub = verb("benchmark", models.benchmark, text, computes=False)
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
    sub.add_argument("--json", metavar="FILE", help="where rows and raw figures go")
    text = "a float detector becomes a 4-bit one, in minutes"
    sub = verb("quickstart", runs.quickstart, text, overrides=True)
    sub.add_argument("--workdir", default="runs/quickstart", metavar="DIR")
    sub.add_argument("--model", choices=("detr", "deformable"), default="detr")
    sub.add_argument("--from-scratch", action="store_true", help="train the float teacher too")
    sub.add_argument("--baseline", action="store_true", help="also train plain LSQ as long")
    text = "a folder of your own images becomes a low-bit detector"
    sub = verb("finetune", runs.finetune, text, overrides=True)
    sub.add_argument("data", metavar="DIR", help="COCO, Roboflow, Pascal VOC, YOLO or prepared")
    sub.add_argument("--workdir", metavar="DIR", help="default: runs/finetune-NAME")
    sub.add_argument("--model", choices=("detr", "deformable"), help="default: deformable")
    sub.add_argument("--from", dest="source", metavar="DIR", help="a float model to start from")
    sub.add_argument("--baseline", action="store_true", help="also train plain LSQ as long")
    sub.add_argument(
        "--effort", type=float, default=1.0, metavar="X", help="length of every stage, 1 = recipe"
    )
    sub = verb(
        "prepare-data", data.prepare, "write a data set as TFDS or COCO folder", overrides=True
    )
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="configs/NAME.py", help="whose data are written")
    what.add_argument(
        "--set", choices=("coco2017", "voc0712"), help="a published set, see --manual"
    )
    sub.add_argument(
        "--manual", metavar="DIR", help="of --set: folder with its archives, or unpacked"
    )
    sub.add_argument(
        "--partial", action="store_true", help="of --set: accept other numbers of images"
    )
    sub.add_argument("--format", choices=("tfds", "coco"), default="tfds")
    sub.add_argument("--out", required=True, metavar="DIR")
    sub = verb("inspect-data", data.inspect, "check a data set before training", config=True)
    sub.add_argument(
        "--pictures",
        metavar="FILE.png|DIR",
        help="draw images with their boxes, those with problems first: one picture, or one a set",
    )
    sub = verb(
        "plan", runs.plan, "what a slice of TPUs gives, without a TPU", config=True, computes=False
    )
    sub.add_argument("--topology", required=True, metavar="v5e:16x16", help="the slice")
    sub.add_argument("--per_chip", type=int, metavar="N", help="images a chip in a step")
    sub.add_argument("--bucket", metavar="HxW", help="of the images; default: every bucket")
    sub.add_argument("--kind", choices=("train", "eval", "both"), default="both")
    sub.add_argument("--images", type=int, metavar="N", help="size of the training set")
    sub.add_argument("--fast", action="store_true", help="stop before code is generated")
    sub.add_argument("--search", action="store_true", help="find the largest batch that fits")
    sub.add_argument("--out", metavar="FILE.json", help="where the plan is written too")
    text = "parameters, multiply-adds, bits, and bytes of the packed file"
    sub = verb("complexity", models.complexity, text, computes=False)
    sub.set_defaults(overrides=True)
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="configs/NAME.py")
    what.add_argument("--model", metavar="DIR", help=anything)
    sub.add_argument("--height", type=int, metavar="N", help="of an image, pixels")
    sub.add_argument("--width", type=int, metavar="N", help="default: the largest in evaluation")
    sub.add_argument("--operations", action="store_true", help="list every operation too")
    sub.add_argument("--json", metavar="FILE", help="where all of it is written too")
    sub = verb(
        "sensitivity", models.sensitivity, "which operations can do with few bits", config=True
    )
    sub.add_argument("--model", required=True, metavar="DIR", help="the float model")
    sub.add_argument("--out", required=True, metavar="DIR", help="where measurements are kept")
    sub.add_argument("--images", type=int, default=200, metavar="N", help="of the evaluation set")
    sub.add_argument("--bits", default="8,4,3,2", metavar="8,4,3,2", help="to choose from")
    sub.add_argument(
        "--budget",
        metavar="900KiB|0.02AP",
        help="bytes of the packed model, or AP lost by calibration; default: the policy's bytes",
    )
    sub.add_argument(
        "--by", choices=("AP", "noise"), default="AP", help="what the choice keeps small"
    )
    verb("config", runs.config, "print a resolved configuration", config=True, computes=False)
    return parser
