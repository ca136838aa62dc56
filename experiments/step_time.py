"""Step time of the method's parts and of the model families, side by side in one process.

python experiments/step_time.py [--config=shapes_w4a4,shapes_w4a4:deformable-aqdetr] [--rounds=12]
    [--outside=PYTHON] [--out=FILE] [a.b=value ...]

Variants: float (no quantization), lsq (4-bit), auxiliary (+ auxiliary queries), aqdetr (+ teacher
and distillation); on CPUs the first and the last once more in the order that XLA takes unless told
otherwise (``assemble.LEAST_MEMORY``). They run in turn, round after round, on the same batch, so
that a drift of the machine's speed hits all alike; ratios are medians over rounds, to the same
model's float step and, where several configurations are given, to the first one's. Every step is
compiled over the mesh as the training loop does it. Shares of the whole step: the matcher (timed
alone on the same predictions), the teacher's forward pass (timed alone), and the quantizers (lsq
minus float).

On a CPU, "outside" holds our float steps and forward pass beside PyTorch's and ONNX Runtime's, in
processes of their own (``experiments/outside`` measures that alone); ``PYTHON`` has torch, by
default that of ``make test-parity``. Where it is missing, the file says why there are none.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from outside.compare import PARITY, compare
from outside.table import outside_table

from aqdetr_jax import host
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.data.pipeline import make_train_pipeline
from aqdetr_jax.io import write_json_atomic
from aqdetr_jax.losses.auxiliary import split_groups
from aqdetr_jax.losses.distillation import DistillationWeights
from aqdetr_jax.losses.matching import QuerySet, match_sets
from aqdetr_jax.losses.targets import Predictions, repeat_counts
from aqdetr_jax.models.detector import build_detector, example_input
from aqdetr_jax.parallel.mesh import make_mesh, put_batch, replicated
from aqdetr_jax.provenance import git_commit, package_versions
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.training import initial, setup, sizing
from aqdetr_jax.training.arguments import parse_arguments
from aqdetr_jax.training.assemble import TRAINED_KEYS, assemble, stand_in_teacher
from aqdetr_jax.training.experiment import load_experiment
from aqdetr_jax.training.state import TrainState
from aqdetr_jax.training.step import (
    targets_of,
)

VARIANTS = ("float", "lsq", "auxiliary", "aqdetr")
UNSCHEDULED = ", XLA's order"
"""What a variant's name ends in whose operations stand in the order of XLA's default for CPUs."""
XLA_ORDER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_DEFAULT"}
AS_IT_IS = "as it is"
"""The variant that leaves a configuration alone."""


def variant_config(base, name):
    """The experiment with parts of the method switched off."""
    if name == AS_IT_IS:
        return base
    name = name.removesuffix(UNSCHEDULED)
    model, distill = base.model, base.distill
    if name in ("float", "lsq"):
        model = dataclasses.replace(model, num_auxiliary=0, auxiliary_groups=1)
    if name != "aqdetr":
        distill = dataclasses.replace(distill, weights=DistillationWeights())
    quant = QuantConfig() if name == "float" else base.quant
    return dataclasses.replace(base, model=model, distill=distill, quant=quant)


def build(config, batch, batches, teacher_variables, mesh, compiler_options=None):
    """``compiled_step`` of a model that starts from calibrated random parameters."""
    module = setup.build_module(config)
    variables, _ = initial.initial_variables(config, module, None, batches)
    return compiled_step(config, variables, batch, teacher_variables, mesh, compiler_options)


def compiled_step(config, variables, batch, teacher_variables, mesh, compiler_options=None):
    """Compiled step, first state, seconds of compiling, bytes of temporaries."""
    assembly = assemble(config, variables, mesh)
    state = assembly.start(variables)
    step = assembly.step(setup.build_module(config), stand_in_teacher(config))
    start = time.perf_counter()
    lowered = step.lower(state, teacher_variables, batch)
    compiled = lowered.compile(compiler_options)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return compiled, state, seconds, memory.temp_size_in_bytes


def timed(function, *arguments) -> tuple[float, object]:
    """Seconds of one call that waits for its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start, result


