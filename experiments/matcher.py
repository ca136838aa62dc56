"""The matcher alone: iterations and CPU time beside SciPy, and what it costs on a v5e chip.

python experiments/matcher.py [--rounds=5] [--cases=shapes,detr,deformable] [--out=FILE]

Every case has the sizes of a configuration's matching problems (images of a chip, all decoder
layers, object and auxiliary queries) with few to very many boxes in the fullest image. Costs:
"trained", of predictions that lie around the boxes, several on each; "alike", of an untrained
model, whose queries predict nearly the same; "contested", random, with queries that are good for
every box. Columns are iterations (the largest problem's), CPU milliseconds of the loop and of SciPy
(all cores' time, the best round), and the largest relative difference of a problem's total cost.

With libtpu installed the kernel is compiled ahead of time for one v5e chip (no TPU is needed, and
nothing is timed on one): instruction bundles of an iteration, from the compiler's own schedule. Its
milliseconds are an estimate: at 1.5 GHz, with the waits for results across lanes, which the
schedule does not show, put at 12 in sequence of 128 cycles each.

Rows of other commits in the file are kept. Those of 5e4f429 are of the solver before the bids and
the kernel, timed in turn with the others; its chip's milliseconds are the iterations times XLA's
own estimate of the cycles of its loop's body.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from aqdetr_jax import host
from aqdetr_jax.io import read_json, write_json_atomic

Problem = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Cost [P, T, Q], columns wanted by each row [P, T], columns that exist [P]."""
Solver = Callable[..., Any]
"""Of a problem: the owner of each column [P, Q], and the number of iterations."""

CYCLES_PER_MS = 1.5e6
WAITS = 12 * 128
DUMP = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true"


class Case(NamedTuple):
    """Sizes of a training step's matching; ``boxes`` of the fullest image, one row for each."""

    images: int
    layers: int
    slots: int
    queries: int
    auxiliary: int
    repeats: int
    kind: str
    classes: int
    boxes: tuple[int, ...]


CASES = {
    "shapes": Case(16, 3, 12, 25, 50, 2, "softmax", 8, (3, 6, 12)),
    "detr": Case(4, 6, 100, 100, 300, 3, "softmax", 91, (7, 20, 63)),
    "deformable": Case(4, 6, 100, 300, 1500, 6, "focal", 91, (7, 20, 63)),
}
COSTS = ("trained", "alike", "contested")


def predictions(case: Case, kind: str, rng: np.random.Generator, boxes, labels, width: int):
    """Logits [L, width, C] and boxes [L, width, 4] for one image's objects."""
    count, shape = len(boxes), (case.layers, width)
    if kind == "alike":
        logits = rng.normal(size=case.classes) + 0.01 * rng.normal(size=(*shape, case.classes))
        return logits, np.clip(0.5 + 0.01 * rng.normal(size=(*shape, 4)), 0.01, 0.99)
    near = np.concatenate([np.arange(count), rng.integers(0, count, width)])[:width]
    size = np.concatenate([boxes[near, 2:], boxes[near, 2:]], -1)
    found = boxes[near] + 0.1 * size * rng.normal(size=(*shape, 4))
    logits = rng.normal(-3, 1, (*shape, case.classes))
    logits[:, np.arange(width), labels[near]] += rng.normal(3, 2, shape)
    return logits, np.clip(found, 0.01, 0.99)


