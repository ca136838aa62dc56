"""Step time of the method's parts, side by side in one process.

python experiments/step_time.py [--config=shapes_w4a4] [--rounds=12] [--out=FILE] [a.b=value ...]

Variants: float (no quantization), lsq (4-bit), auxiliary (+ auxiliary queries), aqdetr (+ teacher
and distillation). They run in turn, round after round, on the same batch, so that a drift of the
machine's speed hits all alike; ratios are medians over rounds. Every step is compiled over the mesh
as the training loop does it. Shares of the whole step: the
matcher (timed alone on the same predictions), the teacher's forward pass (timed alone), and the
quantizers (lsq minus float).
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import statistics
import sys
import time
from pathlib import Path

import jax

from aqdetr_jax import host
from aqdetr_jax.data.pipeline import make_train_pipeline
from aqdetr_jax.io import write_json_atomic
from aqdetr_jax.losses.auxiliary import split_groups
from aqdetr_jax.losses.distillation import DistillationWeights
from aqdetr_jax.losses.matching import QuerySet, match_sets
from aqdetr_jax.losses.targets import Predictions, repeat_counts
from aqdetr_jax.models.detector import build_detector
from aqdetr_jax.training import initial, setup
from aqdetr_jax.training import optimizer as optim
from aqdetr_jax.training.config import QuantConfig, load_experiment
from aqdetr_jax.training.config_tools import split_overrides
from aqdetr_jax.training.loop import TRAINED_KEYS
from aqdetr_jax.training.sharding import make_mesh, put_batch, replicated
from aqdetr_jax.training.state import TrainState
from aqdetr_jax.training.step import (
    detection_loss_fn,
    jit_train_step,
    make_train_step,
    targets_of,
)
from aqdetr_jax.training.workdir import git_commit, package_versions

VARIANTS = ("float", "lsq", "auxiliary", "aqdetr")


def variant_config(base, name):
    """The experiment with parts of the method switched off."""
    model, distill = base.model, base.distill
    if name in ("float", "lsq"):
        model = dataclasses.replace(model, num_auxiliary=0, auxiliary_groups=1)
    if name != "aqdetr":
        distill = dataclasses.replace(distill, weights=DistillationWeights())
    quant = QuantConfig() if name == "float" else base.quant
    return dataclasses.replace(base, model=model, distill=distill, quant=quant)


def build(config, batch, batches, teacher_variables, mesh):
    """Compiled step, first state, and what compiling took."""
    module = setup.build_module(config)
    variables, _ = initial.initial_variables(config, module, None, batches)
    arguments = (variables["params"], config.optimizer)
    optimizer = optim.make_optimizer(*arguments, config.train.steps, frozen_norms=True)
    groups = optim.parameter_groups(*arguments, frozen_norms=True)
    create = jax.jit(
        lambda p, s: TrainState.create(p, s, optimizer, ema=config.optimizer.ema > 0),
        out_shardings=replicated(mesh),
    )
    state = create(variables["params"], variables["batch_stats"])
    teacher = build_detector(config.model) if config.distill.weights.active else None
    step = make_train_step(config, detection_loss_fn(config, module, teacher), optimizer, groups)
    start = time.perf_counter()
    compiled = jit_train_step(step, state, mesh).lower(state, teacher_variables, batch).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return compiled, state, module, seconds, memory.temp_size_in_bytes


def timed(function, *arguments) -> tuple[float, object]:
    """Seconds of one call that waits for its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start, result