class Bench:
    """The steps of one configuration, compiled, and what they took."""

    def __init__(
        self,
        name: str,
        overrides: tuple[str, ...],
        mesh: jax.sharding.Mesh,
        variants: tuple[str, ...],
    ):
        base = load_experiment(name, overrides)
        dataset = open_dataset(base.data, train=True)
        self.base = base = sizing.with_data(base, dataset)
        batches = make_train_pipeline(dataset, setup.pipeline_config(base, train=True))
        first = next(batches)
        self.batch = put_batch({k: first[k] for k in TRAINED_KEYS}, mesh)
        plain = dataclasses.replace(base.model, num_auxiliary=0, auxiliary_groups=1)
        self.teacher = build_detector(plain)
        self.teacher_variables = jax.jit(self.teacher.init, out_shardings=replicated(mesh))(
            jax.random.key(1), *example_input(base.data.buckets[0])
        )
        self.steps: dict[str, Any] = {}
        self.states: dict[str, TrainState] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        for variant in variants:
            config = variant_config(base, variant)
            compiled, state, seconds, temporary = build(
                config,
                self.batch,
                batches,
                self.teacher_variables,
                mesh,
                XLA_ORDER if variant.endswith(UNSCHEDULED) else None,
            )
            self.steps[variant], self.states[variant] = compiled, state
            self.rows[variant] = {
                "compile_seconds": round(seconds, 2),
                "temporary_bytes": int(temporary),
            }
            print(
                f"{base.name}, {variant}: compiled in {seconds:.1f} s, "
                f"temporaries {temporary / 2**20:.0f} MiB"
            )
        batches.close()
        self.parts = self._parts() if set(VARIANTS) <= set(variants) else {}
        self.seconds: dict[str, list[float]] = {key: [] for key in (*variants, *self.parts)}

    def _parts(self) -> dict[str, Callable[[], Any]]:
        """The matcher and the teacher alone, on the shapes that the whole step gives them."""
        config = variant_config(self.base, "aqdetr")
        module, state, batch = setup.build_module(config), self.states["aqdetr"], self.batch
        output = jax.jit(lambda v: module.apply(v, batch["images"], batch["mask"], auxiliary=True))(
            {"params": state.params, "batch_stats": state.batch_stats}
        )
        extra = Predictions(output.auxiliary_logits, output.auxiliary_boxes)
        matcher = matching_of(config, batch, Predictions(output.logits, output.boxes), extra)
        forward = jax.jit(lambda v, x, m: self.teacher.apply(v, x, m).encoder_attention)
        parts = {
            "matcher": matcher,
            "teacher": lambda: forward(self.teacher_variables, batch["images"], batch["mask"]),
        }
        for part in parts.values():
            jax.block_until_ready(part())
        return parts

    def round(self, keep: bool) -> None:
        """Every step and part once."""
        for name in self.steps:
            seconds, (self.states[name], _) = timed(
                self.steps[name], self.states[name], self.teacher_variables, self.batch
            )
            if keep:
                self.seconds[name].append(seconds)
        for name, part in self.parts.items():
            seconds, _ = timed(part)
            if keep:
                self.seconds[name].append(seconds)

    def result(self, reference: Bench) -> dict[str, Any]:
        """Medians, ratios to float and to the same variant of ``reference``, and shares."""
        median = {name: statistics.median(s) for name, s in self.seconds.items()}
        for name in self.steps:
            times = self.seconds[name]
            self.rows[name] |= {
                "seconds": [round(t, 4) for t in times],
                "median_seconds": round(median[name], 4),
                "ratio_to_float": round(ratio(times, self.seconds["float"]), 3),
                "ratio_to_first": round(ratio(times, reference.seconds[name]), 3),
            }
        whole = median["aqdetr"]
        shares = {
            "matcher": median["matcher"],
            "teacher": median["teacher"],
            "quantizers": median["lsq"] - median["float"],
        }
        return {
            "config": self.base.name,
            "batch": self.base.train.batch_size,
            "image": list(self.base.data.buckets[0]),
            "variants": self.rows,
            "share_of_whole_step": {k: round(v / whole, 4) for k, v in shares.items()},
        }


def matching_of(config, batch, found: Predictions, extra: Predictions | None) -> Callable[[], Any]:
    """The matcher alone on given predictions, as the step of a configuration calls it."""
    targets = targets_of(batch)
    sets = [QuerySet(found, repeat_counts(targets.valid, 1, config.model.num_queries)[0])]
    if extra is not None:
        groups = config.model.auxiliary_groups
        size = config.model.num_auxiliary // groups
        counts = repeat_counts(targets.valid, config.auxiliary.repeats, size)[0]
        sets += [QuerySet(part, counts) for part in split_groups(extra, groups)]
    matcher = jax.jit(lambda s, t: match_sets(s, t, config.loss))
    return lambda: matcher(sets, targets)


def ratio(times: list[float], others: list[float]) -> float:
    """Median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def main() -> None:
    """Measures and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(overrides=True)
    parser.add_argument("--config", default="shapes_w4a4,shapes_w4a4:deformable-aqdetr")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--outside", default=str(PARITY), metavar="PYTHON")
    parser.add_argument("--out", default="experiments/results/step_time.json")
    options, overrides = parse_arguments(parser, sys.argv[1:])
    names = options.config.split(",")
    mesh = make_mesh(batch_size=load_experiment(names[0], overrides).train.batch_size)
    jax.set_mesh(mesh)
    # Time does not depend on the weights: every model starts from random ones.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    again = tuple(f"{name}{UNSCHEDULED}" for name in ("float", "aqdetr")) if on_cpu else ()
    given = ("init_from=unused", *overrides)
    benches = [Bench(name, given, mesh, (*VARIANTS, *again)) for name in names]
    for number in range(options.rounds + 2):  # the first two rounds warm up
        for bench in benches:
            bench.round(keep=number >= 2)
    result = {
        "commit": git_commit(),
        "device": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "versions": package_versions(),
        "rounds": options.rounds,
        "configs": [bench.result(benches[0]) for bench in benches],
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if on_cpu:
        del benches  # the memory is the other processes' now
        jax.clear_caches()
        result["outside"] = {"commit": result["commit"], **compare(options.outside)}
        print(*outside_table(result["outside"]), sep="\n")
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(options.out, result)
    for found in result["configs"]:
        print(found["config"])
        for name, row in found["variants"].items():
            print(
                f"{name:20s} {row['median_seconds'] * 1e3:8.1f} ms  x{row['ratio_to_float']:.2f}  "
                f"x{row['ratio_to_first']:.2f} of {result['configs'][0]['config']}"
            )
        print(found["share_of_whole_step"])


if __name__ == "__main__":
    host.prepare(compilation_cache=False)
    main()
