"""An interpreter for the part of Python's pickle language that checkpoints are written in.

It runs no code of the pickle's choosing: nothing named in a pickle is imported, and the only
callables are those that the caller hands over by name. It knows the opcodes that the writers of
protocols 2 to 5 use for plain containers, numbers, strings and calls by name; every other opcode,
name and use of a name is refused.

A pickle is a program and can be hostile in its size as well: a few bytes make a container that
holds itself, or one that is small by reference and astronomic to walk. So the work is bounded
twice: here, where each opcode costs at least one byte of the file and what calls copy is charged
against the same bytes; and in :mod:`aqdetr_jax.interop.plain_tree`, which copies the result.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from aqdetr_jax.interop.pickle_values import (
    REFUSED_OPCODES,
    Attributes,
    Function,
    Global,
    NumberType,
    Ordered,
    is_number,
    key_of,
)
from aqdetr_jax.interop.source import Malformed, Source, shown

MAX_OPCODES = 1_000_000
"""Opcodes of one pickle; a checkpoint of ten thousand tensors has about 400 000."""

MAX_COPIED = 16_000_000
"""Values and characters that calls copy; never more than the pickle has bytes, either."""

MAX_STACK = 100_000
"""Values on the stack at any time; writers put containers together in batches of 1000."""

MAX_MARKS = 256
"""Marks open at any time, at most three for each level of nesting."""

MAX_MEMO = 500_000
"""Values that the program remembers to use again."""

MAX_INT_BYTES = 64
"""Bytes of an integer."""

MAX_NUMBER_KEYS = 10_000
"""Keys of dicts and elements of sets that are numbers. Their hashes are no secret, so that a file
can choose them to collide, and then a dict takes time quadratic in them. Optimizers number their
parameters."""


def load(
    source: Source,
    functions: Mapping[str, Function],
    persistent: Callable[[Any], Any] | None = None,
    refused: Mapping[str, str] | None = None,
) -> Any:
    """Runs one pickle.

    Args:
      source: stands at the pickle's first byte; afterwards behind its last one.
      functions: what the pickle may name, as "module.name", and what is called in its place. A
        function takes the pickle's arguments, of any number and type, answers in time and memory
        proportional to their length, and raises Malformed for those it does not accept.
      persistent: called for persistent ids; without it they are refused.
      refused: what some of the names that are refused stand for, for messages.

    Returns:
      The value: None, bool, int, float, str, bytes, list, tuple, set, frozenset, dict, Ordered,
      Attributes, NumberType, Global and what ``functions`` and ``persistent`` return. It may share
      parts and hold itself; see :func:`aqdetr_jax.interop.plain_tree.expand`.

    Raises:
      Malformed: the pickle is cut short or corrupt, uses an opcode or a name outside the lists, or
        passes MAX_OPCODES, MAX_STACK, MAX_MARKS, MAX_MEMO, MAX_INT_BYTES, MAX_COPIED,
        MAX_NUMBER_KEYS or the limits of keys.
    """
    return _Machine(source, functions, persistent, refused or {}).run()


class _Machine:
    """The state of a running pickle: a stack, open marks (positions in it) and a memo."""

    def __init__(
        self,
        source: Source,
        functions: Mapping[str, Function],
        persistent: Callable[[Any], Any] | None,
        refused: Mapping[str, str],
    ):
        self.source = source
        self.functions = functions
        self.persistent = persistent
        self.refused = refused
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0
        self.number_keys = 0
        self.frame_end = 0

    def run(self) -> Any:
        take, stack = self.source.take, self.stack
        for _ in range(MAX_OPCODES):
            opcode = take(1)
            if opcode == b".":
                value = self.pop()
                self.check_frame(ends=True)
                if stack or self.marks:
                    self.fail("stops in the middle of a value")
                return value
            action = ACTIONS.get(opcode)
            if action is None:
                name = REFUSED_OPCODES.get(opcode, f"0x{opcode.hex()}")
                self.fail(f"uses the opcode {name}, which no checkpoint of tensors needs")
            action(self)
            if self.frame_end:
                self.check_frame()
            if len(stack) > MAX_STACK:
                self.fail(f"has more than {MAX_STACK} values on its stack")
        return self.fail(f"has more than {MAX_OPCODES} opcodes")

    def fail(self, reason: str) -> NoReturn:
        raise Malformed(f"{self.source.what} {reason} (byte {self.source.position})")

    # The stack.

    def pop(self) -> Any:
        # What lies below an open mark belongs to a value that is not finished.
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            self.fail("takes a value that is not there")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        value = self.pop()
        if not isinstance(value, kind):
            self.fail(f"changes a value of the wrong type {type(value).__name__}")
        self.stack.append(value)
        return value

    def since_mark(self) -> list[Any]:
        if not self.marks:
            self.fail("lacks a mark")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def mark(self) -> None:
        if len(self.marks) >= MAX_MARKS:
            self.fail(f"has more than {MAX_MARKS} open marks")
        self.marks.append(len(self.stack))

    # Scalars.

    def number(self, size: int) -> int:
        return int.from_bytes(self.source.take(size), "little")

    def integer(self, size: int) -> None:
        if size > MAX_INT_BYTES:
            self.fail(f"holds an integer of {size} bytes, more than {MAX_INT_BYTES}")
        self.stack.append(int.from_bytes(self.source.take(size), "little", signed=True))

    def text(self, size: int) -> None:
        data = self.source.take(size)
        try:
            self.stack.append(data.decode("utf-8"))
        except UnicodeDecodeError:
            self.fail("holds text that is not UTF-8")

    def protocol(self) -> None:
        version = self.number(1)
        if not 2 <= version <= 5:
            self.fail(f"is of protocol {version}, not 2 to 5")

    def frame(self) -> None:
        # A frame tells a reader how much to fetch at once. Readers that do so read a file whose
        # frames are wrong as something else than those that do not: so it is refused.
        length = self.number(8)
        if length > self.source.size - self.source.position:
            self.source.cut()
        if self.frame_end or not length:
            self.fail("has a frame inside another, or an empty one")
        self.frame_end = self.source.position + length

    def check_frame(self, ends: bool = False) -> None:
        """Fails if an opcode crossed the end of the frame, or the program ``ends`` before it."""
        if self.frame_end:
            left = self.frame_end - self.source.position
            if left < 0 or (ends and left):
                self.fail("has a frame that ends inside a value or behind the last")
            if left == 0:
                self.frame_end = 0

    # Containers.

    def put_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            self.fail("has a key without a value")
        for key, value in zip(self.keys(items[::2]), items[1::2], strict=True):
            target[key] = value

    def keys(self, values: list[Any]) -> list[Any]:
        self.count_numbers(values)
        return [key_of(value) for value in values]

    def count_numbers(self, keys: list[Any]) -> None:
        self.number_keys += sum(map(is_number, keys))
        if self.number_keys > MAX_NUMBER_KEYS:
            self.fail(f"has more than {MAX_NUMBER_KEYS} numbers as keys")

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.put_items([key, value])

    def append(self) -> None:
        value = self.pop()
        self.top(list).append(value)

    def extend(self) -> None:
        items = self.since_mark()
        self.top(list).extend(items)

    def add_items(self) -> None:
        items = self.since_mark()
        self.top(set).update(self.keys(items))

    def frozen(self) -> None:
        self.stack.append(frozenset(self.keys(self.since_mark())))

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    # Memo.

    def remember(self, index: int) -> None:
        # Writers number what they remember, from 0 or (Python 2) from 1. Numbers of a file's
        # choice could be made to collide in the memo.
        if index > len(self.memo) + 1:
            self.fail("remembers a value out of order")
        value = self.pop()
        self.stack.append(value)
        self.memo[index] = value
        if len(self.memo) > MAX_MEMO:
            self.fail(f"remembers more than {MAX_MEMO} values")

    def recall(self, index: int) -> None:
        if index not in self.memo:
            self.fail("recalls a value that it never remembered")
        self.stack.append(self.memo[index])

    # Names and calls.

    def name(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        function = self.functions.get(full)
        if function is None:
            meaning = f" ({self.refused[full]})" if full in self.refused else ""
            raise Malformed(
                f"refuses to call {shown(full)}{meaning}: only tensors and plain containers are "
                "read; if you trust the file, save its state dict alone"
            )
        self.stack.append(Global(full, function))

    def name_by_lines(self) -> None:
        module = self.source.line()
        self.name(module, self.source.line())

    def name_from_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            self.fail("names a global by something else than text")
        self.name(module, name)

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            self.fail("calls something that is no function")
        # A call takes a few bytes and may copy a remembered value again and again.
        for value in (arguments, *arguments):
            if isinstance(value, str | bytes | tuple | list | dict | set | frozenset):
                self.copied += len(value)
        if self.copied > min(self.source.size, MAX_COPIED):
            self.fail("copies more values than it has bytes")
        for value in arguments:
            if isinstance(value, list):  # elements of a set, or pairs for an OrderedDict
                pair = list | tuple
                self.count_numbers([v[0] if isinstance(v, pair) and v else v for v in value])
            elif isinstance(value, dict):  # counts
                self.count_numbers(list(value))
        self.stack.append(function.function(arguments))

    def persist(self) -> None:
        if self.persistent is None:
            self.fail("uses a persistent id")
        self.stack.append(self.persistent(self.pop()))

    def build(self) -> None:
        state, target = self.pop(), self.pop()
        if isinstance(target, NumberType):
            target.set_order(state)
        elif not isinstance(state, dict):
            self.fail("sets the state of an object from something else than a dict")
        elif isinstance(target, Ordered):
            # torch hangs the versions of modules on a state dict.
            if len(state) > 1 or (state and "_metadata" not in state):
                self.fail("sets attributes of an OrderedDict other than _metadata")
        elif isinstance(target, Attributes) and not target.values:
            # The dict itself: a copy could be had again and again for a few bytes.
            target.values = state
        else:
            self.fail(f"sets the state of a value of type {type(target).__name__}")
        self.stack.append(target)


def _push(value: Callable[[], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value())


ACTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    b"(": _Machine.mark,
    # Scalars.
    b"N": _push(lambda: None),
    b"\x88": _push(lambda: True),
    b"\x89": _push(lambda: False),
    b"J": lambda machine: machine.integer(4),
    b"K": lambda machine: machine.stack.append(machine.number(1)),
    b"M": lambda machine: machine.stack.append(machine.number(2)),
    b"\x8a": lambda machine: machine.integer(machine.number(1)),
    b"\x8b": lambda machine: machine.integer(machine.number(4)),
    b"G": lambda machine: machine.stack.append(struct.unpack(">d", machine.source.take(8))[0]),
    # Strings; those of Python 2 (U, T) are text as well.
    b"U": lambda machine: machine.text(machine.number(1)),
    b"T": lambda machine: machine.text(machine.number(4)),
    b"\x8c": lambda machine: machine.text(machine.number(1)),
    b"X": lambda machine: machine.text(machine.number(4)),
    b"\x8d": lambda machine: machine.text(machine.number(8)),
    b"C": lambda machine: machine.stack.append(machine.source.take(machine.number(1))),
    b"B": lambda machine: machine.stack.append(machine.source.take(machine.number(4))),
    b"\x8e": lambda machine: machine.stack.append(machine.source.take(machine.number(8))),
    # Containers.
    b")": _push(tuple),
    b"]": _push(list),
    b"}": _push(dict),
    b"\x8f": _push(set),
    b"t": lambda machine: machine.stack.append(tuple(machine.since_mark())),
    b"\x85": lambda machine: machine.tuple_of(1),
    b"\x86": lambda machine: machine.tuple_of(2),
    b"\x87": lambda machine: machine.tuple_of(3),
    b"a": _Machine.append,
    b"e": _Machine.extend,
    b"s": _Machine.set_item,
    b"u": lambda machine: machine.put_items(machine.since_mark()),
    b"\x90": _Machine.add_items,
    b"\x91": _Machine.frozen,
    # Memo.
    b"q": lambda machine: machine.remember(machine.number(1)),
    b"r": lambda machine: machine.remember(machine.number(4)),
    b"\x94": lambda machine: machine.remember(len(machine.memo)),
    b"h": lambda machine: machine.recall(machine.number(1)),
    b"j": lambda machine: machine.recall(machine.number(4)),
    # Names and calls.
    b"c": _Machine.name_by_lines,
    b"\x93": _Machine.name_from_stack,
    b"R": _Machine.call,
    b"\x81": _Machine.call,
    b"b": _Machine.build,
    b"Q": _Machine.persist,
}
