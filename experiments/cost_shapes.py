"""What each method costs in training, relative to the float step, and what is left at inference.

python experiments/cost_shapes.py [--rounds=12] [--families=detr,deformable] [--out=FILE]
    [a.b=value ...]

The steps of all methods of a family, with their teachers, are compiled in one process and taken in
turn, round after round, on the same batch, so that a drift of the machine's speed hits all alike;
ratios are medians over rounds of the ratio to that round's float step. Memory is what the compiler
says that the step's program takes: its arguments, results and temporaries. The models that these
steps leave are then exported to ONNX: nodes, parameters (elements of the initializers) and bytes of
each; AQ-DETR's nodes and parameters must be LSQ's, for auxiliary queries and teacher are of
training only.

Needs a quiet machine and ``aqdetr-jax[onnx]``. Configurations are the quickstart's.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
from results_files import RESULTS
from shapes_rows import FAMILIES
from step_time import ratio, timed

from aqdetr_jax import host
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.data.pipeline import make_train_pipeline
from aqdetr_jax.deploy.export import deployed_bundle
from aqdetr_jax.deploy.onnx.folder import OnnxOptions
from aqdetr_jax.deploy.onnx.model import onnx_model
from aqdetr_jax.io import write_json_atomic
from aqdetr_jax.models.detector import example_input
from aqdetr_jax.parallel.compiled import needed_bytes
from aqdetr_jax.parallel.mesh import make_mesh, put_batch, replicated
from aqdetr_jax.provenance import git_commit, package_versions
from aqdetr_jax.training import initial, setup, sizing
from aqdetr_jax.training.arguments import parse_arguments
from aqdetr_jax.training.assemble import TRAINED_KEYS, assemble, stand_in_teacher
from aqdetr_jax.training.bundles import run_bundle
from aqdetr_jax.training.experiment import load_experiment

METHODS = ("float", "lsq", "lsq_plus", "qdetr", "auxiliary", "distill", "aqdetr")
SAME_GRAPH = ("lsq", "auxiliary", "distill", "aqdetr")
"""Methods that differ in training only."""
WARM_UP = 2


class Method:
    """The training step of one method, compiled, and what it took."""

    def __init__(self, family: str, name: str, overrides: tuple[str, ...], mesh: Any):
        variant = f"{FAMILIES[family]}{'lsq' if name == 'float' else name}"
        # Time does not depend on the weights: every model starts from random ones.
        words = ["init_from=unused", *overrides]
        if name == "float":
            words = [word for word in words if not word.startswith("quant.")]
            words.append("quant.policy=float")
        config = load_experiment(f"configs/shapes_quickstart.py:{variant}", tuple(words))
        self.data = open_dataset(config.data, train=True)
        self.config = config = sizing.with_data(config, self.data)
        module, teacher = setup.build_module(config), stand_in_teacher(config)
        batches = make_train_pipeline(self.data, setup.pipeline_config(config, train=True))
        with contextlib.closing(batches):
            first = next(batches)
            variables, _ = initial.initial_variables(config, module, None, batches)
        self._batch = put_batch({key: first[key] for key in TRAINED_KEYS}, mesh)
        self._teacher: Any = {}
        if teacher is not None:
            self._teacher = jax.jit(teacher.init, out_shardings=replicated(mesh))(
                jax.random.key(1), *example_input(config.data.buckets[0])
            )
        assembly = assemble(config, variables, mesh)
        self.state = assembly.start(variables)
        step = assembly.step(module, teacher)
        seconds, self._step = timed(
            lambda: step.lower(self.state, self._teacher, self._batch).compile()
        )
        self.seconds: list[float] = []
        self.row: dict[str, Any] = {
            "compile_seconds": round(seconds, 2),
            "step_bytes": needed_bytes(self._step),
            "teacher": teacher is not None,
            "auxiliary": config.model.num_auxiliary,
        }

    def take_step(self, keep: bool) -> None:
        """One step, timed."""
        seconds, (self.state, _) = timed(self._step, self.state, self._teacher, self._batch)
        if keep:
            self.seconds.append(seconds)

    def exported(self) -> dict[str, Any]:
        """Size of the ONNX graph of the model as it is now."""
        variables = jax.device_get(self.state.evaluated)
        bundle = run_bundle(self.config, self.data, self.data, variables, None)
        options = vars(OnnxOptions())
        made = onnx_model(deployed_bundle(bundle), size=bundle.input.buckets[0], **options)
        kinds = sorted({node.op_type for node in made.graph.node})
        sizes = {x.name: math.prod(x.dims) for x in made.graph.initializer}
        uses = [name for node in made.graph.node for name in node.input if name in sizes]
        return {
            "nodes": len(made.graph.node),
            "kinds": {kind: sum(n.op_type == kind for n in made.graph.node) for kind in kinds},
            # Of each use: constants that happen to be equal are kept once.
            "parameters": sum(sizes[name] for name in uses),
            # Not of the file, whose text beside the network says grids' steps in decimal digits.
            "bytes": made.graph.ByteSize(),
        }


def measured(family: str, rounds: int, overrides: tuple[str, ...], mesh: Any) -> dict[str, Any]:
    """All methods of a family."""
    methods: dict[str, Method] = {}
    for name in METHODS:
        methods[name] = made = Method(family, name, overrides, mesh)
        print(f"{family}, {name}: compiled in {made.row['compile_seconds']} s", flush=True)
    for number in range(rounds + WARM_UP):
        for method in methods.values():
            method.take_step(keep=number >= WARM_UP)
    reference = methods["float"]
    for method in methods.values():
        method.row |= {
            "seconds": [round(t, 4) for t in method.seconds],
            "median_seconds": round(statistics.median(method.seconds), 4),
            "time_of_float": round(ratio(method.seconds, reference.seconds), 3),
            "memory_of_float": round(method.row["step_bytes"] / reference.row["step_bytes"], 3),
        }
    for method in methods.values():
        method.row["onnx"] = method.exported()
    graphs = [
        {key: methods[name].row["onnx"][key] for key in ("kinds", "parameters")}
        for name in SAME_GRAPH
    ]
    found = {
        "config": f"configs/shapes_quickstart.py:{FAMILIES[family]}METHOD",
        "batch": reference.config.train.batch_size,
        "image": list(reference.config.data.buckets[0]),
        "methods": {name: method.row for name, method in methods.items()},
        "same_graph": {"methods": SAME_GRAPH, "equal": all(g == graphs[0] for g in graphs)},
    }
    for name, method in methods.items():
        row = method.row
        print(
            f"{family:10s} {name:10s} {1e3 * row['median_seconds']:8.1f} ms  "
            f"x{row['time_of_float']:.2f}  {row['step_bytes'] / 2**20:6.0f} MiB  "
            f"x{row['memory_of_float']:.2f}  ONNX: {row['onnx']['nodes']} nodes, "
            f"{row['onnx']['parameters']} parameters, {row['onnx']['bytes']} bytes",
            flush=True,
        )
    return found


def main() -> None:
    """Measures and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(overrides=True)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--out", type=Path, default=RESULTS / "cost_shapes.json")
    options, overrides = parse_arguments(parser, sys.argv[1:])
    config = load_experiment("configs/shapes_quickstart.py:lsq", tuple(overrides))
    mesh = make_mesh(batch_size=config.train.batch_size)
    with jax.set_mesh(mesh):
        found = {
            family: measured(family, options.rounds, tuple(overrides), mesh)
            for family in options.families.split(",")
        }
    words = " ".join([f"--rounds={options.rounds}", *overrides])
    content = {
        "command": f"python experiments/cost_shapes.py {words}",
        "commit": git_commit(),
        "device": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "versions": package_versions(),
        "families": found,
    }
    write_json_atomic(options.out, content)
    unequal = [family for family in found if not found[family]["same_graph"]["equal"]]
    if unequal:
        raise SystemExit(f"the exported graphs of {', '.join(SAME_GRAPH)} differ: {unequal}")


if __name__ == "__main__":
    host.prepare(compilation_cache=False)
    main()
