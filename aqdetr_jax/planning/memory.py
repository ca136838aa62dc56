"""HBM on a chip, by what lies in it, from XLA's buffer assignment.

The compiler writes where every buffer lies before it generates code (``*buffer-assignment.txt``),
and that decides whether a program fits. An argument's place says which of them it is; its name is
in the program that was given to the compiler (``*before_optimizations.txt``).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

_ALLOCATION = re.compile(r"allocation \d+: size (\d+)(.*)")
_ARGUMENT = re.compile(r"parameter (\d+), shape .* at ShapeIndex \{([\d,]*)\}")
_COLOR = re.compile(r"color (\d+)")
_PARAMETER = re.compile(r' parameter\((\d+)\).*op_name="((?:[^"\\]|\\.)*)"')

PARTS = {
    "state.params": "parameters",
    "state.batch_stats": "parameters",
    "variables": "parameters",
    "state.opt_state": "optimizer",
    "state.ema": "average",
    "teacher_variables": "teacher",
    "batch": "batch",
    "images": "batch",
    "mask": "batch",
    "original_size": "batch",
}
"""What an argument is counted as, by how its name begins; anything else is "other"."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM that a program needs on one chip, bytes, padded as they lie there.

    Attributes:
      parameters: of the model, statistics of norms included.
      optimizer: its state.
      average: the moving average.
      teacher: the teacher's variables.
      batch: images, masks and boxes.
      temporaries: activations and everything else between arguments and results.
      outputs: results that do not take an argument's place.
      other: further arguments, constants.
      code: the program itself, None where no code was generated.
    """

    parameters: int = 0
    optimizer: int = 0
    average: int = 0
    teacher: int = 0
    batch: int = 0
    temporaries: int = 0
    outputs: int = 0
    other: int = 0
    code: int | None = None

    @property
    def total(self) -> int:
        """All of it."""
        return sum(value or 0 for value in dataclasses.asdict(self).values())


def argument_names(lines: Iterable[str]) -> dict[int, str]:
    """The names of a program's arguments by number, such as ``state.params['query_embed']``.

    Args:
      lines: the text of the program before it is optimised.
    """
    names: dict[int, str] = {}
    entry = False
    for line in lines:
        if line.startswith("ENTRY "):
            entry = True
        elif line.startswith("}"):
            entry = False
        elif entry and (found := _PARAMETER.search(line)):
            names[int(found[1])] = found[2].replace("\\'", "'")
    return names


def part_of(name: str) -> str:
    """The field of ``Memory`` that an argument belongs to."""
    for start, part in PARTS.items():
        if re.match(rf"{re.escape(start)}(\W|$)", name):
            return part
    return "other"


def read_memory(
    assignment: Iterable[str], names: dict[int, str], code: int | None = None
) -> Memory:
    """Adds up a buffer assignment.

    What lies in other memories than HBM (a colour other than 0), and what the compiler's
    computations inside an operation use (thread-local), takes no HBM.

    Args:
      assignment: the text of the buffer assignment.
      names: see :func:`argument_names`.
      code: bytes of generated code, None if there is none.

    Raises:
      ValueError: the text holds no allocation.
    """
    parts: dict[str, int] = {}
    found_any = False
    for line in assignment:
        found = _ALLOCATION.match(line)
        if found is None:
            continue
        found_any = True
        size, rest = int(found[1]), found[2]
        color = _COLOR.search(rest)
        if "thread-local" in rest or (color and color[1] != "0"):
            continue
        if argument := _ARGUMENT.search(rest):
            # The compiler for TPUs takes all arguments as one tuple, others one by one.
            place = argument[2].split(",")[0] or argument[1]
            part = part_of(names.get(int(place), ""))
        elif "preallocated-temp" in rest:
            part = "temporaries"
        elif "live-out" in rest or "output" in rest:
            part = "outputs"
        else:
            part = "other"
        parts[part] = parts.get(part, 0) + size
    if not found_any:
        raise ValueError("not the text of a buffer assignment: it holds no allocation")
    return Memory(**parts, code=code)
