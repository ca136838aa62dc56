"""Ways to sample for deformable attention: time and memory, side by side in one process.

python experiments/deformable_sampling.py [--rounds=7] [--out=FILE] [--cases=coco_encoder,...]

For every case (COCO's encoder and decoder at 800 x 1066, the embedded set's encoder) each way of
``ops.deformable`` samples and mixes the same random points, forward alone and forward plus
gradient, all heads at once and (as ``model.remat`` does) head by head, sampling again in the
backward pass; the ways run in turn, round after round, and ratios are of medians to the plain
gather's.
With torch installed (extra "parity"), transformers' own function runs in the same rounds. For TPUs
see ``deformable_tpu.py``.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from aqdetr_jax import host

COCO = ((100, 134), (50, 67), (25, 34), (13, 17))
METHODS = ("gather", "packed", "dense", "gather by head", "packed by head")


class Case(NamedTuple):
    """Sizes of one attention."""

    batch: int
    queries: int
    heads: int
    width: int
    points: int
    shapes: tuple[tuple[int, int], ...]


CASES = {
    "coco_encoder": Case(1, sum(h * w for h, w in COCO), 8, 32, 4, COCO),
    "coco_decoder": Case(1, 300, 8, 32, 4, COCO),
    "shapes_encoder": Case(16, 336, 4, 36, 4, ((16, 16), (8, 8), (4, 4))),
    "shapes_decoder": Case(16, 75, 4, 36, 4, ((16, 16), (8, 8), (4, 4))),
}
DENSE_LIMIT = 2**28
"""Weights of "dense" (batch x heads x queries x points x cells) beyond which it is not run."""


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Random values, locations around every query's own place, and weights."""
    rng = np.random.default_rng(0)
    cells = sum(h * w for h, w in case.shapes)
    b, q, m, levels, k = case.batch, case.queries, case.heads, len(case.shapes), case.points
    near = rng.uniform(size=(b, q, 1, 1, 1, 2)) + rng.normal(0, 0.05, (b, q, m, levels, k, 2))
    return {
        "values": rng.normal(size=(b, cells, m, case.width)).astype("f4"),
        "locations": near.astype("f4"),
        "weights": rng.dirichlet(np.ones(levels * k), (b, q, m))
        .reshape(b, q, m, levels, k)
        .astype("f4"),
        "cotangent": rng.normal(size=(b, q, m * case.width)).astype("f4"),
    }


def jax_functions(case: Case, method: str) -> dict[str, Any]:
    """Forward, and forward plus gradient of a random projection."""
    import jax
    import jax.numpy as jnp

    from aqdetr_jax.models.attention import merge_heads
    from aqdetr_jax.models.deformable_attention import head_by_head
    from aqdetr_jax.ops.deformable import deformable_attention, sample_values

    way, _, by_head = method.partition(" ")

    def forward(values, locations, weights):
        if not by_head:
            return deformable_attention(values, locations, weights, case.shapes, way)

        def mix(values, locations, weights, _):
            samples = sample_values(values, locations, case.shapes, way)
            samples = samples.reshape(*weights.shape, case.width)
            return jnp.einsum("bmqp,bmqpd->bmqd", weights, samples)

        flat = weights.reshape(*weights.shape[:3], -1).transpose(0, 2, 1, 3)
        return merge_heads(head_by_head(mix, values, locations, flat))

    def loss(values, locations, weights, cotangent):
        return jnp.sum(forward(values, locations, weights) * cotangent)

    def only(values, locations, weights, cotangent):
        del cotangent
        return forward(values, locations, weights)

    return {"forward": jax.jit(only), "gradient": jax.jit(jax.value_and_grad(loss, (0, 1, 2)))}


def torch_functions(case: Case, arrays: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    """The function of transformers, or nothing without torch."""
    try:
        import torch
        from transformers.models.deformable_detr.modeling_deformable_detr import (
            MultiScaleDeformableAttention,
        )
    except ImportError:
        return {}
    torch.set_num_threads(os.cpu_count() or 1)
    function = MultiScaleDeformableAttention()
    given = [torch.from_numpy(arrays[k]) for k in ("values", "locations", "weights")]
    cotangent = torch.from_numpy(arrays["cotangent"])
    sizes = torch.tensor(case.shapes)

    def run(values, locations, weights):
        return function(values, sizes, list(case.shapes), None, locations, weights, 64)

    def forward():
        with torch.no_grad():
            return run(*given)

    def gradient():
        leaves = [x.detach().requires_grad_() for x in given]
        (run(*leaves) * cotangent).sum().backward()
        return [x.grad for x in leaves]

    return {"forward": forward, "gradient": gradient}


def timed(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function, all in turn, round after round."""
    import jax

    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for name in functions:
        jax.block_until_ready(functions[name]())
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One case."""
    case, result = CASES[name], {}
    arrays = inputs(case)
    given = [arrays[k] for k in ("values", "locations", "weights", "cotangent")]
    methods = [m for m in METHODS if m != "dense" or _dense_fits(case)]
    compiled: dict[str, Any] = {}
    for method in methods:
        row: dict[str, Any] = {}
        for kind, function in jax_functions(case, method).items():
            program = function.lower(*given).compile()
            compiled[f"{method}/{kind}"] = functools.partial(program, *given)
            row[f"{kind}_temporary_bytes"] = int(program.memory_analysis().temp_size_in_bytes)
        result[method] = row
    for kind, function in torch_functions(case, arrays).items():
        compiled[f"torch/{kind}"] = function
        result.setdefault("torch", {})
    seconds = timed(compiled, rounds)
    for key, values in seconds.items():
        method, kind = key.split("/")
        median = statistics.median(values)
        result[method][f"{kind}_seconds"] = [round(v, 6) for v in values]
        result[method][f"{kind}_ratio_to_gather"] = round(
            median / statistics.median(seconds[f"gather/{kind}"]), 4
        )
    if not _dense_fits(case):
        result["dense"] = "not run: too many interpolation weights"
    if "torch" not in result:
        result["torch"] = "torch is not installed"
    return {"case": case._asdict(), "methods": result}


def _dense_fits(case: Case) -> bool:
    largest = max(h * w for h, w in case.shapes)
    return case.batch * case.heads * case.queries * case.points * largest <= DENSE_LIMIT


def main() -> None:
    """Measures every case and writes the JSON file."""
    from aqdetr_jax.io import write_json_atomic
    from aqdetr_jax.provenance import git_commit, package_versions

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--out", default="experiments/results/deformable_sampling.json")
    options = parser.parse_args(sys.argv[1:])
    import jax

    results = {"cases": {}, "rounds": options.rounds, "commit": git_commit()}
    results |= {"device": jax.devices()[0].device_kind, "cores": os.cpu_count()}
    results["versions"] = package_versions()
    for name in options.cases.split(","):
        print(f"=== {name}")
        results["cases"][name] = measure(name, options.rounds)
        for method, row in results["cases"][name]["methods"].items():
            if isinstance(row, str):
                print(f"{method:14s} {row}")
                continue
            print(
                f"{method:14s} forward {statistics.median(row['forward_seconds']) * 1e3:9.2f} ms "
                f"({row['forward_ratio_to_gather']:.2f}), with gradient "
                f"{statistics.median(row['gradient_seconds']) * 1e3:9.2f} ms "
                f"({row['gradient_ratio_to_gather']:.2f})"
            )
        write_json_atomic(options.out, results)


if __name__ == "__main__":
    host.prepare()
    main()
