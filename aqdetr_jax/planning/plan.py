"""What a slice gives a configuration: every program compiled, and what follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from aqdetr_jax.parallel.hosts import say
from aqdetr_jax.planning.ahead import (
    Case,
    Compiled,
    Kind,
    check_libtpu,
    compile_ahead,
    versions,
)
from aqdetr_jax.planning.chips import Slice, parse_slice
from aqdetr_jax.planning.resolve import Sizes, read_facts, resolve, with_batch
from aqdetr_jax.planning.roofline import Roofline, Schedule, roofline, schedule
from aqdetr_jax.planning.search import largest_batch
from aqdetr_jax.planning.work import image_flops
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.remedies import remedies as run_remedies

Bucket = tuple[int, int]
KINDS: tuple[Kind, ...] = ("train", "eval")


@dataclasses.dataclass(frozen=True)
class Step:
    """One program of a plan.

    Attributes:
      kind: training or evaluation.
      bucket: height and width of its images.
      rows: images a replica in one step.
      flops: useful ones of a device.
      compiled: what the compiler made of it.
      times: what it takes at least.
    """

    kind: Kind
    bucket: Bucket
    rows: int
    flops: int
    compiled: Compiled
    times: Roofline


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a slice gives a configuration.

    Attributes:
      place: the slice.
      sizes: of the step.
      steps: the programs.
      schedule: what the run takes; None where a training step does not fit or was not asked for.
    """

    place: Slice
    sizes: Sizes
    steps: tuple[Step, ...]
    schedule: Schedule | None

    @property
    def fits(self) -> bool:
        """Whether all of it does."""
        return all(step.compiled.fits for step in self.steps)

    def images_per_second(self, step: Step) -> float:
        """What a chip gets through at most, an estimate."""
        return step.rows * self.sizes.replicas / self.place.chips / step.times.seconds


def parse_bucket(text: str) -> Bucket:
    """A bucket written HEIGHTxWIDTH.

    Raises:
      ValueError: it is written otherwise.
    """
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"--bucket={text}: write HEIGHTxWIDTH in pixels, such as 800x1344")
    return int(sides[0]), int(sides[1])


def make_plan(
    config: ExperimentConfig,
    topology: str,
    *,
    per_chip: int | None = None,
    bucket: str | None = None,
    kinds: Sequence[Kind] = KINDS,
    images: int | None = None,
    fast: bool = False,
    search: bool = False,
) -> Plan:
    """Compiles every program that a run needs on a slice; minutes each.

    Args:
      config: as given.
      topology: name of the slice.
      per_chip: images a replica, in place of the configuration's.
      bucket: of images, in place of all of the configuration's.
      kinds: which programs.
      images: of the training set, in place of the data's.
      fast: without generating code.
      search: with the largest batch that fits, in place of the configuration's.

    Raises:
      ValueError: something that cannot be planned; the message says what to change.
      RuntimeError: the compiler for TPUs is missing, or failed.
    """
    place = parse_slice(topology)
    if images is not None and images < 1:
        raise ValueError(f"--images={images} must be at least 1")
    given = None if bucket is None else (parse_bucket(bucket),)
    kinds = [kind for kind in kinds if config.task != "pretrain" or kind == "train"]
    if not kinds:
        raise ValueError("--kind=eval: a dense pretraining has no evaluation step")
    if search:
        if per_chip is not None:
            raise ValueError("--per_chip has no effect: --search chooses it")
        per_chip = 1  # so that the configuration's own batch need not be shared evenly
    with_batch(config, place, per_chip)  # before data are read, which takes a while
    check_libtpu()
    facts = read_facts(config, place, images)
    sizes = resolve(facts, place, per_chip)
    made: dict[tuple[Kind, Bucket, int], Compiled] = {}

    def compiled(kind: Kind, shape: Bucket, rows: int, quick: bool) -> Compiled:
        key = (kind, shape, rows)
        if key not in made or not (quick or made[key].complete):
            say(f"compiling {kind} {shape[0]}x{shape[1]}, {rows} images a chip, {place.name}")
            full = resolve(facts, place, rows).config
            made[key] = compile_ahead(Case(full, place, shape, kind), fast=quick)
        return made[key]

    data = sizes.config.data
    buckets = {
        "train": given or data.buckets,
        "eval": given or data.eval_buckets or data.buckets,
    }
    if search:
        shape = max(buckets[kinds[0]], key=lambda sides: sides[0] * sides[1])

        def needed(rows: int) -> int:
            return compiled(kinds[0], shape, rows, True).memory.total

        found = largest_batch(needed, place.kind.hbm)
        sizes = resolve(facts, place, max(found, 1))
    eval_rows = sizes.config.train.eval_batch_size // sizes.replicas
    steps = []
    for kind in kinds:
        rows = sizes.rows if kind == "train" else eval_rows
        for shape in buckets[kind]:
            result = compiled(kind, shape, rows, fast)
            count = rows * (sizes.config.train.accumulate if kind == "train" else 1)
            flops = image_flops(sizes.config, shape, kind) * count // sizes.config.mesh.model
            times = roofline(result.program, flops, place.kind, place.devices)
            steps.append(Step(kind, shape, count, flops, result, times))
    return Plan(place, sizes, tuple(steps), _schedule(sizes, place, steps))


