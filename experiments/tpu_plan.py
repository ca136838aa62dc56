"""``aqdetr plan`` of both COCO families on four slices.

python experiments/tpu_plan.py [--only=deformable] [--topology=v5e:2x2] [--whole]

Every program is compiled up to its buffers (minutes each) and every slice written to the JSON file
when it is done; one that is there for this commit is kept. ``--whole`` compiles the largest
training step of the low-bit configurations to the end, code included, and keeps what that costs
(tens of minutes, and more memory than anything else here). Needs libtpu.
"""

from __future__ import annotations

import argparse
import itertools
import resource
from pathlib import Path
from typing import Any

from tpu_step import rows_of, same

from aqdetr_jax import host
from aqdetr_jax.io import write_json_atomic
from aqdetr_jax.planning.plan import as_json, make_plan
from aqdetr_jax.planning.table import format_plan
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.training.experiment import load_experiment

CONFIGS = (
    "coco:r50,w4a4",
    "coco:r50,float",
    "coco_deformable:r50,w4a4",
    "coco_deformable:r50,float",
)
TOPOLOGIES = ("v5e:2x2", "v5e:16x16", "v6e:16x16", "v5p:4x4x4")
EVERY_BUCKET = "v5e:2x2"
"""Where all buckets are compiled; on the others the first alone."""

WHOLE = "experiments/results/whole_compile.json"

_LONG = ("largest", "loops", "collectives", "traffic_bytes_by_opcode")


def slim(block: dict[str, Any]) -> dict[str, Any]:
    """A plan without its lists of hundreds; the number of collectives is kept."""
    steps = [
        {"collectives_count": len(step["collectives"])}
        | {name: value for name, value in step.items() if name not in _LONG}
        for step in block["steps"]
    ]
    return {**block, "steps": steps}


def _cost(before: resource.struct_rusage, after: resource.struct_rusage) -> dict[str, float]:
    """CPU seconds of children, and the most memory that one of them had."""
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"cpu_seconds": round(used, 1), "peak_bytes": after.ru_maxrss * 1024}


def main() -> None:
    """Plans what is missing and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="configurations with this in their name")
    parser.add_argument("--topology", help="one slice alone")
    parser.add_argument("--whole", action="store_true", help="generate the code, too")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.out = options.out or Path(WHOLE if options.whole else "experiments/results/plan.json")
    cases = itertools.product(TOPOLOGIES, CONFIGS)
    if options.whole:
        cases = itertools.product([EVERY_BUCKET], (name for name in CONFIGS if "w4a4" in name))
    for topology, name in cases:
        key = {"given": name, "topology": topology}
        done = {**key, "commit": git_commit()}
        wanted = options.only in name and options.topology in (None, topology)
        if not wanted or any(same(row, done) for row in rows_of(options.out)):
            continue
        config = load_experiment(name)
        height, width = config.data.buckets[0]
        largest = f"{height}x{width}"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        if options.whole:
            plan = make_plan(config, topology, kinds=("train",), bucket=largest)
        else:
            bucket = None if topology == EVERY_BUCKET else largest
            plan = make_plan(config, topology, bucket=bucket, fast=True)
        print(format_plan(plan), flush=True)
        kept = [row for row in rows_of(options.out) if not same(row, key)]
        made = {**slim(as_json(plan)), "given": name}
        if options.whole:
            made["command"] = "python experiments/tpu_plan.py --whole"
            made["compiler"] = _cost(before, resource.getrusage(resource.RUSAGE_CHILDREN))
        write_json_atomic(options.out, [*kept, made])


if __name__ == "__main__":
    host.use_cpu()
    main()
