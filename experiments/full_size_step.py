"""One training step of a full-size DETR at low bits, with teacher and auxiliary queries, on CPU.

python experiments/full_size_step.py [--config=coco:r50,w4a4] [--out=FILE] [a.b=value ...]

Builds the model of a COCO configuration at 800 x 1333, calibrates on one random image, takes one
step on random pixels, and states parameters, seconds and memory. It shows that the thing fits and
runs, not that it learns.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import time

import jax
import numpy as np

from aqdetr_jax import host
from aqdetr_jax.io import write_json_atomic
from aqdetr_jax.models.detector import build_detector, example_input
from aqdetr_jax.parallel.mesh import make_mesh, replicated
from aqdetr_jax.provenance import git_commit, package_versions
from aqdetr_jax.training import initial, setup, sizing
from aqdetr_jax.training import optimizer as optim
from aqdetr_jax.training.arguments import parse_arguments
from aqdetr_jax.training.assemble import TRAINED_KEYS, assemble
from aqdetr_jax.training.experiment import load_experiment

RECIPE_FROZEN = ("backbone/stem", "backbone/layer1_")

SCHEDULE = 1000
"""Steps of the learning rate's schedule; what is timed does not depend on it."""


def random_batch(height: int, width: int, batch: int, boxes: int, classes: int) -> dict:
    """Random pixels and boxes."""
    rng = np.random.default_rng(0)
    centre = rng.uniform(0.2, 0.8, (batch, boxes, 2))
    size = rng.uniform(0.05, 0.4, (batch, boxes, 2))
    valid = np.zeros((batch, boxes), bool)
    valid[:, :7] = True
    return {
        "images": rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8),
        "mask": np.ones((batch, height, width), bool),
        "boxes": np.concatenate([centre, size], -1).astype(np.float32) * valid[..., None],
        "labels": (rng.integers(0, classes, (batch, boxes)) * valid).astype(np.int32),
        "valid": valid,
        "size": np.tile(np.int32([height, width]), (batch, 1)),
    }


def strayed(variables: dict) -> dict:
    """Away from the start, where all deformable attentions are the same: their kernels are zero."""
    flat, tree = jax.tree.flatten(variables["params"])
    keys = jax.random.split(jax.random.key(2), len(flat))
    flat = [x + 0.02 * jax.random.normal(key, x.shape) for x, key in zip(flat, keys, strict=True)]
    return {**variables, "params": jax.tree.unflatten(tree, flat)}


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Takes the step and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(overrides=True)
    parser.add_argument("--config", default="coco:r50,w4a4")
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1333)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", default="experiments/results/full_size_step.json")
    options, overrides = parse_arguments(parser, sys.argv[1:])
    # COCO's official head: 91 ids and "no object".
    config = load_experiment(options.config, ("model.num_classes=91", *overrides))
    config = sizing.with_devices(config, jax.devices()[0])
    bucket = (options.height, options.width)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, buckets=(bucket,), eval_buckets=()),
        quant=dataclasses.replace(config.quant, calibration_batches=1),
        train=dataclasses.replace(config.train, steps=SCHEDULE),
    )
    batch = random_batch(*bucket, options.batch, config.data.max_boxes, config.model.num_classes)

    start = time.perf_counter()
    module = setup.build_module(config)
    variables, _ = initial.initial_variables(config, module, None, iter([batch]))
    calibrated = time.perf_counter()
    batch = {key: batch[key] for key in TRAINED_KEYS}
    teacher = build_detector(dataclasses.replace(config.model, num_auxiliary=0))
    example = example_input(bucket)
    float_params = jax.eval_shape(teacher.init, jax.random.key(0), *example)["params"]
    recipe = dataclasses.replace(config.optimizer, frozen=RECIPE_FROZEN)
    trainable = optim.count_trainable(float_params, recipe, frozen_norms=True)
    teacher_variables = jax.jit(lambda: strayed(teacher.init(jax.random.key(1), *example)))()
    mesh = make_mesh(data=1)
    batch, teacher_variables = jax.device_put((batch, teacher_variables), replicated(mesh))
    assembly = assemble(config, variables, mesh)
    state = assembly.start(variables)
    compiling = time.perf_counter()
    compiled = assembly.step(module, teacher).lower(state, teacher_variables, batch).compile()
    compiled_at = time.perf_counter()
    state, metrics = jax.block_until_ready(compiled(state, teacher_variables, batch))
    done = time.perf_counter()
    result = {
        "config": config.name,
        "image": [options.height, options.width],
        "batch": options.batch,
        "remat": config.model.remat,
        "auxiliary_queries": config.model.num_auxiliary,
        "trainable_parameters_official_recipe": trainable,
        "seconds": {
            "initialise_and_calibrate": round(calibrated - start, 1),
            "compile": round(compiled_at - compiling, 1),
            "step": round(done - compiled_at, 1),
        },
        "temporary_bytes": int(compiled.memory_analysis().temp_size_in_bytes),
        "peak_resident_bytes": peak_bytes(),
        "metrics": {k: float(np.sum(v)) for k, v in jax.device_get(metrics).items()},
        "device": jax.devices()[0].device_kind,
        "commit": git_commit(),
        "versions": package_versions(),
    }
    write_json_atomic(options.out, result)
    print(f"{trainable:,} parameters trained in the official recipe")
    print(f"step {result['seconds']['step']} s, peak {peak_bytes() / 2**30:.1f} GiB resident")
    print({k: round(v, 4) for k, v in result["metrics"].items()})


if __name__ == "__main__":
    host.prepare(compilation_cache=False)
    main()