def _schedule(sizes: Sizes, place: Slice, steps: Sequence[Step]) -> Schedule | None:
    """What the run takes; None if it cannot be trained so."""
    seconds: dict[Kind, list[float]] = {
        kind: [step.times.seconds for step in steps if step.kind == kind] for kind in KINDS
    }
    if not seconds["train"] or not all(s.compiled.fits for s in steps if s.kind == "train"):
        return None
    train = sizes.config.train
    return schedule(
        steps=train.steps,
        eval_every=train.eval_every,
        train_seconds=seconds["train"],
        eval_seconds=seconds["eval"],
        eval_images=sizes.eval_images,
        eval_rows=train.eval_batch_size,
        chips=place.chips,
    )


def remedies(sizes: Sizes, kind: Kind, rows: int) -> list[str]:
    """What makes a program smaller, the first things first; each can be given to ``plan``.

    Args:
      sizes: of the program.
      kind: of it.
      rows: its images a replica.
    """
    parts = sizes.config.train.accumulate if kind == "train" else 1
    found = []
    for remedy in run_remedies(sizes.config, rows // parts, kind):
        words = [] if remedy.rows is None else [f"--per_chip={remedy.rows}"]
        words += [f"{key}={value}" for key, value in remedy.keys.items()]
        search = "" if remedy.keys else ", or --search"
        found.append(f"{remedy.what}: {' '.join(words)}{search}")
    return found or ["a kind of chip with more HBM: --topology=v5p:2x2x1"]


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan as a results file holds it."""
    config, place = plan.sizes.config, plan.place
    return {
        "config": config.name,
        "topology": place.name,
        "chips": place.chips,
        "mesh": {"data": plan.sizes.replicas, "model": config.mesh.model},
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "per_chip": plan.sizes.rows,
        "accumulate": config.train.accumulate,
        "batch": config.train.batch_size,
        "assumed": list(plan.sizes.notes),
        "fits": plan.fits,
        "steps": [_step_json(step, plan) for step in plan.steps],
        "schedule": None if plan.schedule is None else _schedule_json(plan.schedule),
        "commit": git_commit(),
        "versions": versions(),
    }


def _step_json(step: Step, plan: Plan) -> dict[str, Any]:
    result, program = step.compiled, step.compiled.program
    return {
        "kind": step.kind,
        "bucket": list(step.bucket),
        "per_chip": step.rows,
        "fits": result.fits,
        "remedies": [] if result.fits else remedies(plan.sizes, step.kind, step.rows),
        "hbm_bytes": result.memory.total,
        "hbm_limit_bytes": result.limit,
        "hbm_parts_bytes": dataclasses.asdict(result.memory),
        "useful_flops": step.flops,
        "traffic_bytes": program.traffic,
        "traffic_bytes_by_opcode": program.by_opcode,
        "largest": [dataclasses.asdict(found) for found in program.largest],
        "collectives": [dataclasses.asdict(found) for found in program.collectives],
        "collectives_in_loops": program.collectives_in_loops,
        "all_reduces_in_loops": program.all_reduces_in_loops,
        "loops": [dataclasses.asdict(found) for found in program.loops],
        "instructions": program.instructions,
        "entry_instructions": program.entry_instructions,
        "compile_seconds": round(result.seconds, 1),
        "code_generated": result.complete,
        "estimate": {
            **{f"{k}_seconds": v for k, v in dataclasses.asdict(step.times).items()},
            "step_seconds_at_least": step.times.seconds,
            "bound_by": step.times.bound,
            "images_per_second_a_chip_at_most": plan.images_per_second(step),
        },
    }


def _schedule_json(found: Schedule) -> dict[str, Any]:
    return {
        **dataclasses.asdict(found),
        "hours_at_least": found.hours,
        "chip_hours_at_least": found.chip_hours,
    }
