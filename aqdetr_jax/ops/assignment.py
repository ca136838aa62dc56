"""Exact linear assignment on the device, for many small problems at once.

`aqdetr_jax.ops.assignment_step` has the algorithm. What matters on an accelerator:

* **One flat loop.** A ``vmap`` of nested ``while`` loops runs, for every row, as long as the
  slowest problem of the batch. Here the leading axes are flattened to ``P`` problems, and one
  ``while`` loop advances each of them by one step of its own: a bid, a row scanned, or an edge
  flipped. The number of iterations is the largest *total* work of one problem.
* **One kernel on a TPU.** There an iteration of XLA's loop is some twenty kernels; the whole loop
  is one instead (`aqdetr_jax.ops.assignment_kernel`).
* **Real rows only.** Padded rows are never visited.
* **Rows have a supply.** A target that is matched to ``k`` queries is one row with supply ``k`` (a
  transportation problem), not ``k`` equal rows. The optimum is the same, the cost tensor is ``k``
  times smaller, and the ties between equal rows, which make augmenting paths long, do not exist.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from aqdetr_jax.ops.assignment_step import longest_chain, start, step, unfinished
from aqdetr_jax.ops.mapping import on_each_device

__all__ = ["assign", "assign_repeated", "assign_sharded", "sanitize_cost"]

# Finite costs are limited to this magnitude, so that sums of a few of them stay finite in float32.
_LARGEST_COST = 1e30


def sanitize_cost(cost: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Replaces non-finite costs by a constant above every finite cost of the same problem.

    The constant is computed over the finite cells of valid rows only (a maximum over all cells
    would itself be NaN exactly when it is needed). A problem without any finite cell becomes all
    zeros. Finite cells are limited to ±1e30. The number of replaced cells is returned because a
    guard that does not report hides the cause.

    Args:
        cost: float ``[..., T, Q]``.
        valid: bool ``[..., T]``, broadcastable to the leading axes of ``cost``; cells of other rows
            are set to zero and never counted.

    Returns:
        The finite cost, float32 ``[..., T, Q]``, and the number of replaced cells per problem,
        int32 ``[...]``.
    """
    cost = jnp.asarray(cost, jnp.float32)
    valid = jnp.broadcast_to(valid, cost.shape[:-1])[..., None]
    finite = jnp.isfinite(cost)
    use = finite & valid
    clipped = jnp.clip(cost, -_LARGEST_COST, _LARGEST_COST)
    highest = jnp.max(clipped, axis=(-2, -1), initial=-_LARGEST_COST, where=use)
    lowest = jnp.min(clipped, axis=(-2, -1), initial=_LARGEST_COST, where=use)
    # Relative part: in float32, adding 1 to a number above 2**24 does not change it.
    margin = jnp.maximum(jnp.maximum(highest - lowest, jnp.abs(highest)), 1.0)
    fill = jnp.where(jnp.any(use, axis=(-2, -1)), highest + margin, 0.0)
    bad = valid & ~finite
    clean = jnp.where(use, clipped, jnp.where(bad, fill[..., None, None], 0.0))
    return clean, jnp.sum(bad, axis=(-2, -1), dtype=jnp.int32)


