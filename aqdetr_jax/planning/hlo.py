"""The text of an optimised TPU program: its computations, instructions and the sizes of shapes.

XLA dumps it (``*.after_optimizations.txt``) with a layout for every shape:
``f32[8,800,1344,3]{0,3,2,1:T(4,128)S(1)}`` is tiled 4 x 128 over its two innermost dimensions and
lies in memory space 1 (on the chip), not in HBM.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

_BITS = {"pred": 8, "token": 0, "opaque": 0}
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_PARENTHESIS = re.compile(r"[()]")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) ")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLED = re.compile(
    r"(?:to_apply|calls|called_computations|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@functools.cache
def array_bytes(kind: str, dimensions: str, layout: str, padded: bool) -> int:
    """Bytes of one array."""
    sizes = [int(x) for x in dimensions.split(",") if x]
    bits = _BITS.get(kind)
    if bits is None:
        found = re.search(r"\d+", kind)
        bits = int(found[0]) if found else 0
        if bits < 8 and "E(" not in layout:
            bits = 8  # a narrow type that is not packed
    if padded and sizes and (tile := _TILE.search(layout)):
        order = [int(x) for x in layout[1:].split(":")[0].split(",") if x]
        # The tile's last dimension lies on the innermost one, which the layout names first.
        for dimension, side in zip(order, reversed(tile[1].split(",")), strict=False):
            sizes[dimension] = -(-sizes[dimension] // int(side)) * int(side)
    return math.prod(sizes) * bits // 8


def shape_bytes(shape: str, *, hbm: bool = True) -> int:
    """Bytes of a shape, which may be a tuple.

    Args:
      shape: as XLA prints it.
      hbm: count what lies in HBM, padded to whole tiles; else count every array without padding.
    """
    return sum(_bytes(array, hbm) for array in ARRAY.findall(shape))


def _bytes(array: tuple[str, str, str], hbm: bool) -> int:
    if hbm and (space := re.search(r"S\((\d+)\)", array[2])) and space[1] != "0":
        return 0
    return array_bytes(*array, hbm)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: without the percent sign.
      shape: of its result, as text.
      opcode: such as "fusion".
      operands: names.
      value: what stands between its parentheses: a constant's value.
      text: what follows them.
      root: whether it is its computation's result.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    value: str
    text: str
    root: bool

    @property
    def op_name(self) -> str:
        """Where in the program it comes from."""
        found = _OP_NAME.search(self.text)
        return found[1] if found else ""

    def called(self) -> list[str]:
        """The computations that it runs, a loop's condition and body excepted."""
        names = _CALLED.findall(self.text)
        for group in _BRANCHES.findall(self.text):
            names += _NAME.findall(group)
        return names


def parse_instruction(line: str) -> Instruction | None:
    """One line of a computation; None if it is no instruction."""
    head = _LINE.match(line)
    if head is None:
        return None
    start = head.end()
    if line[start] == "(":
        end = _closing(line, start) + 1
    else:
        end = line.index(" ", start)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        return None
    close = _closing(line, opcode.end() - 1)
    value = line[opcode.end() : close]
    return Instruction(
        name=head[2],
        shape=line[start:end],
        opcode=opcode[1],
        operands=tuple(_NAME.findall(value)),
        value=value,
        text=line[close + 1 :],
        root=head[1] is not None,
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at ``start`` is closed."""
    depth = 0
    for found in _PARENTHESIS.finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"no closing parenthesis: {text[start : start + 80]!r}")


class Module:
    """The computations of a program, parsed when they are asked for."""

    def __init__(self, lines: Iterable[str]):
        self.entry = ""
        self._lines: dict[str, list[str]] = {}
        self._parsed: dict[str, list[Instruction]] = {}
        current: list[str] | None = None
        for line in lines:
            if line[:1] in "%E" and line.rstrip().endswith("{") and (head := _HEAD.match(line)):
                current = self._lines[head[2]] = []
                if head[1]:
                    self.entry = head[2]
            elif line.startswith("}"):
                current = None
            elif current is not None:
                current.append(line)
        if not self.entry:
            raise ValueError("not the text of an XLA program: it has no ENTRY computation")

    def lines(self, name: str) -> list[str]:
        """A computation's lines as they stand."""
        return self._lines[name]

    def instructions(self, name: str) -> list[Instruction]:
        """A computation's instructions."""
        if name not in self._parsed:
            found = map(parse_instruction, self._lines[name])
            self._parsed[name] = [x for x in found if x is not None]
        return self._parsed[name]
