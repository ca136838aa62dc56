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

Displacing bids are limited, so that rows cannot outbid each other for ever: each bid for a free
column grants a number of them (`grant_of`), and a tie, where displacing would lower no price, is
left to a search.

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

__all__ = ["State", "grant_of", "start", "step", "unfinished"]

_NEVER = jnp.iinfo(jnp.int32).max
# Beyond 4 hardly any problem changes, and price wars of many rows for few columns last longer.
_MOST_GRANTED = 4


class State(NamedTuple):
    """State of ``P`` problems with ``T`` rows and ``Q`` columns; vectors are ``[P, 1]``."""

    unplaced: jax.Array  # int32: units of supply still to be placed
    budget: jax.Array  # int32: displacements still allowed
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


def _next_row(wanted: jax.Array, after: jax.Array) -> jax.Array:
    """The first row from ``after`` on, round and round, that wants a unit; any if none does."""
    rows = _iota(wanted)
    num_rows = wanted.shape[1]
    ahead = rows - after + jnp.where(rows < after, num_rows, 0)
    ahead = jnp.min(jnp.where(wanted > 0, ahead, num_rows), axis=1, keepdims=True)
    row = after + ahead
    return jnp.where(ahead < num_rows, row - jnp.where(row < num_rows, 0, num_rows), 0)


def grant_of(wanted: jax.Array) -> jax.Array:
    """How many displacing bids each bid for a free column grants: ``min(4, 2 (R - 1))``.

    ``R`` is the number of rows that want a column. A search takes at most ``R`` scans and ``R - 1``
    flips after the first for its unit; so does a bid for a free column together with what it
    grants. No problem therefore takes more than ``2 R - 1`` steps a unit, with or without bids.

    Args:
        wanted: int32 ``[P, T]``.

    Returns:
        int32 ``[P, 1]``.
    """
    rows = jnp.sum(jnp.where(wanted > 0, 1, 0), axis=1, keepdims=True, dtype=jnp.int32)
    return jnp.clip(2 * (rows - 1), 0, _MOST_GRANTED)


def start(wanted: jax.Array, absent: jax.Array) -> State:
    """The state in which nothing is placed.

    Args:
        wanted: int32 ``[P, T]``, columns wanted by each row; in total at most those that exist.
        absent: bool ``[P, Q]``, columns that do not exist.
    """
    zero = jnp.zeros((wanted.shape[0], 1), jnp.int32)
    return State(
        unplaced=jnp.sum(wanted, axis=1, keepdims=True, dtype=jnp.int32),
        budget=zero,
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
    state: State, absent: jax.Array, grant: jax.Array, fetch: Callable[[jax.Array], jax.Array]
) -> State:
    """Advances every problem by one step of its own.

    Args:
        state: of `start` or of the step before.
        absent: bool ``[P, Q]``, columns that do not exist.
        grant: int32 ``[P, 1]``, see `grant_of`.
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
    key = jnp.where(beyond <= nearest, ((state.owner + 1) << col_bits) | columns, _NEVER)
    key = jnp.min(key, axis=1, keepdims=True)
    column, holder = key & ((1 << col_bits) - 1), (key >> col_bits) - 1
    second = jnp.min(jnp.where(columns == column, jnp.inf, beyond), axis=1, keepdims=True)

    free = holder < 0
    displacing = scanning & at_root & ~free & (nearest < second) & (state.budget > 0)
    bid = displacing | (scanning & at_root & free)
    found = bid | (scanning & free)
    # What the root's dual rises to. A bid for the last column has no second one.
    level = jnp.where(bid & (second < jnp.inf), second, nearest)
    priced = (scanned & ~absent) | (bid & (columns == column))
    price = jnp.where(found & priced, state.price + (shortest - level), state.price)

    # Flip one edge of the augmenting path, from its free end towards the root.
    sink = jnp.where(found, column, state.sink)
    code = pick(parent, sink)
    taker = code & ((1 << row_bits) - 1)
    previous = (code >> row_bits) - 1
    flipping = active & (sink >= 0)
    owner = jnp.where(flipping & (columns == sink), taker, state.owner)
    placed = flipping & (previous < 0)  # `taker` is the root

    wanted = state.wanted - jnp.where(placed & (rows == taker), 1, 0)
    wanted = wanted + jnp.where(displacing & (rows == holder), 1, 0)
    moved = scanning & ~found
    grants = jnp.where(bid & free, grant, 0)
    return State(
        unplaced=state.unplaced - jnp.where(placed & ~displacing, 1, 0),
        budget=state.budget + grants - jnp.where(displacing, 1, 0),
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