def _loop(cost: jax.Array, wanted: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Solves ``P`` transportation problems in a loop of XLA.

    Args:
        cost: finite float32 ``[P, T, Q]``, no axis empty.
        wanted: int32 ``[P, T]``, columns wanted by each row (0 = padded row), in total at most
            ``count``.
        count: int32 ``[P]``, columns from here on do not exist.

    Returns:
        int32 ``[P, Q]``, the row of each column or -1; and the number of iterations, int32 ``[]``.
    """
    problems, num_rows, num_cols = cost.shape
    columns = lax.broadcasted_iota(jnp.int32, (problems, num_cols), 1)
    absent = columns >= count[:, None]
    longest = longest_chain(wanted)
    rows = cost.reshape(problems * num_rows, num_cols)
    first = jnp.arange(problems, dtype=jnp.int32) * num_rows

    def fetch(row: jax.Array) -> jax.Array:
        return jnp.take(rows, first + row[:, 0], axis=0, mode="clip")

    state, iterations = lax.while_loop(
        lambda carry: unfinished(carry[0]),
        lambda carry: (step(carry[0], absent, longest, fetch), carry[1] + 1),
        (start(wanted, absent), jnp.int32(0)),
    )
    return state.owner, iterations


def _kernel(cost: jax.Array, wanted: jax.Array, count: jax.Array) -> jax.Array:
    """As `_loop`, for a TPU; without the number of iterations."""
    # Here, because the import takes longer than most commands take to answer `--help`.
    from aqdetr_jax.ops import assignment_kernel

    block = assignment_kernel.block_of(cost.shape)
    if block is None:
        return _loop(cost, wanted, count)[0]
    return assignment_kernel.solve(cost, wanted, count, block)


def _solve(cost: jax.Array, supply: jax.Array, count: jax.Array) -> jax.Array:
    """Solves ``P`` problems as the platform does it best: ``owner``, int32 ``[P, Q]``."""
    problems, _, num_cols = cost.shape
    if 0 in cost.shape:
        return jnp.full((problems, num_cols), -1, jnp.int32)
    wanted = _limit(supply, count)
    return lax.platform_dependent(
        cost, wanted, count, tpu=_kernel, default=lambda *problem: _loop(*problem)[0]
    )


def _limit(supply: jax.Array, count: jax.Array) -> jax.Array:
    """Of more units than columns the first ones: the loop must always end."""
    last = jnp.minimum(jnp.cumsum(supply, axis=1, dtype=jnp.int32), count[:, None])
    return jnp.diff(last, axis=1, prepend=0)


def assign_repeated(
    cost: jax.Array,
    supply: jax.Array,
    num_columns: jax.Array | int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Gives every row as many columns as its supply, at the least total cost.

    This is the one-to-one assignment of the set in which row ``t`` is repeated ``supply[t]`` times
    (H-DETR's one-to-many matching, section 3.2 of arXiv:2207.13080), solved without the repetition.

    Args:
        cost: float ``[..., T, Q]``; computed in float32, non-finite cells replaced as
            `sanitize_cost` says.
        supply: int32, broadcastable to ``[..., T]``; columns wanted by each row, 0 for padding. If
            the supplies of a problem sum to more than its columns, the first units are placed (rows
            in order) and the others are not: the loop terminates, but choosing which rows to leave
            out is the caller's business.
        num_columns: int32, broadcastable to ``[...]``; columns from this index on are padding and
            are never used. Default: all ``Q``.

    Returns:
        int32 ``[..., Q]``, the row that holds each column, -1 for none; and int32 ``[...]``, the
        number of replaced non-finite cells. No gradient flows.
    """
    lead, (num_rows, num_cols) = cost.shape[:-2], cost.shape[-2:]
    supply = jnp.broadcast_to(supply, (*lead, num_rows)).astype(jnp.int32)
    count = num_cols if num_columns is None else num_columns
    count = jnp.broadcast_to(jnp.asarray(count, jnp.int32), lead)
    cost, replaced = sanitize_cost(lax.stop_gradient(cost), supply > 0)
    problems = math.prod(lead)
    owner = _solve(
        cost.reshape(problems, num_rows, num_cols),
        supply.reshape(problems, num_rows),
        count.reshape(problems),
    )
    return owner.reshape(*lead, num_cols), replaced


def assign(cost: jax.Array, valid: jax.Array) -> jax.Array:
    """Assigns a different column to every valid row, at the least total cost.

    Same optimum as ``scipy.optimize.linear_sum_assignment(cost[valid])``; where several assignments
    are optimal, any of them.

    Args:
        cost: float ``[..., T, Q]``; computed in float32, non-finite cells replaced as
            `sanitize_cost` says.
        valid: bool, broadcastable to ``[..., T]``. At most ``Q`` rows of a problem may be valid; of
            more, the first ``Q`` are placed.

    Returns:
        int32 ``[..., T]``: the column of each row, -1 for rows that are padded (or not placed). No
        gradient flows.
    """
    owner, _ = assign_repeated(cost, valid)
    num_rows, num_cols = cost.shape[-2:]
    rows = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    columns = jnp.arange(num_cols, dtype=jnp.int32)
    held = owner[..., None, :] == rows
    return jnp.max(jnp.where(held, columns, -1), axis=-1, initial=-1)


def assign_sharded(
    cost: jax.Array,
    supply: jax.Array,
    num_columns: jax.Array | int | None = None,
    *,
    batch_axis: int,
    mesh: Mesh | AbstractMesh | None = None,
    axis: str = "data",
) -> tuple[jax.Array, jax.Array]:
    """`assign_repeated` where each device solves the problems of its own part of the batch.

    Under automatic sharding the loop's predicate covers the whole batch, so that XLA puts an
    all-reduce over all devices into every iteration. Inside ``shard_map`` the loop is local and has
    no collective at all. Mesh axes other than ``axis`` are replicated over; so is ``axis`` where it
    does not divide the batch. (Nor could XLA distribute the TPU's kernel by itself.)

    Args:
        cost: float ``[..., T, Q]``.
        supply: int32, broadcastable to ``[..., T]``.
        num_columns: int32, broadcastable to ``[...]``.
        batch_axis: the axis of ``cost`` that is sharded over ``axis``; one of the leading axes.
        mesh: default: the mesh set by ``jax.set_mesh``. Without one, or inside a ``shard_map`` over
            all its axes, the problems are solved in place.
        axis: name of the mesh axis.

    Returns:
        As `assign_repeated`.

    Raises:
        ValueError: if ``batch_axis`` is not one of the leading axes.
    """
    lead = cost.shape[:-2]
    if not 0 <= batch_axis < len(lead):
        raise ValueError(
            f"batch_axis={batch_axis} must be one of the {len(lead)} leading axes of the cost, "
            f"whose shape is {cost.shape}"
        )
    supply = jnp.broadcast_to(supply, cost.shape[:-1])
    count = cost.shape[-1] if num_columns is None else num_columns
    count = jnp.broadcast_to(jnp.asarray(count, jnp.int32), lead)
    cost = lax.stop_gradient(cost)
    solve = on_each_device(
        assign_repeated, lead[batch_axis], batch_axis=batch_axis, mesh=mesh, axis=axis
    )
    return solve(cost, supply, count)