def main() -> None:
    """Measures and writes the JSON file."""
    overrides, rest = split_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="shapes_w4a4")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", default="experiments/results/step_time.json")
    options = parser.parse_args(rest)
    base = load_experiment(options.config, tuple(overrides))
    dataset = setup.open_dataset(base.data, train=True)
    base = setup.with_data(base, dataset)
    batches = make_train_pipeline(dataset, setup.pipeline_config(base, train=True))
    first = next(batches)
    mesh = make_mesh(batch_size=base.train.batch_size)
    jax.set_mesh(mesh)
    batch = put_batch({k: first[k] for k in TRAINED_KEYS}, mesh)

    teacher = build_detector(dataclasses.replace(base.model, num_auxiliary=0, auxiliary_groups=1))
    images, mask = setup.example_input(base.data.buckets[0])
    teacher_variables = jax.jit(teacher.init, out_shardings=replicated(mesh))(
        jax.random.key(1), images, mask
    )

    rows, runs = {}, {}
    for name in VARIANTS:
        config = variant_config(base, name)
        compiled, state, module, seconds, temporary = build(
            config, batch, batches, teacher_variables, mesh
        )
        runs[name] = [compiled, state, []]
        rows[name] = {"compile_seconds": round(seconds, 2), "temporary_bytes": int(temporary)}
        print(f"{name}: compiled in {seconds:.1f} s, temporaries {temporary / 2**20:.0f} MiB")

    # The matcher and the teacher alone, on the shapes that the whole step gives them.
    config = variant_config(base, "aqdetr")
    module = setup.build_module(config)
    variables = {
        "params": runs["aqdetr"][1].params,
        "batch_stats": runs["aqdetr"][1].batch_stats,
    }
    output = jax.jit(lambda v: module.apply(v, batch["images"], batch["mask"], auxiliary=True))(
        variables
    )
    targets = targets_of(batch)
    sets = [
        QuerySet(
            Predictions(output.logits, output.boxes),
            repeat_counts(targets.valid, 1, config.model.num_queries)[0],
        )
    ]
    extra = Predictions(output.auxiliary_logits, output.auxiliary_boxes)
    size = config.model.num_auxiliary // config.model.auxiliary_groups
    counts = repeat_counts(targets.valid, config.auxiliary.repeats, size)[0]
    sets += [QuerySet(part, counts) for part in split_groups(extra, config.model.auxiliary_groups)]
    matcher = jax.jit(lambda s, t: match_sets(s, t, config.loss))
    forward = jax.jit(lambda v, x, m: teacher.apply(v, x, m).encoder_attention)
    parts = {"matcher": [], "teacher": []}
    timed(matcher, sets, targets)
    timed(forward, teacher_variables, batch["images"], batch["mask"])

    for number in range(options.rounds + 2):  # the first two rounds warm up
        for name in VARIANTS:
            run = runs[name]
            seconds, (run[1], _) = timed(run[0], run[1], teacher_variables, batch)
            if number >= 2:
                run[2].append(seconds)
        for name, seconds in (
            ("matcher", timed(matcher, sets, targets)[0]),
            ("teacher", timed(forward, teacher_variables, batch["images"], batch["mask"])[0]),
        ):
            if number >= 2:
                parts[name].append(seconds)

    plain = runs["float"][2]
    for name in VARIANTS:
        times = runs[name][2]
        ratios = [a / b for a, b in zip(times, plain, strict=True)]
        rows[name] |= {
            "seconds": [round(t, 4) for t in times],
            "median_seconds": round(statistics.median(times), 4),
            "ratio_to_float": round(statistics.median(ratios), 3),
        }
    whole = rows["aqdetr"]["median_seconds"]
    quantizers = rows["lsq"]["median_seconds"] - rows["float"]["median_seconds"]
    result = {
        "config": base.name,
        "batch": base.train.batch_size,
        "image": list(base.data.buckets[0]),
        "commit": git_commit(),
        "device": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "versions": package_versions(),
        "rounds": options.rounds,
        "variants": rows,
        "share_of_whole_step": {
            "matcher": round(statistics.median(parts["matcher"]) / whole, 4),
            "teacher": round(statistics.median(parts["teacher"]) / whole, 4),
            "quantizers": round(quantizers / whole, 4),
        },
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(options.out, result)
    for name in VARIANTS:
        row = rows[name]
        print(f"{name:10s} {row['median_seconds'] * 1e3:8.1f} ms  x{row['ratio_to_float']:.2f}")
    print(result["share_of_whole_step"])


if __name__ == "__main__":
    host.prepare(compilation_cache=False)
    main()
