"""What one step moves through a TPU's memory, compiled ahead of time; no TPU is needed.

python experiments/tpu_step.py [--label=before] [--only=deformable] [--per_chip=8] [--commit=SHA]

Compiles the rows below one after the other (minutes each) and writes each to the JSON file when it
is done; a row that is there for this label and commit is kept. Needs libtpu.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from aqdetr_jax import host
from aqdetr_jax.io import read_json, write_json_atomic
from aqdetr_jax.planning.ahead import Case, Compiled, Kind, compile_ahead, versions
from aqdetr_jax.planning.chips import parse_slice
from aqdetr_jax.planning.resolve import Sizes, read_facts, resolve
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.training.experiment import load_experiment

BUCKET = (800, 1344)


@dataclasses.dataclass(frozen=True)
class Row:
    """One program: a configuration, images a chip, and the type between its layers."""

    config: str
    per_chip: int
    dtype: str = "float32"
    kind: Kind = "train"
    topology: str = "v5e:2x2"
    bucket: tuple[int, int] = BUCKET


ROWS = (
    *(Row("coco:r50,w4a4", n) for n in (1, 4, 8)),
    *(Row("coco:r50,w4a4", n, "bfloat16") for n in (4, 8)),
    Row("coco:r50,float", 8),
    *(Row("coco_deformable:r50,w4a4", n) for n in (1, 2)),
    *(Row("coco_deformable:r50,w4a4", n, "bfloat16") for n in (1, 2)),
    Row("coco_deformable:r50,float", 2),
    Row("coco:r50,w4a4", 8, kind="eval"),
    Row("coco_deformable:r50,w4a4", 8, kind="eval"),
)


def measure(row: Row) -> dict[str, Any]:
    """Compiles a row and returns what it says."""
    place = parse_slice(row.topology)
    config = load_experiment(row.config, (f"model.dtype={row.dtype}",))
    sizes = resolve(read_facts(config, place), place, row.per_chip)
    found = compile_ahead(Case(sizes.config, place, row.bucket, row.kind))
    return summary(found, sizes)


def summary(found: Compiled, sizes: Sizes) -> dict[str, Any]:
    """The figures of a compiled program, an image where they are of one."""
    gib, program = 2**30, found.program
    parts = dataclasses.asdict(found.memory)
    rows = sizes.rows
    return {
        "hbm_gib": round(found.memory.total / gib, 3),
        "fits": found.fits,
        "gb_per_step": round(program.traffic / 1e9, 2),
        "gb_per_image": round(program.traffic / 1e9 / rows, 2),
        "all_reduces_in_loops": program.all_reduces_in_loops,
        "collectives_in_loops": program.collectives_in_loops,
        "collectives": len(program.collectives),
        "collective_mb": round(sum(c.bytes * c.times for c in program.collectives) / 1e6, 2),
        "loops": len(program.loops),
        "instructions": program.instructions,
        "entry_instructions": program.entry_instructions,
        "hbm_parts_gib": {k: round(v / gib, 4) for k, v in parts.items() if v},
        "gb_by_opcode": {k: round(v / 1e9, 2) for k, v in program.by_opcode.items() if v > 5e7},
        "largest": [
            {"gb": round(x.bytes / 1e9, 2), "opcode": x.opcode, "op_name": x.op_name}
            for x in program.largest
        ],
        "seconds": round(found.seconds, 1),
    }


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    return read_json(path) if path.is_file() else []


def same(row: dict[str, Any], key: dict[str, Any]) -> bool:
    """Whether a row has all values of a key."""
    return all(row.get(name) == value for name, value in key.items())


def main() -> None:
    """Compiles what is missing and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--label", default="now", help="of the rows: before, after, ...")
    parser.add_argument("--only", default="", help="rows whose configuration has this in its name")
    parser.add_argument("--per_chip", type=int, help="rows with so many images a chip")
    parser.add_argument("--dtype", help="rows of this type")
    parser.add_argument("--kind", choices=("train", "eval"), help="rows of this kind")
    parser.add_argument("--commit", help="of the model's code, if this tree's differs elsewhere")
    parser.add_argument("--out", type=Path, default="experiments/results/tpu_step.json")
    options = parser.parse_args()
    commit = options.commit or git_commit()
    for row in ROWS:
        wanted = (
            options.only in row.config
            and options.per_chip in (None, row.per_chip)
            and options.dtype in (None, row.dtype)
            and options.kind in (None, row.kind)
        )
        key = {"label": options.label, **dataclasses.asdict(row), "bucket": list(row.bucket)}
        done = {**key, "commit": commit}
        if not wanted or any(same(other, done) for other in rows_of(options.out)):
            continue
        print(f"{row}", flush=True)
        made = {**done, **measure(row), "versions": versions()}
        print({k: v for k, v in made.items() if k not in ("largest", "gb_by_opcode")}, flush=True)
        kept = [other for other in rows_of(options.out) if not same(other, key)]
        write_json_atomic(options.out, [*kept, made])


if __name__ == "__main__":
    host.use_cpu()
    main()