def make(case: Case, kind: str, most: int) -> Problem:
    """The matching problems of a step, images first."""
    from aqdetr_jax.losses.criterion import LossWeights
    from aqdetr_jax.losses.matching import matching_cost
    from aqdetr_jax.losses.targets import Predictions, Targets

    rng = np.random.default_rng(0)
    weights = LossWeights(cls=2.0 if case.kind == "focal" else 1.0, kind=case.kind)
    sets = ((case.queries, 1), (case.auxiliary, case.repeats))
    widest = max(width for width, _ in sets)
    shape = (case.images, len(sets), case.layers, case.slots, widest)
    cost, wanted = np.zeros(shape, np.float32), np.zeros(shape[:-1], np.int32)
    count = np.broadcast_to(np.array([width for width, _ in sets])[:, None], shape[:3])
    for image in range(case.images):
        boxes_here = max(1, most - image * most // case.images)
        centres = rng.uniform(0.1, 0.9, (boxes_here, 2))
        boxes = np.concatenate([centres, rng.uniform(0.02, 0.3, (boxes_here, 2))], -1)
        labels = rng.integers(0, case.classes, boxes_here)
        for number, (width, repeats) in enumerate(sets):
            each = max(1, min(repeats, width // boxes_here))
            wanted[image, number, :, :boxes_here] = each
            if kind == "contested":
                there = (case.layers, boxes_here, width)
                values = rng.normal(size=there) + rng.normal(size=(case.layers, 1, width))
            else:
                logits, found = predictions(case, kind, rng, boxes, labels, width)
                one = Predictions(logits.astype(np.float32), found.astype(np.float32))
                targets = Targets(boxes.astype(np.float32), labels.astype(np.int32), labels >= 0)
                values = matching_cost(one, targets, weights)
            cost[image, number, :, :boxes_here, :width] = values
    problems = int(np.prod(shape[:3]))
    return (
        cost.reshape(problems, *shape[3:]),
        wanted.reshape(problems, -1),
        np.ascontiguousarray(count.reshape(problems), np.int32),
    )


def scipy_totals(problem: Problem) -> np.ndarray:
    """The least total cost of each problem, float64 [P]."""
    totals = []
    for cost, wanted, count in zip(*problem, strict=True):
        repeated = np.repeat(cost[:, :count], wanted, axis=0)
        totals.append(repeated[linear_sum_assignment(repeated)].sum(dtype=np.float64))
    return np.array(totals)


def totals_of(problem: Problem, owner: np.ndarray) -> np.ndarray:
    """The total cost of each problem as solved, float64 [P]."""
    cost = np.take_along_axis(problem[0], np.maximum(owner, 0)[:, None], axis=1)[:, 0]
    return np.where(owner >= 0, cost, 0).sum(axis=1, dtype=np.float64)


def measure(problem: Problem, solvers: dict[str, Solver], rounds: int) -> dict[str, dict[str, Any]]:
    """One row for each solver, timed in turn, round after round, and SciPy with them."""
    import jax

    def run(solver: Solver) -> None:
        jax.block_until_ready(solver(*problem))

    problem = tuple(jax.device_put(x) for x in problem)
    arrays = tuple(np.asarray(x) for x in problem)
    best = scipy_totals(arrays)
    found: dict[str, dict[str, Any]] = {}
    for name, solver in solvers.items():
        owner, iterations = solver(*problem)
        error = np.abs(totals_of(arrays, np.asarray(owner)) - best) / np.maximum(np.abs(best), 1)
        found[name] = {"iterations": int(iterations), "difference": float(f"{error.max():.1e}")}
    timed = {name: lambda solver=solver: run(solver) for name, solver in solvers.items()}
    timed["scipy"] = lambda: scipy_totals(arrays)
    least = dict.fromkeys(timed, float("inf"))
    for _ in range(rounds):
        for name, function in timed.items():
            begin, calls = time.process_time(), 0
            while calls == 0 or time.process_time() - begin < 0.1:
                function()
                calls += 1
            least[name] = min(least[name], (time.process_time() - begin) / calls)
    for name, row in found.items():
        row["cpu_ms"] = round(least[name] * 1e3, 3)
        row["scipy_cpu_ms"] = round(least["scipy"] * 1e3, 3)
    return found


def bundles_on_v5e(shape: tuple[int, ...], dump: Path) -> dict[str, int] | None:
    """The kernel of problems of this shape: its block, and instruction bundles an iteration."""
    if importlib.util.find_spec("libtpu") is None:
        return None
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from aqdetr_jax.ops import assignment_kernel

    topology = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1)
    )
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("data",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    given = [
        jax.ShapeDtypeStruct(size, dtype, sharding=whole)
        for size, dtype in ((shape, jnp.float32), (shape[:2], jnp.int32), (shape[:1], jnp.int32))
    ]
    block = assignment_kernel.block_of(shape)
    earlier = set(dump.iterdir())
    assignment_kernel.solve.lower(*given, block=block).compile()
    schedules = [
        path
        for path in set(dump.iterdir()) - earlier
        if re.search(r"assignment.*-final_bundles.txt$", path.name) and "analysis" not in path.name
    ]
    if len(schedules) != 1:
        raise RuntimeError(f"one schedule of the kernel was expected in {dump}, got {schedules}")
    return {"block": block, "bundles": loop_bundles(schedules[0].read_text())}


def loop_bundles(schedule: str) -> int:
    """Bundles of the innermost loop: from its header to its branch back."""
    header = None
    for line in schedule.splitlines():
        place = re.match(r"\s*(0x[0-9a-f]+)\s", line)
        if place and re.search(r"\bLB:", line):
            header = int(place[1], 16)
        elif place and header is not None and "sbr.rel (!" in line:
            return int(place[1], 16) - header + 1
    raise RuntimeError("the schedule has no loop")


def estimate(problem: Problem, chip: dict[str, int], solver: Solver) -> float:
    """Milliseconds of the kernel: block by block, each as long as its hardest problem."""
    size = chip["block"]
    problems = len(problem[0])
    padded = [np.pad(x, [(0, -problems % size)] + [(0, 0)] * (x.ndim - 1)) for x in problem]
    iterations = sum(
        int(solver(*(x[first : first + size] for x in padded))[1])
        for first in range(0, problems, size)
    )
    return round(iterations * (chip["bundles"] + WAITS) / CYCLES_PER_MS, 3)


def rows_of(name: str, solvers: dict[str, Solver], rounds: int, dump: Path) -> list[dict[str, Any]]:
    """All rows of a case; ``solvers`` by commit, the last one being the package's."""
    case, rows = CASES[name], []
    chip = None
    for boxes in case.boxes:
        for kind in COSTS:
            problem = make(case, kind, boxes)
            if chip is None and name != "shapes":
                chip = bundles_on_v5e(problem[0].shape, dump)
            for commit, row in measure(problem, solvers, rounds).items():
                head = {"case": name, "costs": kind, "boxes": boxes}
                size = {"problems": len(problem[0]), "columns": problem[0].shape[2]}
                rows.append(head | size | row | {"commit": commit})
            if chip is not None:
                rows[-1] |= {f"v5e_{key}": value for key, value in chip.items()}
                rows[-1]["v5e_ms_estimated"] = estimate(problem, chip, list(solvers.values())[-1])
            for row in rows[-len(solvers) :]:
                print(row, flush=True)
    return rows


def main(others: dict[str, Solver] | None = None) -> None:
    """Measures every case and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--out", default="experiments/results/matcher.json")
    options = parser.parse_args(sys.argv[1:])
    with tempfile.TemporaryDirectory() as dump:
        # libtpu reads it when it is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = DUMP.format(dump)
        import jax

        from aqdetr_jax.ops import assignment
        from aqdetr_jax.provenance import git_commit, package_versions

        solvers = {**(others or {}), git_commit(): jax.jit(assignment._loop)}
        kept = read_json(options.out)["rows"] if Path(options.out).is_file() else []
        results: dict[str, Any] = {"versions": package_versions(), "cores": os.cpu_count()}
        results["device"] = jax.devices()[0].device_kind
        results["rows"] = [row for row in kept if row["commit"] not in solvers]
        for name in options.cases.split(","):
            results["rows"] += rows_of(name, solvers, options.rounds, Path(dump))
            write_json_atomic(options.out, results)


if __name__ == "__main__":
    host.prepare(compilation_cache=False)  # what is compiled for a TPU cannot be read back here
    main()
