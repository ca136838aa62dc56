"""What an optimised TPU program moves: HBM traffic, collectives, loops, and its instructions.

Rules of the count, one number for an instruction:

- what is read and written in HBM is the sum of its operands and results there, padded to whole
  tiles; what lies in another memory space counts nothing;
- a slice reads what it returns, an update of a slice writes what it inserts, twice both;
- an asynchronous operation counts where it starts: a copy what of it lies in HBM at either end, a
  slice what it fetches;
- parameters, constants, tuples, bitcasts and the end of an asynchronous operation move nothing;
- what a fusion does inside itself moves nothing: its operands and results count;
- a loop's body counts as often as it runs where that is known, else once.

The sum is what passes through HBM if every operation reads its operands whole and once. It is too
high where a fusion takes only a part of an operand (of one head, in a loop over heads), and too low
where a gather reads rows more than once.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

from aqdetr_jax.planning.hlo import (
    ARRAY,
    Instruction,
    Module,
    array_bytes,
    shape_bytes,
)

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
_COLLECTIVE = re.compile(rf" ((?:{'|'.join(COLLECTIVES)})(?:-start)?)\(")
_FREE = frozenset(
    (
        "parameter",
        "constant",
        "get-tuple-element",
        "tuple",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "opt-barrier",
        "partition-id",
        "replica-id",
    )
)
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of the program.

    Attributes:
      name: of the instruction.
      trips: how often its body runs; None = unknown (it depends on the data).
      depth: loops around it.
      op_name: where it comes from.
    """

    name: str
    trips: int | None
    depth: int
    op_name: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
      kind: see ``COLLECTIVES``.
      bytes: of the larger of what a chip gives and gets, without padding, each time it runs.
      group: chips that take part together; 0 = all.
      times: how often it runs in a step, as far as the loops' trips are known.
      loop: name of the innermost loop that it lies in; "" = none.
      arrays: how many are sent together.
      op_name: where it comes from.
    """

    kind: str
    bytes: int
    group: int
    times: int
    loop: str
    arrays: int
    op_name: str


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one instruction moves through HBM in a step."""

    bytes: int
    opcode: str
    shape: str
    op_name: str


@dataclasses.dataclass(frozen=True)
class Program:
    """What a program moves.

    Attributes:
      entry_instructions: instructions of the entry computation.
      instructions: those, and those of what it calls and of every loop's body.
      traffic: bytes through HBM on one chip in a step.
      by_opcode: the same by opcode, largest first.
      largest: the instructions that move most.
      loops: every loop.
      collectives: every collective.
    """

    entry_instructions: int
    instructions: int
    traffic: int
    by_opcode: dict[str, int]
    largest: list[Traffic]
    loops: list[Loop]
    collectives: list[Collective]

    @property
    def collectives_in_loops(self) -> int:
        """Collectives that lie in a loop."""
        return sum(bool(found.loop) for found in self.collectives)

    @property
    def all_reduces_in_loops(self) -> int:
        """All-reduces that lie in a loop."""
        return sum(bool(c.loop) and c.kind == "all-reduce" for c in self.collectives)


@dataclasses.dataclass(frozen=True)
class _Place:
    computation: str
    times: int
    loops: tuple[str, ...]


def read_program(lines: Iterable[str], *, largest: int = 12) -> Program:
    """Counts what a program moves.

    Args:
      lines: the optimised program's text.
      largest: how many of the instructions that move most are kept.
    """
    module = Module(lines)
    loops: list[Loop] = []
    collectives: list[Collective] = []
    moved: list[Traffic] = []
    count = 0
    todo = collections.deque([_Place(module.entry, 1, ())])
    while todo:
        place = todo.popleft()
        instructions = module.instructions(place.computation)
        shapes = {x.name: x.shape for x in instructions}
        count += len(instructions)
        for instruction in instructions:
            if instruction.opcode == "while":
                body, condition = (
                    _single(rf"{key}=%?([\w.\-]+)", instruction) for key in ("body", "condition")
                )
                trips = trip_count(module, instruction, condition)
                loops.append(Loop(instruction.name, trips, len(place.loops), instruction.op_name))
                inner = (*place.loops, instruction.name)
                todo.append(_Place(body, place.times * (1 if trips is None else trips), inner))
            elif instruction.opcode in ("call", "conditional"):
                todo.extend(
                    dataclasses.replace(place, computation=name) for name in instruction.called()
                )
            else:
                collectives += _collectives(module, instruction, shapes, place)
            if size := traffic(instruction, shapes) * place.times:
                moved.append(
                    Traffic(size, instruction.opcode, instruction.shape, instruction.op_name)
                )
    by_opcode: collections.Counter[str] = collections.Counter()
    for found in moved:
        by_opcode[found.opcode] += found.bytes
    moved.sort(key=lambda found: -found.bytes)
    return Program(
        entry_instructions=len(module.instructions(module.entry)),
        instructions=count,
        traffic=sum(found.bytes for found in moved),
        by_opcode=dict(by_opcode.most_common()),
        largest=moved[:largest],
        loops=loops,
        collectives=collectives,
    )


