"""A plan as text."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from aqdetr_jax.planning.plan import Plan, Step, remedies
from aqdetr_jax.planning.traffic import Collective
from aqdetr_jax.quant.report import columns

_GIB = 2**30


def format_plan(plan: Plan) -> str:
    """All that a plan says, as ``aqdetr plan`` prints it."""
    config, place, kind = plan.sizes.config, plan.place, plan.place.kind
    lines = [
        f"{config.name} on {place.name}: {place.chips} chips ({kind.peak / 1e12:.0f} TFLOP/s, "
        f"{kind.bandwidth / 1e9:.0f} GB/s, {kind.hbm / _GIB:.2f} GiB a device), mesh "
        f"data={plan.sizes.replicas} x model={config.mesh.model}, {_batch(plan)}, "
        f"{config.model.dtype}",
        *(f"assumed: {note}" for note in plan.sizes.notes),
        "",
        *columns([_HEAD, *(_row(step) for step in plan.steps)]),
        "",
        "HBM of a device, GiB:",
        *columns(_memory_rows(plan.steps)),
        "",
        "collectives of a step:",
        *(f"  {line}" for step in plan.steps for line in _collective_lines(step)),
        "",
    ]
    for step in plan.steps:
        if not step.compiled.fits:
            lines.append(_too_large(plan, step))
    lines += _estimates(plan)
    return "\n".join(lines)


def _batch(plan: Plan) -> str:
    train, rows = plan.sizes.config.train, plan.sizes.rows
    parts = f"{train.accumulate} times " if train.accumulate > 1 else ""
    return f"{parts}{rows} images a replica, {train.batch_size} a step"


def _number(value: float) -> str:
    """Three digits of it, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _name(step: Step) -> str:
    return f"{step.kind} {step.bucket[0]}x{step.bucket[1]}"


_HEAD = (
    "step",
    "images",
    "HBM GiB",
    "fits",
    "useful TFLOP",
    "GB moved",
    "an image",
    "instructions",
    "compiled s",
    "ms at least",
    "bound by",
)


def _row(step: Step) -> tuple[str, ...]:
    found, program = step.compiled, step.compiled.program
    return (
        _name(step),
        str(step.rows),
        f"{found.memory.total / _GIB:.2f}",
        "yes" if found.fits else "NO",
        f"{step.flops / 1e12:.3g}",
        f"{program.traffic / 1e9:.4g}",
        f"{program.traffic / 1e9 / step.rows:.4g}",
        f"{program.instructions:,}",
        f"{found.seconds:.0f}" + ("" if found.complete else " (no code)"),
        _number(step.times.seconds * 1e3),
        step.times.bound,
    )


def _memory_rows(steps: Sequence[Step]) -> list[tuple[str, ...]]:
    names = [field.name for field in dataclasses.fields(steps[0].compiled.memory)]
    rows = [("step", *names)]
    for step in steps:
        values = dataclasses.asdict(step.compiled.memory)
        cells = ("–" if values[n] is None else f"{values[n] / _GIB:.3f}" for n in names)
        rows.append((_name(step), *cells))
    return rows


def _collective_lines(step: Step) -> list[str]:
    """One line for each kind, place and size of group."""
    groups: dict[tuple[str, bool, int], list[Collective]] = collections.defaultdict(list)
    for found in step.compiled.program.collectives:
        groups[(found.kind, bool(found.loop), found.group)].append(found)
    lines = []
    for (kind, inside, size), members in sorted(groups.items()):
        total = sum(found.bytes * found.times for found in members)
        where = f"IN A LOOP ({sum(m.times for m in members)} times)" if inside else "in no loop"
        chips = f"over {size} devices" if size else "over all devices"
        lines.append(f"{_name(step)}: {len(members)} {kind} {chips}, {total / 1e6:.3f} MB, {where}")
    return lines or [f"{_name(step)}: none"]


def _too_large(plan: Plan, step: Step) -> str:
    needed, limit = step.compiled.memory.total / _GIB, step.compiled.limit / _GIB
    ways = "; ".join(remedies(plan.sizes, step.kind, step.rows))
    return (
        f"DOES NOT FIT: {_name(step)} needs {needed:.2f} GiB, a device of {plan.place.name} has "
        f"{limit:.2f}. First remedies: {ways}"
    )


def _estimates(plan: Plan) -> list[str]:
    """What follows from the roofline, each number named an estimate."""
    lines = [
        "estimate (the longest of useful FLOPs / peak, bytes / HBM bandwidth, bytes sent / "
        "interconnect; a lower bound on time):"
    ]
    for step in plan.steps:
        times, rate = step.times, plan.images_per_second(step)
        lines.append(
            f"  {_name(step)}: arithmetic {_number(times.arithmetic * 1e3)} ms, memory "
            f"{_number(times.memory * 1e3)} ms, interconnect "
            f"{_number(times.interconnect * 1e3)} ms; at most {_number(rate)} images/s a chip, "
            f"{_number(rate * plan.place.chips)} in all"
        )
    found = plan.schedule
    if found is not None:
        lines.append(
            f"  the run: {found.steps:,} steps of {plan.sizes.config.train.batch_size} images and "
            f"{found.evaluations} evaluations of {plan.sizes.eval_images:,}: at least "
            f"{_number(found.training_hours)} + {_number(found.evaluation_hours)} hours, "
            f"{_number(found.chip_hours)} chip-hours"
        )
    return lines
