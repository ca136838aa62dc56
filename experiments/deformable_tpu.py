"""Ways to sample on a TPU, compiled ahead of time for one v5e chip: what they move and hold.

python experiments/deformable_tpu.py [--only=encoder] [--out=FILE]

Each row is the core of one deformable attention of COCO's largest bucket, four bits, forward and
gradient of one image, as the model runs it: samples, quantizers and their weighted sum. Rows are
kept as they are made; one that is there for this commit is not made again. Needs libtpu; no TPU is
needed, and nothing is timed on one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

from aqdetr_jax import host
from aqdetr_jax.io import read_json, write_json_atomic
from aqdetr_jax.planning.ahead import LIBTPU, check_libtpu, versions
from aqdetr_jax.provenance import git_commit

SHAPES = ((100, 168), (50, 84), (25, 42), (13, 21))
QUERIES = {"encoder": sum(h * w for h, w in SHAPES), "decoder": 1800}
HEADS, CHANNELS, POINTS = 8, 32, 4
TOPOLOGY = "v5e:1x1"


@dataclasses.dataclass(frozen=True)
class Row:
    """One program.

    Attributes:
      attention: whose, see ``QUERIES``.
      way: "gather", "packed", "kernel", or "dense to N": "packed" on levels of more than N cells.
      dtype: of the values.
    """

    attention: str
    way: str
    dtype: str


WAYS = ("gather", "packed", "dense to 256", "dense to 300", "kernel")
ROWS = tuple(Row(*each) for each in itertools.product(QUERIES, WAYS, ("float32", "bfloat16")))


def measure(row: Row) -> dict[str, Any]:
    """Compiles a row whole."""
    import jax
    import jax.numpy as jnp

    from aqdetr_jax.models.deformable_attention import SamplingCore
    from aqdetr_jax.ops import deformable, deformable_kernel
    from aqdetr_jax.parallel.mesh import replicated
    from aqdetr_jax.planning.child import slice_mesh
    from aqdetr_jax.planning.traffic import read_program
    from aqdetr_jax.quant.policy import stock_policy

    way, limit = row.way, deformable.DENSE_CELLS
    if way.startswith("dense"):
        # What "auto" makes of sizes that the kernel cannot take.
        way, limit = "auto", int(way.split()[-1])
        without = mock.patch.object(deformable_kernel, "misfit", return_value="not asked for")
    else:
        without = contextlib.nullcontext()
    core = SamplingCore(stock_policy("w4a4"), way, True, jnp.dtype(row.dtype))
    mesh = slice_mesh(TOPOLOGY, -1, 1)
    queries, cells = QUERIES[row.attention], deformable.token_count(SHAPES)
    points = len(SHAPES) * POINTS

    def shape(*sizes, dtype=row.dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=replicated(mesh))

    # As the layers before leave them: heads are split, and turned, in the program.
    given = [shape(1, cells, HEADS * CHANNELS)]
    given += [shape(1, queries, HEADS * points * n, dtype="float32") for n in (2, 1)]

    def apply(variables, values, locations, scores):
        scores = scores.reshape(1, queries, HEADS, points).transpose(0, 2, 1, 3)
        return core.apply(
            variables,
            values.reshape(1, cells, HEADS, CHANNELS),
            locations.reshape(1, queries, HEADS, len(SHAPES), POINTS, 2),
            scores,
            SHAPES,
        )[0]

    def loss(variables, values, locations, scores, cotangent):
        return jnp.sum((apply(variables, values, locations, scores) * cotangent).astype("f4"))

    steps = {f"{name}_step": shape(HEADS, 1, 1, dtype="float32") for name in ("probs", "samples")}
    cotangent = shape(1, queries, HEADS * CHANNELS)
    with jax.set_mesh(mesh), without, mock.patch.object(deformable, "DENSE_CELLS", limit):
        start = time.process_time()
        gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
        compiled = gradient.lower({"params": steps}, *given, cotangent).compile()
    program = read_program(compiled.as_text().splitlines())
    return {
        "gb": round(program.traffic / 1e9, 3),
        "temporary_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
        "loops": len(program.loops),
        "compile_cpu_seconds": round(time.process_time() - start, 1),
    }


def main() -> None:
    """Compiles what is missing and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows that have this in their name")
    parser.add_argument("--out", type=Path, default="experiments/results/deformable_tpu.json")
    options = parser.parse_args()
    commit = git_commit()
    check_libtpu()
    for row in ROWS:
        key = dataclasses.asdict(row)
        rows = read_json(options.out)["rows"] if options.out.is_file() else []
        done = any(other.items() >= {**key, "commit": commit}.items() for other in rows)
        if options.only not in " ".join(key.values()) or done:
            continue
        made = {**key, **measure(row), "commit": commit}
        print(made, flush=True)
        kept = [other for other in rows if not other.items() >= key.items()]
        write_json_atomic(options.out, {"versions": versions(), "rows": [*kept, made]})


if __name__ == "__main__":
    os.environ.update(LIBTPU)
    host.use_cpu()
    main()
