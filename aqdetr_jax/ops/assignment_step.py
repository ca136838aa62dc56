"""One step of the exact assignment solver, on many small problems side by side.

The method is that of Jonker and Volgenant ("A shortest augmenting path algorithm for dense and
sparse linear assignment problems", Computing 38, 1987). Every row has a supply, the number of
columns that it is to hold; every column has a price (its dual). After every placed unit, prices
and owners satisfy complementary slackness, so that the assignment is optimal when all units are
placed. One step does one of three things for each problem:

* **Bid.** The row takes the nearest column that it does not hold and raises its dual to the second
  nearest, as far as slackness allows (the paper's augmenting row reduction). If the column was held
  by another row, that row wants a unit again. Most units need one bid and nothing else.
* **Scan.** Where no bid is made, the row was the first of a search for the shortest augmenting
  path; each step relaxes the paths through one more row. The step that reaches a free column
  updates the prices.
* **Flip.** One edge of the path found, from its free end towards the root. The first one is flipped
  in the step that found the end.

Where all rows want the same few columns, displacing bids raise prices in small steps and a search
is faster. So a row of displacements (a chain) has a longest length (`longest_chain`) and must be
paid for: a chain that ends at a free column is paid one and a half times, one that ends in a search
is lost, and a bid that displaces nothing pays a quarter. A tie, where displacing would lower no
price, is always left to a search.

All state lives on ``[P, Q]``, ``[P, T]`` and ``[P, 1]`` arrays and is written by ``where`` on
one-hot masks: batched scatters become serial loops on TPU. Both XLA and Mosaic compile `step`; the
latter knows no ``where`` between two booleans and no integer division.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["State", "longest_chain", "start", "step", "unfinished"]

# In quarters of a displacing bid.
_COST, _PAID, _PAID_ALONE, _AT_FIRST = 4, 6, 1, 8
_LONGEST_CHAIN = 6


class State(NamedTuple):
    """State of ``P`` problems with ``T`` rows and ``Q`` columns; vectors are ``[P, 1]``."""

    unplaced: jax.Array  # int32: units of supply still to be placed
    budget: jax.Array  # int32: for displacing bids, in quarters of one
    chain: jax.Array  # int32: displacing bids since a column was last taken that was free
    row: jax.Array  # int32: the row to scan now
    entry: jax.Array  # int32: the column through which `row` was reached; -1 at the root
    distance: jax.Array  # float32: length of the shortest path to `entry`
    sink: jax.Array  # int32: the column whose edge is to be flipped; -1 while scanning
    wanted: jax.Array  # int32 [P, T]: units still to be placed, by row
    owner: jax.Array  # int32 [P, Q]: row that holds the column; -1 = free
    price: jax.Array  # float32 [P, Q]: dual of the column, at most 0; 0 on every free column
    scanned: jax.Array  # bool [P, Q]: column is in the tree (or does not exist)
    shortest: jax.Array  # float32 [P, Q]: length of the shortest path found to the column
    parent: jax.Array  # int32 [P, Q]: the path's last step, entry + 1 and row packed


def _iota(like: jax.Array) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, like.shape, 1)


def _exact(values: jax.Array, largest: int) -> jax.Array:
    """Integers from 0 to ``largest`` in the type in which they are reduced fastest.

    Across lanes a TPU reduces only floats (an integer takes two of them), and on a CPU floats have
    kernels of their own.
    """
    return values.astype(jnp.float32) if largest <= 1 << 24 else values


def _least(values: jax.Array, largest: int) -> jax.Array:
    """The least of integers from 0 to ``largest``, int32 ``[P, 1]``."""
    least = jnp.min(_exact(values, largest), axis=1, keepdims=True)
    return least.astype(jnp.int32)


def _next_row(wanted: jax.Array, after: jax.Array) -> jax.Array:
    """The first row from ``after`` on, round and round, that wants a unit; any if none does."""
    rows = _iota(wanted)
    num_rows = wanted.shape[1]
    ahead = rows - after + jnp.where(rows < after, num_rows, 0)
    ahead = _least(jnp.where(wanted > 0, ahead, num_rows), num_rows)
    row = after + ahead
    return jnp.where(ahead < num_rows, row - jnp.where(row < num_rows, 0, num_rows), 0)


def longest_chain(wanted: jax.Array) -> jax.Array:
    """How many displacing bids may follow each other: ``min(6, R - 1)``.

    ``R`` is the number of rows that want a column. A search takes at most ``R`` scans and ``R - 1``
    flips after the first for its unit, and no problem takes more than that for each unit with bids
    either: a bid for a free column after ``d`` displacing ones leaves ``2 R - 2 - d`` of it unused,
    at least the ``d / 2`` by which it lets the lost chains grow, and the first bid of all, which
    displaces nothing, leaves the two displacing bids that are free at first.

    Args:
        wanted: int32 ``[P, T]``.

    Returns:
        int32 ``[P, 1]``.
    """
    rows = jnp.sum(jnp.where(wanted > 0, 1, 0), axis=1, keepdims=True, dtype=jnp.int32)
    return jnp.minimum(rows - 1, _LONGEST_CHAIN)


def start(wanted: jax.Array, absent: jax.Array) -> State:
    """The state in which nothing is placed.

    Args:
        wanted: int32 ``[P, T]``, columns wanted by each row; in total at most those that exist.
        absent: bool ``[P, Q]``, columns that do not exist.
    """
    zero = jnp.zeros((wanted.shape[0], 1), jnp.int32)
    return State(
        unplaced=jnp.sum(wanted, axis=1, keepdims=True, dtype=jnp.int32),
        budget=zero + _AT_FIRST,
        chain=zero,
        row=_next_row(wanted, zero),
        entry=zero - 1,
        distance=zero.astype(jnp.float32),
        sink=zero - 1,
        wanted=wanted,
        owner=jnp.full(absent.shape, -1, jnp.int32),
        price=jnp.zeros(absent.shape, jnp.float32),
        scanned=absent,
        shortest=jnp.full(absent.shape, jnp.inf, jnp.float32),
        parent=jnp.zeros(absent.shape, jnp.int32),
    )


def unfinished(state: State) -> jax.Array:
    """Whether any problem has units to place, bool ``[]``."""
    return jnp.max(state.unplaced) > 0


def step(
    state: State, absent: jax.Array, longest: jax.Array, fetch: Callable[[jax.Array], jax.Array]
) -> State:
    """Advances every problem by one step of its own.

    Args:
        state: of `start` or of the step before.
        absent: bool ``[P, Q]``, columns that do not exist.
        longest: int32 ``[P, 1]``, see `longest_chain`.
        fetch: gives the finite costs float32 ``[P, Q]`` of one row int32 ``[P, 1]`` of each
            problem.
    """
    num_rows, num_cols = state.wanted.shape[1], state.owner.shape[1]
    row_bits, col_bits = (num_rows - 1).bit_length(), (num_cols - 1).bit_length()
    columns = _iota(state.owner)
    rows = _iota(state.wanted)
    active = state.unplaced > 0
    scanning = active & (state.sink < 0)

    def pick(values: jax.Array, column: jax.Array) -> jax.Array:
        """``values[p, column[p]]`` as ``[P, 1]``; 0 where ``column`` is -1."""
        return jnp.sum(jnp.where(columns == column, values, 0), axis=1, keepdims=True)

    # Scan a row: relax the paths that continue through it.
    reduced = fetch(state.row) - state.price
    # A held column has reduced cost equal to its row's dual, so that no row duals are stored.
    at_root = state.entry < 0
    offset = jnp.where(at_root, 0.0, state.distance - pick(reduced, state.entry))
    length = reduced + offset
    fresh = scanning & ~state.scanned
    # All columns held by the scanned row are as near as the row itself and lead back to it.
    held = fresh & (state.owner == state.row)
    better = fresh & ~held & (length < state.shortest)
    shortest = jnp.where(held | better, length, state.shortest)
    parent = jnp.where(better, ((state.entry + 1) << row_bits) | state.row, state.parent)
    scanned = state.scanned | held

    # The nearest column outside the tree; among equals a free one, which ends the search.
    beyond = jnp.where(scanned, jnp.inf, shortest)
    nearest = jnp.min(beyond, axis=1, keepdims=True)
    never = (num_rows + 1) << col_bits
    key = jnp.where(beyond <= nearest, ((state.owner + 1) << col_bits) | columns, never)
    key = _least(key, never)
    column, holder = key & ((1 << col_bits) - 1), (key >> col_bits) - 1
    second = jnp.min(jnp.where(columns == column, jnp.inf, beyond), axis=1, keepdims=True)

    free = holder < 0
    allowed = (nearest < second) & (state.budget >= _COST) & (state.chain < longest)
    displacing = scanning & at_root & ~free & allowed
    bid = displacing | (scanning & at_root & free)
    found = bid | (scanning & free)
    # What the root's dual rises to. A bid for the last column has no second one.
    level = jnp.where(bid & (second < jnp.inf), second, nearest)
    priced = (scanned & ~absent) | (bid & (columns == column))
    price = jnp.where(found & priced, state.price + (shortest - level), state.price)

    # Flip one edge of the augmenting path, from its free end towards the root.
    sink = jnp.where(found, column, state.sink)
    code = pick(_exact(parent, (num_cols + 1) << row_bits), sink).astype(jnp.int32)
    taker = code & ((1 << row_bits) - 1)
    previous = (code >> row_bits) - 1
    flipping = active & (sink >= 0)
    owner = jnp.where(flipping & (columns == sink), taker, state.owner)
    placed = flipping & (previous < 0)  # `taker` is the root

    wanted = state.wanted - jnp.where(placed & (rows == taker), 1, 0)
    wanted = wanted + jnp.where(displacing & (rows == holder), 1, 0)
    moved = scanning & ~found
    paid = jnp.where(state.chain > 0, _PAID * state.chain, _PAID_ALONE)
    paid = jnp.where(bid & free, paid, 0) - jnp.where(displacing, _COST, 0)
    return State(
        unplaced=state.unplaced - jnp.where(placed & ~displacing, 1, 0),
        budget=state.budget + paid,
        chain=jnp.where(placed, jnp.where(displacing, state.chain + 1, 0), state.chain),
        row=jnp.where(placed, _next_row(wanted, taker), jnp.where(moved, holder, state.row)),
        entry=jnp.where(placed, -1, jnp.where(moved, column, state.entry)),
        distance=jnp.where(moved, nearest, state.distance),
        sink=jnp.where(placed, -1, jnp.where(flipping, previous, sink)),
        wanted=wanted,
        owner=owner,
        price=price,
        scanned=(scanned & ~placed) | absent,
        shortest=jnp.where(placed, jnp.inf, shortest),
        parent=parent,
    )