def traffic(instruction: Instruction, shapes: dict[str, str]) -> int:
    """Bytes that an instruction moves through HBM each time it runs, see the rules above.

    Args:
      instruction: any but those that run others.
      shapes: of its computation's instructions, by name.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    inputs = [shapes.get(name, "") for name in instruction.operands]
    if opcode in ("async-start", "slice-start", "dynamic-slice-start"):
        # (what it reads from, what it fetches, ...): wherever that is put, it comes from HBM.
        arrays = ARRAY.findall(instruction.shape)
        fetched = arrays[len(inputs)] if len(arrays) > len(inputs) else arrays[-1]
        return array_bytes(*fetched, True)
    own = shape_bytes(instruction.shape)
    if opcode == "copy-start":  # (to, from, ...)
        return own
    if opcode in ("slice", "dynamic-slice"):
        return 2 * own
    if opcode == "dynamic-update-slice":
        return 2 * shape_bytes(inputs[1])
    return own + sum(map(shape_bytes, inputs))


def trip_count(module: Module, loop: Instruction, condition: str) -> int | None:
    """How often a loop's body runs: as the compiler notes it, or ``counter < constant``.

    A counter is taken to be that of JAX's ``scan`` and ``map``, which starts at 0 and goes up by 1.

    Args:
      module: the program.
      loop: the instruction.
      condition: name of its condition.

    Returns:
      The number, None where it is not known before the program runs.
    """
    if noted := _TRIPS.search(loop.text):
        return int(noted[1])
    instructions = {x.name: x for x in module.instructions(condition)}
    root = next((x for x in instructions.values() if x.root), None)
    if root is None or root.opcode != "compare" or "direction=LT" not in root.text:
        return None
    limits = [_constant(instructions.get(name)) for name in root.operands]
    return limits[1] if limits[0] is None else None


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.value) if re.fullmatch(r"-?\d+", instruction.value) else None


def _single(pattern: str, instruction: Instruction) -> str:
    found = re.search(pattern, instruction.text)
    if found is None:
        raise ValueError(f"{instruction.name}: {pattern!r} is not found in its text")
    return found[1]


def _collectives(
    module: Module, instruction: Instruction, shapes: dict[str, str], place: _Place
) -> Iterator[Collective]:
    """An instruction, and what it runs, as collectives."""
    if _is_collective(instruction.opcode):
        given = [shapes.get(name, "") for name in instruction.operands]
        yield _collective(instruction, given, place)
    elif instruction.opcode in ("fusion", "async-start"):
        for name in instruction.called():
            lines = module.lines(name)
            if any(map(_COLLECTIVE.search, lines)):
                inner = module.instructions(name)
                known = {x.name: x.shape for x in inner}
                for found in inner:
                    yield from _collectives(module, found, known, place)


def _is_collective(opcode: str) -> bool:
    return opcode.removesuffix("-start") in COLLECTIVES


def _collective(instruction: Instruction, given: list[str], place: _Place) -> Collective:
    sent = sum(shape_bytes(shape, hbm=False) for shape in given)
    got = shape_bytes(instruction.shape, hbm=False)
    arrays = len(ARRAY.findall(instruction.shape))
    kind = instruction.opcode.removesuffix("-start")
    if kind != instruction.opcode and kind != "all-reduce":
        got -= sent  # the start of one shows what it was given beside what it gives
        arrays //= 2
    return Collective(
        kind=kind,
        bytes=max(sent, got),
        group=_group_size(instruction.text),
        times=place.times,
        loop=place.loops[-1] if place.loops else "",
        arrays=max(arrays, 1),
        op_name=instruction.op_name,
    )


def _group_size(text: str) -> int:
    """Chips of a replica group in any of its notations; 0 = all."""
    found = re.search(r"replica_groups=(\S.*?)(?:, [a-z_]+=|$)", text)
    if found is None:
        return 0
    groups = found[1]
    if named := re.match(r"mesh\[([^\]]*)\]\s*\{([^}]*)\}", groups):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if shape := re.match(r"\[([\d,]+)\]<=", groups):  # [groups,chips of each]
        return int(shape[1].split(",")[-1])
    if listed := re.match(r"\{\{([\d,]*)\}", groups):
        return len(listed[1].split(","))
    return 0
