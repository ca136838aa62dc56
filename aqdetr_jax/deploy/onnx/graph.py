"""An ONNX graph in the making: nodes, constants, and every value's shape and type."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor of the graph.

    Attributes:
      name: unique in the graph.
      shape: of integers; nothing is symbolic.
      dtype: NumPy's.
      rows: the same elements as [rows, C], where this is a reshape of that. What works element by
        element or on rows takes it instead, so that no reshape comes between what a runtime fuses.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Value | None = None


class Graph:
    """Collects nodes; ``finish`` makes a graph of those that an output needs."""

    def __init__(self):
        self._nodes: list[NodeProto] = []
        self._inputs: list[Value] = []
        self._outputs: list[Value] = []
        self._constants: dict[tuple, Value] = {}
        self._tensors: dict[str, TensorProto] = {}
        self._counts: dict[str, int] = {}

    def unique(self, name: str) -> str:
        """``name``, or ``name:1`` and so on where it is taken."""
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        return f"{name}:{count}" if count else name

    def input(self, name: str, shape: Sequence[int], dtype: DTypeLike) -> Value:
        """Declares an input."""
        value = Value(self.unique(name), tuple(shape), np.dtype(dtype))
        self._inputs.append(value)
        return value

    def output(self, name: str, value: Value) -> None:
        """Gives a value out under a name."""
        named = self.add("Identity", [value], value.shape, value.dtype, name=name)
        self._outputs.append(named)

    def constant(self, array: ArrayLike, dtype: DTypeLike | None = None) -> Value:
        """An array as a value; equal arrays are one."""
        array = np.ascontiguousarray(np.asarray(array, dtype)).reshape(np.shape(array))
        key = (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._constants:
            value = Value(self.unique(f"constant_{len(self._constants)}"), array.shape, array.dtype)
            self._constants[key] = value
            self._tensors[value.name] = numpy_helper.from_array(array, value.name)
        return self._constants[key]

    def add(
        self,
        kind: str,
        inputs: Sequence[Value],
        shape: Sequence[int],
        dtype: DTypeLike,
        *,
        name: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Value:
        """Appends a node of one output.

        Args:
          kind: type of the operator.
          inputs: operands.
          shape: of the result, which the caller knows.
          dtype: of the result.
          name: of the result and of the node; a number is added where it is taken.
          domain: of the operator.
          **attributes: of the operator.
        """
        given = [(shape, dtype)]
        return self.add_many(kind, inputs, given, name=name, domain=domain, **attributes)[0]

    def add_many(
        self,
        kind: str,
        inputs: Sequence[Value],
        outputs: Sequence[tuple[Sequence[int], DTypeLike]],
        *,
        name: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> list[Value]:
        """Appends a node; as ``add``, with (shape, dtype) of every output."""
        names = [self.unique(kind.lower() if name is None else name) for _ in outputs]
        given = [x.name for x in inputs]
        node = helper.make_node(kind, given, names, names[0], domain=domain, **attributes)
        self._nodes.append(node)
        return [
            Value(name, tuple(int(n) for n in shape), np.dtype(dtype))
            for name, (shape, dtype) in zip(names, outputs, strict=True)
        ]

    def finish(self, name: str) -> GraphProto:
        """The graph, without what no output needs."""
        wanted = {value.name for value in self._outputs}
        kept: list[NodeProto] = []
        for node in reversed(self._nodes):
            if wanted.intersection(node.output):
                wanted.update(node.input)
                kept.append(node)
        return helper.make_graph(
            kept[::-1],
            name,
            [_described(x) for x in self._inputs],
            [_described(x) for x in self._outputs],
            [tensor for key, tensor in self._tensors.items() if key in wanted],
        )


def _described(value: Value) -> ValueInfoProto:
    return helper.make_tensor_value_info(value.name, tensor_type(value.dtype), value.shape)


def tensor_type(dtype: DTypeLike) -> int:
    """ONNX's number of a type."""
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
