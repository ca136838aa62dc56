"""One training step of ours on the device at hand: one row of ``accelerator_run.sh``'s steps.json.

python experiments/accelerator_ours.py --family=detr --variant=lsq --out=FILE [--dtype=bfloat16]
    [--batch=8] [--lock=FILE] [--deadline=SECONDS] [--toy] [a.b=value ...]

Variants: "float recipe" (stem and first stage frozen, as in the official float recipe and in
transformers), "float" (everything trained, as at low bits), "lsq" (4 bits) and "everything" (4 bits
with auxiliary queries, teacher and distillation), all of ``configs/coco.py`` and
``configs/coco_deformable.py``. Random parameters, random pixels that lie on the device, seven boxes
an image. The matcher is timed alone on random predictions: independent of each other, and almost
the same for all queries, as those of an untrained model are.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_rows import Device, add_row, say, timed_rounds, timing
from flax import traverse_util
from full_size_step import RECIPE_FROZEN, random_batch
from step_time import compiled_step, matching_of, variant_config

from aqdetr_jax import host
from aqdetr_jax.losses.targets import Predictions
from aqdetr_jax.models.detector import build_detector, example_input
from aqdetr_jax.parallel.mesh import make_mesh, put_batch, replicated
from aqdetr_jax.provenance import git_commit, package_versions
from aqdetr_jax.training import optimizer as optim
from aqdetr_jax.training import setup
from aqdetr_jax.training.arguments import parse_arguments
from aqdetr_jax.training.assemble import TRAINED_KEYS
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.experiment import load_experiment

CONFIGS = {"detr": "coco:r50,w4a4", "deformable": "coco_deformable:r50,w4a4"}
MEMORY = {
    "detr": ("model.remat=False",),
    # "auto" would trace every way of sampling.
    "deformable": ("model.remat=samples", "model.deformable.sampling=gather"),
}
"""What fits a device's memory is not computed twice."""
VARIANTS = {"float recipe": "float", "float": "float", "lsq": "lsq", "everything": "aqdetr"}
TOY = (
    "model.backbone.depths=(1,1,1,1)",
    "model.encoder_layers=1",
    "model.decoder_layers=2",
    "model.num_queries=20",
    "model.num_auxiliary=40",
)


def experiment(
    family: str, variant: str, dtype: str, overrides: tuple[str, ...]
) -> ExperimentConfig:
    """The configuration of a row; a batch of it needs no data set."""
    given = ("model.num_classes=91", f"model.dtype={dtype}", *MEMORY[family], *overrides)
    config = variant_config(load_experiment(CONFIGS[family], given), VARIANTS[variant])
    frozen = RECIPE_FROZEN if variant == "float recipe" else ()
    return dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, frozen=frozen)
    )


