"""The assignment solver's loop as one TPU kernel.

A grid step solves a block of problems side by side, one in each sublane, with their costs and the
loop's state in vector memory: an iteration costs some hundred to two thousand cycles for all of
them (`experiments/matcher.py` counts the instructions), where a loop of XLA launches some twenty
kernels of at least 1 800 cycles each.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aqdetr_jax.ops.assignment_step import State, longest_chain, start, step, unfinished

__all__ = ["block_of", "solve"]

_SUBLANES, _LANES = 8, 128
# Of the 16 MiB that a kernel may use unless it asks for more; the rest is for the loop's state.
_COST_BYTES = 12 << 20
# The rows of a block are fetched by unrolled code.
_MOST_PROBLEMS = 48


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def block_of(shape: tuple[int, ...]) -> int | None:
    """The number of problems of a block, or None where not even the smallest one fits.

    Args:
        shape: of the cost, ``[P, T, Q]``.
    """
    problems, num_rows, num_cols = shape
    each = 4 * _up(num_rows, _SUBLANES) * _up(num_cols, _LANES)
    most = min(_COST_BYTES // each, _MOST_PROBLEMS) // _SUBLANES * _SUBLANES
    if not most:
        return None
    blocks = -(-problems // most)
    return _up(-(-problems // blocks), _SUBLANES)


def _body(cost: Any, wanted: Any, count: Any, owner: Any, rows: Any, *state: Any) -> None:
    """The kernel: references to a block's inputs, its output, and scratch memory."""
    absent = lax.broadcasted_iota(jnp.int32, owner.shape, 1) >= count[...]
    longest = longest_chain(wanted[...])

    def fetch(row: jax.Array) -> jax.Array:
        for problem in range(cost.shape[0]):
            rows[pl.ds(problem, 1), :] = cost[problem, pl.ds(row[problem, 0], 1), :]
        return rows[...]

    def load() -> State:
        values = State(*(reference[...] for reference in state))
        return values._replace(scanned=values.scanned != 0)

    def store(values: State) -> jax.Array:
        for reference, value in zip(state, values, strict=True):
            reference[...] = value.astype(reference.dtype)
        return unfinished(values)

    more = store(start(wanted[...], absent))
    lax.while_loop(lambda more: more, lambda _: store(step(load(), absent, longest, fetch)), more)
    owner[...] = State(*state).owner[...]


@functools.partial(jax.jit, static_argnames=("block", "interpret"))
def solve(
    cost: jax.Array, wanted: jax.Array, count: jax.Array, block: int, *, interpret: bool = False
) -> jax.Array:
    """Solves ``P`` transportation problems.

    Args:
        cost: finite float32 ``[P, T, Q]``, no axis empty.
        wanted: int32 ``[P, T]``, columns wanted by each row (0 = padded row), in total at most
            ``count``.
        count: int32 ``[P]``, columns from here on do not exist.
        block: problems solved side by side, a multiple of 8; see `block_of`.
        interpret: run on any device, slowly (for tests).

    Returns:
        int32 ``[P, Q]``, the row of each column or -1.
    """
    problems, num_rows, num_cols = cost.shape
    padding, width = -problems % block, _up(num_cols, _LANES)
    cost = jnp.pad(cost, ((0, padding), (0, 0), (0, width - num_cols)))
    wanted = jnp.pad(wanted, ((0, padding), (0, 0)))
    count = jnp.pad(count, (0, padding))[:, None]

    integer, number = (pltpu.VMEM((block, 1), dtype) for dtype in (jnp.int32, jnp.float32))
    integers, numbers = (pltpu.VMEM((block, width), dtype) for dtype in (jnp.int32, jnp.float32))
    state: Any = State(
        unplaced=integer,
        budget=integer,
        chain=integer,
        row=integer,
        entry=integer,
        distance=number,
        sink=integer,
        wanted=pltpu.VMEM((block, num_rows), jnp.int32),
        owner=integers,
        price=numbers,
        scanned=integers,  # booleans have no place in vector memory
        shortest=numbers,
        parent=integers,
    )
    owner = pl.pallas_call(
        _body,
        grid=((problems + padding) // block,),
        in_specs=[
            # One buffer: copying a block takes some 10 us, which a second one would only hide.
            pl.BlockSpec(
                (block, num_rows, width), lambda i: (i, 0, 0), pipeline_mode=pl.Buffered(1)
            ),
            pl.BlockSpec((block, num_rows), lambda i: (i, 0)),
            pl.BlockSpec((block, 1), lambda i: (i, 0)),
        ],
        out_specs=pl.BlockSpec((block, width), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((problems + padding, width), jnp.int32),
        scratch_shapes=[numbers, *state],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="assignment",
    )(cost, wanted, count)
    return owner[:problems, :num_cols]
