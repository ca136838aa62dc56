"""What stays float: arithmetic element by element, norms, selections and shapes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from aqdetr_jax.deploy.onnx.graph import Graph, Value, tensor_type
from aqdetr_jax.deploy.onnx.tensors import Coded, Map, MapSum, Sums
from aqdetr_jax.deploy.operations import Operations, Tensor
from aqdetr_jax.deploy.parts import Norm
from aqdetr_jax.ops.activations import SIX

EPSILON = 1e-5
"""Of the norms."""

SWALLOWS = -1e9
"""Numbers up to 32 that are added to it do not change it in float32, and a score's exponential is
0 there whatever is added."""


LARGE, LONG = 1 << 18, 64
"""Numbers of a result for which operands are made larger, and of a run that is long enough."""


class FloatOperations(Operations):
    """The words for floats.

    Attributes:
      graph: what they write to.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self._floats_of: dict[Sums, Value] = {}
        self._repeated: dict[tuple[Value, tuple[int, ...]], Value] = {}

    def value(self, x: Tensor) -> Value:
        """Floats, whole numbers or truth values in the graph; sums and codes as floats."""
        if isinstance(x, Value):
            return x
        if isinstance(x, Sums):
            if x not in self._floats_of:
                self._floats_of[x] = self.sums_as_floats(x)
            return self._floats_of[x]
        if isinstance(x, Coded) and not x.is_map:
            return self.dequantize(x)
        if isinstance(x, Map | Coded | MapSum):
            raise TypeError("a map where floats are expected")
        array = np.asarray(x)
        return self.graph.constant(array.astype("f4") if array.dtype.kind == "f" else array)

    def sums_as_floats(self, x: Sums) -> Value:
        """[..., N] values of sums."""
        raise NotImplementedError

    # --- arithmetic -------------------------------------------------------------------------------

    def elementwise(self, kind: str, *xs: Tensor, dtype: Any = None) -> Value:
        """A node that works element by element, with broadcasting; on rows where it can."""
        constants = [not isinstance(x, Value | Sums | Coded) for x in xs]
        values = [self.value(x) for x in xs]
        shape = np.broadcast_shapes(*(v.shape for v in values))
        values = [
            self._spread(value, shape, np.asarray(x) if constant else None)
            for x, value, constant in zip(xs, values, constants, strict=True)
        ]
        rows = _on_rows(values, shape)
        if rows is not None:
            result = self.elementwise(kind, *rows, dtype=dtype)
            return self.of_rows(result, shape)
        return self.graph.add(kind, values, shape, dtype or values[-1].dtype)

    def _spread(self, value: Value, shape: tuple[int, ...], array: np.ndarray | None) -> Value:
        """An operand as it is, or repeated over inner axes; of a constant with its ``array``.

        ONNX Runtime broadcasts run by run. Where these are of a few numbers each it is ten times as
        slow as otherwise.
        """
        given = (1,) * (len(shape) - len(value.shape)) + value.shape
        large = LARGE if array is None else LONG
        if math.prod(shape) <= large or _run(given, shape) >= LONG:
            return value
        first = len(shape)
        while first and math.prod(shape[first:]) < LONG:
            first -= 1
        spread = (*given[:first], *shape[first:])
        if array is not None:
            return self.value(np.broadcast_to(array, spread))
        if (value, spread) not in self._repeated:
            to = self.graph.constant(spread, np.int64)
            self._repeated[value, spread] = self.graph.add(
                "Expand", [value, to], spread, value.dtype
            )
        return self._repeated[value, spread]

    def of_rows(self, rows: Value, shape: Sequence[int]) -> Value:
        """[rows, C] as another shape that ends in C."""
        if tuple(shape) == rows.shape:
            return rows
        return dataclasses.replace(self.reshaped(rows, shape), rows=rows)

    def rows_of(self, x: Value) -> Value:
        """A value as [rows, C]."""
        if x.rows is not None:
            return x.rows
        return x if len(x.shape) == 2 else self.reshaped(x, (-1, x.shape[-1]))

    def relu(self, x: Tensor) -> Tensor:
        """See ``Operations``."""
        if isinstance(x, Sums | MapSum):
            return dataclasses.replace(x, rectified=True)
        if isinstance(x, Map):
            return Map(self.elementwise("Relu", x.value))
        return self.elementwise("Relu", x)

    def relu6(self, x: Tensor) -> Tensor:
        """See ``Operations``."""
        if isinstance(x, Sums):
            return dataclasses.replace(x, rectified=True, ceiling=SIX)
        return Map(self.clip(x.value, 0.0, SIX))

    def softmax(self, x: Tensor) -> Tensor:
        """See ``Operations``."""
        x = self.value(x)
        return self.graph.add("Softmax", [x], x.shape, x.dtype, axis=-1)

    def sigmoid(self, x: Tensor) -> Tensor:
        """See ``Operations``."""
        return self.elementwise("Sigmoid", x)

    def log(self, x: Tensor) -> Tensor:
        """See ``Operations``."""
        return self.elementwise("Log", x)

    def sin(self, x: Tensor) -> Tensor:
        """See ``Operations``."""
        return self.elementwise("Sin", x)

    def cos(self, x: Tensor) -> Tensor:
        """See ``Operations``."""
        return self.elementwise("Cos", x)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """See ``Operations``."""
        return self.elementwise("Add", a, b)

    def subtract(self, a: Tensor, b: Tensor) -> Tensor:
        """See ``Operations``."""
        return self.elementwise("Sub", a, b)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """See ``Operations``."""
        return self.elementwise("Mul", a, b)

    def divide(self, a: Tensor, b: Tensor) -> Tensor:
        """See ``Operations``."""
        return self.elementwise("Div", a, b)

    def clip(self, x: Tensor, low: float, high: float) -> Tensor:
        """See ``Operations``."""
        return self.elementwise("Clip", x, np.float32(low), np.float32(high))

    def less(self, a: Tensor, b: Tensor) -> Tensor:
        """See ``Operations``."""
        return self.elementwise("Less", a, b, dtype=bool)

    def both(self, a: Tensor, b: Tensor) -> Tensor:
        """See ``Operations``."""
        return self.elementwise("And", a, b)

    def where(self, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """See ``Operations``.

        ``Where`` with broadcasting is slow, several times as slow as arithmetic: zeros are
        multiplied in, and a number so low that it swallows ``a`` (of a masked score) is added.
        """
        if isinstance(b, float) and isinstance(condition, Value):
            if b == 0:
                return self.multiply(a, self.floats(condition))
            if b <= SWALLOWS:
                return self.add(
                    a, self.elementwise("Where", condition, np.float32(0), np.float32(b))
                )
        return self.elementwise("Where", condition, a, b)

    def floats(self, x: Tensor) -> Tensor:
        """See ``Operations``."""
        x = self.value(x)
        if x.dtype == np.float32:
            return x
        return self.cast(x, np.float32)

    def cast(self, x: Value, dtype: Any) -> Value:
        """A value in another type."""
        return self.graph.add("Cast", [x], x.shape, dtype, to=tensor_type(dtype))

    def total(self, x: Tensor, axis: int, *, keep: bool = False) -> Tensor:
        """See ``Operations``."""
        return self.reduced("ReduceSum", self.value(x), axis, keep=keep)

    def reduced(self, kind: str, x: Value, axis: int, *, keep: bool) -> Value:
        """A reduction over an axis."""
        axis %= len(x.shape)
        kept = (1,) if keep else ()
        shape = (*x.shape[:axis], *kept, *x.shape[axis + 1 :])
        axes = self.graph.constant([axis], np.int64)
        return self.graph.add(kind, [x, axes], shape, x.dtype, keepdims=int(keep))

    def running_total(self, x: Tensor, axis: int) -> Tensor:
        """See ``Operations``."""
        x = self.value(x)
        return self.graph.add(
            "CumSum", [x, self.graph.constant(axis % len(x.shape), np.int64)], x.shape, x.dtype
        )

    def normalize(self, x: Tensor, norm: Norm) -> Tensor:
        """See ``Operations``."""
        x = self.value(x)
        scale, bias = (self.value(np.float32(p)) for p in (norm.scale, norm.bias))
        if not norm.groups:
            # As rows: ONNX Runtime has an operator for the norm of a sum of tokens, which takes
            # three times as long as the two apart.
            rows = self.rows_of(x)
            y = self.graph.add(
                "LayerNormalization",
                [rows, scale, bias],
                rows.shape,
                rows.dtype,
                name=norm.name,
                axis=-1,
                epsilon=EPSILON,
            )
            return self.of_rows(y, x.shape)
        centred = self.subtract(x, self._group_means(x, norm.groups))
        variance = self._group_means(self.multiply(centred, centred), norm.groups)
        spread = self.elementwise("Sqrt", self.add(variance, np.float32(EPSILON)))
        return self.add(self.multiply(centred, self.divide(scale, spread)), bias)

    def _group_means(self, x: Value, groups: int) -> Value:
        """[B, S, C] -> [B, 1, C], every group's mean at each of its channels."""
        batch, _, channels = x.shape
        means = self.reduced("ReduceMean", x, 1, keep=True)
        means = self.reshape(means, (batch, groups, channels // groups))
        means = self.reduced("ReduceMean", means, 2, keep=True)
        shape = self.graph.constant((batch, groups, channels // groups), np.int64)
        spread = self.graph.add("Expand", [means, shape], (batch, groups, channels // groups), "f4")
        return self.reshape(spread, (batch, 1, channels))

    # --- selections -------------------------------------------------------------------------------

    def best(self, x: Tensor, count: int) -> Tensor:
        """See ``Operations``."""
        x = self.value(x)
        return self.graph.add_many(
            "TopK",
            [x, self.graph.constant([count], np.int64)],
            [((x.shape[0], count), x.dtype), ((x.shape[0], count), np.int64)],
            axis=-1,
            largest=1,
            sorted=1,
        )[1]

    def greatest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Operations``."""
        x = self.value(x)
        greatest = self.reduced("ReduceMax", x, -1, keep=False)
        shape = x.shape[:-1]
        index = self.graph.add("ArgMax", [x], shape, np.int64, axis=-1, keepdims=0)
        return greatest, index

    def divided(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """See ``Operations``."""
        x = self.value(x)
        by = self.graph.constant(n, x.dtype)
        return self.elementwise("Div", x, by), self.elementwise("Mod", x, by)

    def rows(self, x: Tensor, indices: Tensor) -> Tensor:
        """See ``Operations``."""
        x, indices = self.value(x), self.value(indices)
        batch, count = indices.shape
        places = self.reshape(self.cast(indices, np.int64), (batch, count, 1))
        shape = (batch, count, x.shape[2])
        return self.graph.add("GatherND", [x, places], shape, x.dtype, batch_dims=1)

    # --- shapes -----------------------------------------------------------------------------------

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """See ``Operations``."""
        if isinstance(x, Sums):
            return x.shape
        return x.value.shape if isinstance(x, Coded) else self.value(x).shape

    def reshape(self, x: Tensor, shape: Sequence[Any]) -> Tensor:
        """See ``Operations``."""
        if isinstance(x, Coded):
            return dataclasses.replace(x, value=self.reshaped(x.value, shape))
        x = self.value(x)
        shape = _whole(shape, x.shape)
        if x.rows is not None and shape[-1] == x.shape[-1]:
            return self.of_rows(x.rows, shape)
        return self.reshaped(x, shape)

    def reshaped(self, x: Value, shape: Sequence[Any]) -> Value:
        """``reshape`` of a value."""
        shape = _whole(shape, x.shape)
        if shape == x.shape:
            return x
        return self.graph.add("Reshape", [x, self.graph.constant(shape, np.int64)], shape, x.dtype)

    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """See ``Operations``."""
        if isinstance(x, Coded):
            return dataclasses.replace(x, value=self.transposed(x.value, axes))
        return self.transposed(self.value(x), axes)

    def transposed(self, x: Value, axes: Sequence[int]) -> Value:
        """``transpose`` of a value."""
        shape = [x.shape[i] for i in axes]
        return self.graph.add("Transpose", [x], shape, x.dtype, perm=list(axes))

    def concatenate(self, xs: Sequence[Tensor], axis: int) -> Tensor:
        """See ``Operations``."""
        values = [self.value(x) for x in xs]
        axis %= len(values[0].shape)
        shape = list(values[0].shape)
        shape[axis] = sum(v.shape[axis] for v in values)
        return self.graph.add("Concat", values, shape, values[0].dtype, axis=axis)

    def part(self, x: Tensor, axis: int, start: int, stop: int) -> Tensor:
        """See ``Operations``."""
        if isinstance(x, Coded):
            sliced = self.sliced(x.value, axis, start, stop)
            return dataclasses.replace(x, value=sliced)
        return self.sliced(self.value(x), axis, start, stop)

    def sliced(self, x: Value, axis: int, start: int, stop: int, step: int = 1) -> Value:
        """``part`` of a value."""
        axis %= len(x.shape)
        taken = range(x.shape[axis])[start:stop:step]
        if len(taken) == x.shape[axis] and step == 1:
            return x
        shape = list(x.shape)
        shape[axis] = len(taken)
        ends = [self.graph.constant([n], np.int64) for n in (taken.start, taken.stop, axis, step)]
        return self.graph.add("Slice", [x, *ends], shape, x.dtype)

    def repeat_batch(self, x: Any, like: Tensor) -> Tensor:
        """See ``Operations``."""
        x = np.asarray(x, np.float32)
        return self.graph.constant(np.broadcast_to(x, (self.shape(like)[0], *x.shape)))


def _run(given: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """How many numbers of a result lie side by side for which an operand is one or as many."""
    run, kind = 1, None
    for mine, all_ in zip(given[::-1], shape[::-1], strict=True):
        if all_ == 1:
            continue
        if kind is not None and kind != (mine == all_):
            break
        run, kind = run * all_, mine == all_
    return run


def _on_rows(values: Sequence[Value], shape: tuple[int, ...]) -> list[Value] | None:
    """The operands as rows, where all of them have rows or are the same for every row."""
    if all(value.rows is None for value in values):
        return None
    found = []
    for value in values:
        if value.rows is not None and value.shape == shape:
            found.append(value.rows)
        elif math.prod(value.shape) == 1 or value.shape == shape[-1:]:
            found.append(value)
        else:
            return None
    return found


def _whole(shape: Sequence[Any], given: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without -1."""
    shape = [int(n) for n in shape]
    if -1 in shape:
        rest = -math.prod(shape)
        shape[shape.index(-1)] = math.prod(given) // rest
    if math.prod(shape) != math.prod(given):
        raise ValueError(f"{list(given)} cannot be {shape}")
    return tuple(shape)