def random_variables(module, example) -> dict[str, Any]:
    """Random values for every variable, made on the host: a device compiles init for a minute."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *example)
    rng = np.random.default_rng(0)

    def one(path: tuple[str, ...], leaf) -> np.ndarray:
        name, fan_in = path[-1], math.prod(leaf.shape[:-1])
        if name == "kernel":
            return rng.normal(0, fan_in**-0.5, leaf.shape).astype(np.float32)
        if name == "kernel_step":  # LSQ's start on the signed 4-bit grid
            kernel = flat[(*path[:-1], "kernel")].shape
            value = 2 * 0.8 * math.prod(kernel[:-1]) ** -0.5 / math.sqrt(7)
        elif name == "probs_step":
            value = 0.02
        elif name.endswith("_step"):
            value = 0.4
        else:
            value = float(name in ("var", "scale") or name.endswith("_scale"))
        if name == "bias" and path[-2] == "sampling_offsets":
            return rng.normal(0, 2, leaf.shape).astype(np.float32)
        if name == "embedding" or (value == 0 and name not in ("bias", "mean")):
            return rng.normal(0, 1, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, value, np.float32)

    flat = traverse_util.flatten_dict(dict(shapes))
    return traverse_util.unflatten_dict({path: one(path, leaf) for path, leaf in flat.items()})


def random_predictions(shapes: Predictions, spread: float) -> Predictions:
    """Scores and boxes of all queries, ``spread`` apart from a common value."""
    rng = np.random.default_rng(0)

    def values(shape):
        common = rng.normal(size=(*shape[:2], 1, shape[3]))
        return (common + spread * rng.normal(size=shape)).astype(np.float32)

    boxes = 1 / (1 + np.exp(-values(shapes.boxes.shape)))
    return Predictions(jnp.asarray(values(shapes.logits.shape)), jnp.asarray(boxes))


def matchers(config, module, params, batch) -> dict[str, Callable[[], Any]]:
    """The matcher alone, compiled."""
    extra = config.model.num_auxiliary > 0
    call = functools.partial(module.apply, auxiliary=extra)
    output = jax.eval_shape(call, params, batch["images"], batch["mask"])
    found = {}
    for name, spread in (("independent", 1.0), ("alike", 0.01)):
        matcher = matching_of(
            config,
            batch,
            random_predictions(Predictions(output.logits, output.boxes), spread),
            random_predictions(Predictions(output.auxiliary_logits, output.auxiliary_boxes), spread)
            if extra
            else None,
        )
        jax.block_until_ready(matcher())
        found[name] = matcher
    return found


def measure(
    config: ExperimentConfig, row: dict[str, Any], options: argparse.Namespace, name: str
) -> None:
    """Compiles, waits for the device, measures, fills the row and writes it.

    Args:
      config: of the row, with one bucket.
      row: what is known of it already.
      options: of the command line.
      name: of the row.
    """
    (bucket,), batch_size = config.data.buckets, row["batch"]

    def late() -> None:
        add_row(options.out, name, {**row, "failed": f"not compiled in {options.deadline:.0f} s"})

    device = Device(options.lock, options.deadline)
    mesh = make_mesh(batch_size=batch_size)
    jax.set_mesh(mesh)
    with device.compiling(late):
        batch = random_batch(*bucket, batch_size, config.data.max_boxes, config.model.num_classes)
        batch = put_batch({key: batch[key] for key in TRAINED_KEYS}, mesh)
        example = example_input(bucket)
        module = setup.build_module(config)
        teacher = {}
        if config.distill.needs_teacher:
            plain = dataclasses.replace(config.model, num_auxiliary=0, auxiliary_groups=1)
            teacher = random_variables(build_detector(plain), example)
        variables = random_variables(module, example)
        row["trained_parameters"] = optim.count_trainable(
            variables["params"], config.optimizer, frozen_norms=True
        )
        teacher, variables = jax.device_put((teacher, variables), replicated(mesh))
        alone = matchers(config, module, variables, batch)
        say("compiles the step")
        compiled, state, seconds, _ = compiled_step(config, variables, batch, teacher, mesh)
        del variables
    say("has compiled")
    memory = compiled.memory_analysis()
    row["compile_seconds"] = round(seconds, 1)
    row["program_bytes"] = {
        part: int(getattr(memory, f"{part}_size_in_bytes"))
        for part in ("argument", "output", "alias", "temp")
    }
    with device.alone():

        def step():
            nonlocal state
            state, metrics = compiled(state, teacher, batch)
            return metrics

        losses = []

        def finish(metrics):
            losses.append(jax.block_until_ready(metrics)["loss"])

        row |= timing(timed_rounds(step, finish), batch_size)
        statistics_of = jax.devices()[0].memory_stats() or {}
        row["peak_bytes"] = int(statistics_of.get("peak_bytes_in_use", 0))
        values = [float(loss) for loss in jax.device_get(losses)]
        row["finite"] = bool(np.isfinite(values).all())
        row["losses"] = [str(round(x, 4)) for x in values]
        add_row(options.out, name, row)
        row["matcher"] = {
            name: round(statistics.median(timed_rounds(call, jax.block_until_ready)), 6)
            for name, call in alone.items()
        }
    add_row(options.out, name, row)


def main() -> None:
    """Compiles, waits for the device, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(overrides=True)
    parser.add_argument("--family", choices=CONFIGS, required=True)
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--label", default="", help="added to the row's name")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", required=True)
    parser.add_argument("--lock", default="runs/accelerator/device.lock")
    parser.add_argument("--deadline", type=float, default=600.0, help="seconds for compiling")
    parser.add_argument("--toy", action="store_true", help="a tiny model and image")
    options, overrides = parse_arguments(parser, sys.argv[1:])
    name = f"{options.family}/{options.variant}{options.label}"
    bucket, batch_size = ((64, 96), 2) if options.toy else ((800, 1344), options.batch)
    config = experiment(
        options.family,
        options.variant,
        options.dtype,
        (*(TOY if options.toy else ()), f"data.buckets=({bucket},)", *overrides),
    )
    row = {
        "config": config.name,
        "dtype": options.dtype,
        "batch": batch_size,
        "image": list(bucket),
        "targets": 7,
        "frozen": list(config.optimizer.frozen),
        "auxiliary_queries": config.model.num_auxiliary,
        "remat": config.model.remat,
        "overrides": overrides,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "device": jax.devices()[0].device_kind,
        "commit": git_commit(),
        "versions": package_versions(),
    }
    try:
        measure(config, row, options, name)
    except Exception as error:  # whatever compiler or device raise, the file says so
        row["failed"] = f"{type(error).__name__}: {str(error)[:600]}"
        add_row(options.out, name, row)
        raise
    print(f"{name}: {row['median_seconds'] * 1e3:.2f} ms, matcher {row['matcher']}")


if __name__ == "__main__":
    host.prepare()
    main()
