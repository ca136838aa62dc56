"""Deformable sampling and the weighted sum of the samples, as one kernel for a TPU.

XLA would gather one row a point into main memory, write the samples, read them again to sum them
up, and in the backward pass scatter as many rows. Here a table of one head of one image, whose rows
hold 2 x 2 neighbours side by side, is made in vector memory, a block of 128 queries at a time
samples it, and what leaves is the sum over a query's points; backward the gradients of the values
(summed in vector memory, in float32), of the fractions between the neighbours, and of the weights.
Nothing as large as the samples, or as a table, is ever in main memory.

A block, forward:

1. copy a table's row for every point and query; rows of one point lie together, [queries, 4 D];
2. turn them, [4 D, queries]: interpolation weights, of a query, are then one row for all channels,
   and the sum of the four neighbours is one of whole registers;
3. hand samples and weights to ``mix``.

Backward repeats this, pulls the cotangent back through ``mix``, and goes the same way in the
opposite order. All arithmetic is float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aqdetr_jax.ops import deformable
from aqdetr_jax.ops.deformable import LevelShapes
from aqdetr_jax.ops.mapping import on_each_device

LANES = 128
CHANNELS = LANES // 4
"""Channels of a head that the kernel takes: with four neighbours they fill a row."""
VECTOR_MEMORY, OLD_VECTOR_MEMORY = 60 * 2**20, 15 * 2**20
"""Bytes of vector memory that the kernel may ask for; a v5p core has 64 MiB, a v5e or v6e 128, and
one of those before them 16."""
OLD_CHIPS = ("TPU v2", "TPU v3", "TPU v4")
TILE = 16
"""A row of a level is padded to a multiple of so many cells: whole tiles, of bfloat16 too."""

Mix = Callable[..., Array]
"""``mix(weights [P, Q], samples [P * D, Q], parameters) -> [D, Q]``, each parameter [1, 1]."""


class _Static(NamedTuple):
    mix: Mix
    treedef: Any
    shapes: LevelShapes
    interpret: bool


def vector_memory() -> int:
    """Bytes that the kernel may ask for on the devices that the program is for."""
    # Of the mesh, whose devices may be elsewhere; without one it is for this machine's.
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return OLD_VECTOR_MEMORY if device.device_kind.startswith(OLD_CHIPS) else VECTOR_MEMORY


def misfit(values: Array, locations: Array, shapes: LevelShapes) -> str | None:
    """Why the kernel cannot take these arrays (of ``sample_and_mix``); None if it can."""
    # Float32 values and their gradient, of four heads, and both of one head as tables.
    needed = 4 * sum((height + 2) * _width(width) for height, width in shapes) * LANES * 4
    if values.shape[-1] != CHANNELS:
        return f"heads have {values.shape[-1]} channels, not {CHANNELS}"
    if needed > vector_memory() * 0.95:
        most = vector_memory() >> 20
        return f"levels {shapes} need {needed >> 20} MiB of vector memory, the kernel has {most}"
    if not all(isinstance(n, int) for n in (*values.shape, *locations.shape)):
        return f"sizes {values.shape} and {locations.shape} are not all known"
    return None


def _width(width: int) -> int:
    """Cells of a row with one of zeros on either side, in whole tiles."""
    return -(-(width + 2) // TILE) * TILE


def sample_and_mix(
    mix: Mix,
    values: Array,
    locations: Array,
    weights: Array,
    parameters: Any,
    shapes: LevelShapes,
    interpret: bool = False,
) -> Array:
    """``mix`` of the bilinear samples of every query and head, see ``deformable.sample_values``.

    Args:
      mix: the product of weights and samples of one head and some queries.
      values: ``[B, S, M, D]``, float32 or bfloat16.
      locations: ``[B, Q, M, L, K, 2]``.
      weights: ``[B, M, Q, L * K]``.
      parameters: whatever else ``mix`` takes, a tree of float32 ``[]`` or ``[M, 1, 1]``; it gets
        a head's.
      shapes: sizes of the levels.
      interpret: run the kernel in XLA's own operations, on any platform.

    Returns:
      ``[B, M, Q, D]`` in the dtype of ``values``, whose gradients are summed in float32.
    """
    batch, heads, queries, _ = weights.shape
    blocks = -(-queries // LANES)

    def in_lanes(x):
        """[B, M, Q, K] -> [B, M, K, blocks * LANES]."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, blocks * LANES - queries), (0, 0)))
        return x.swapaxes(2, 3)

    grids, indices = [], []
    fractions: tuple[list[Array], list[Array]] = ([], [])
    side_by_side = values.reshape(batch, values.shape[1], -1)
    for level, tokens in enumerate(deformable.split_levels(side_by_side, shapes)):
        height, width = shapes[level]
        grid = tokens.reshape(batch, height, width, -1)
        right, more = _width(width) - width - 1, -grid.shape[3] % LANES
        grid = jnp.pad(grid, ((0, 0), (1, 1), (1, right), (0, more)))
        grids.append(grid.reshape(batch, -1, grid.shape[3]))
        points = locations[:, :, :, level].transpose(0, 2, 1, 3, 4)
        x, x_fraction, y, y_fraction = deformable.corners(points, shapes[level])
        indices.append(in_lanes((y + 1) * _width(width) + x + 1))
        fractions[0].append(in_lanes(x_fraction))
        fractions[1].append(in_lanes(y_fraction))
    leaves, treedef = jax.tree.flatten(parameters)
    # At least one, which no mix reads: a block is not empty.
    of_head = [jnp.broadcast_to(jnp.reshape(x, (-1,)), (heads,)) for x in (*leaves, jnp.zeros(()))]
    scalars = jnp.stack(of_head, -1)[..., None]
    scalars = jnp.broadcast_to(scalars, (batch, *scalars.shape))
    mixed = _mixed(
        _Static(mix, treedef, shapes, interpret),
        tuple(grids),
        jnp.concatenate(indices, axis=2),
        jnp.concatenate(fractions[0] + fractions[1], axis=2),
        in_lanes(weights.astype(jnp.float32)),
        scalars,
    )
    return mixed[..., :queries].swapaxes(2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(static, grids, index, fractions, weights, scalars):
    """[B, rows_l, M D]s, [B, M, P, Q], [B, M, 2 P, Q], [B, M, P, Q], [B, M, n, 1] -> [.., D, Q]."""
    return _mixed_fwd(static, grids, index, fractions, weights, scalars)[0]


def _mixed_fwd(static, grids, index, fractions, weights, scalars):
    given = (index, fractions, weights, scalars, *grids)
    result = jax.ShapeDtypeStruct((*weights.shape[:2], CHANNELS, weights.shape[3]), grids[0].dtype)
    return _call(_forward, static, given, _inputs(given), [result], [_block(CHANNELS)])[0], given


def _mixed_bwd(static, given, cotangent):
    results = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in given[1:]]
    specs = _inputs(given)
    d_fractions, d_weights, d_scalars, *d_grids = _call(
        _backward, static, (*given, cotangent), [*specs, _block(CHANNELS)], results, specs[1:]
    )
    d_grids = tuple(d.astype(x.dtype) for d, x in zip(d_grids, given[4:], strict=True))
    return d_grids, None, d_fractions, d_weights, d_scalars


_mixed.defvjp(_mixed_fwd, _mixed_bwd)


def _call(kernel, static, given, in_specs, results, out_specs):
    """The kernel over images, heads and blocks of queries."""
    index, points = given[0], given[0].shape[2]
    tables = [((height + 1) * _width(width), LANES) for height, width in static.shapes]
    scratch = [(points * LANES, LANES), (points * CHANNELS, LANES), *tables]  # rows, samples
    scratch += tables if kernel is _backward else []

    def run(*given):
        batch = given[0].shape[0]
        return pl.pallas_call(
            functools.partial(kernel, static),
            grid=(batch, index.shape[1], index.shape[3] // LANES),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=[x.update(shape=(batch, *x.shape[1:])) for x in results],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            compiler_params=pltpu.CompilerParams(
                vmem_limit_bytes=vector_memory(), dimension_semantics=("arbitrary",) * 3
            ),
            interpret=static.interpret,
            name="deformable_sampling",
        )(*given)

    return on_each_device(run, index.shape[0])(*given)


def _block(rows: int, memory: Any = None) -> pl.BlockSpec:
    """A block of queries of [B, M, rows, Q]."""
    shape = (None, None, rows, LANES)
    return pl.BlockSpec(shape, lambda b, m, i: (b, m, 0, i), memory_space=memory)


def _inputs(given) -> list[pl.BlockSpec]:
    index, fractions, weights, scalars, *grids = given
    blocks = [_block(index.shape[2], pltpu.SMEM)]
    blocks += [_block(x.shape[2]) for x in (fractions, weights)]
    blocks += [pl.BlockSpec((None, None, *scalars.shape[2:]), lambda b, m, i: (b, m, 0, 0))]
    for grid in grids:
        # Four heads at a time, and no others on their way: copying is a small part of the time.
        shape, once = (None, grid.shape[1], LANES), pl.Buffered(1)
        blocks += [pl.BlockSpec(shape, lambda b, m, i: (b, 0, m >> 2), pipeline_mode=once)]
    return blocks


# --- inside the kernel ---------------------------------------------------------------------------


def _each(count: int, do, unroll: bool = False) -> None:
    """``do(i)`` for ``i`` below ``count``."""

    def one(i, _):
        do(i)
        return 0

    lax.fori_loop(0, count, one, 0, unroll=unroll)


def _part(i, size: int):
    """Part i of rows of which every part has ``size``."""
    return pl.ds(pl.multiple_of(i * size, size), size)


def _group(width: int) -> Array:
    """Of every lane of ``width`` rows: which quarter of the lanes it is in."""
    lane = lax.broadcasted_iota(jnp.int32, (width, LANES), 1)
    return lax.shift_right_logical(lane, CHANNELS.bit_length() - 1)


def _to_group(x: Array, source, target) -> Array:
    """Turns the lanes such that one quarter of them comes to the place of another."""
    return pltpu.roll(x, ((target - source) & 3) * CHANNELS, 1)


def _make_tables(static, grids, tables) -> None:
    """The head's tables of 2 x 2 neighbours, when its first block of queries comes."""
    head = pl.program_id(1) & 3

    @pl.when(pl.program_id(2) == 0)
    def _():
        for (height, width), grid, table in zip(static.shapes, grids, tables, strict=True):
            size = _width(width)

            def row(y, grid=grid, table=table, size=size):
                group, found = _group(size), jnp.zeros((size, LANES), jnp.float32)
                for lower in (0, 1):
                    cells = grid[_part(y + lower, size), :].astype(jnp.float32)
                    for right in (0, 1):
                        place = 2 * lower + right
                        found = jnp.where(group == place, _to_group(cells, head, place), found)
                        cells = pltpu.roll(cells, size - 1, 0)
                table[_part(y, size), :] = found

            _each(height + 1, row)


def _add_tables(static, d_tables, d_grids) -> None:
    """What the tables' rows got, to the cells that they hold, after the head's last block."""
    head = pl.program_id(1) & 3

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        for (height, width), d_table, d_grid in zip(static.shapes, d_tables, d_grids, strict=True):
            size = _width(width)

            def row(y, d_table=d_table, d_grid=d_grid, size=size):
                group, given = _group(size), d_table[_part(y, size), :]
                for lower in (0, 1):
                    left, right = (
                        jnp.where(group == head, _to_group(given, 2 * lower + n, head), 0.0)
                        for n in (0, 1)
                    )
                    d_grid[_part(y + lower, size), :] += left + pltpu.roll(right, 1, 0)

            _each(height + 1, row)


def _clear(table) -> None:
    def part(i):
        table[_part(i, TILE), :] = jnp.zeros((TILE, LANES), jnp.float32)

    _each(table.shape[0] // TILE, part)


def _neighbour_weights(fractions, points: int, p) -> tuple[Array, Array, list[Array]]:
    """Fractions along x and y [1, Q] of a point, and the weights of its four neighbours."""
    x, y = fractions[pl.ds(p, 1), :], fractions[pl.ds(points + p, 1), :]
    return x, y, [(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x]


def _neighbours(turned: Array) -> list[Array]:
    return [turned[n * CHANNELS : (n + 1) * CHANNELS] for n in range(4)]


def _sample(static, index, fractions, tables, rows, samples, keep: bool) -> None:
    """Fills ``samples [P * D, Q]``, and with ``keep`` leaves the turned rows in ``rows``."""
    points = index.shape[0]
    of_level = points // len(tables)
    for level, table in enumerate(tables):

        def copy(k, level=level, table=table):
            p = level * of_level + k

            def row(q):
                rows[pl.ds(p * LANES + q, 1), :] = table[pl.ds(index[p, q], 1), :]

            _each(LANES, row, unroll=not static.interpret)

        _each(of_level, copy)

    def interpolate(p):
        at = _part(p, LANES)
        turned = rows[at, :].T
        if keep:
            rows[at, :] = turned
        weights = _neighbour_weights(fractions, points, p)[2]
        found = [w * x for w, x in zip(weights, _neighbours(turned), strict=True)]
        samples[_part(p, CHANNELS), :] = (found[0] + found[1]) + (found[2] + found[3])

    _each(points, interpolate)


def _parameters(static, scalars) -> Any:
    """What ``mix`` takes beside weights and samples."""
    leaves = [scalars[i : i + 1, :] for i in range(static.treedef.num_leaves)]
    return jax.tree.unflatten(static.treedef, leaves)


def _forward(static, index, fractions, weights, scalars, *refs):
    levels = len(static.shapes)
    grids, (mixed, rows, samples, *tables) = refs[:levels], refs[levels:]
    _make_tables(static, grids, tables)
    _sample(static, index, fractions, tables, rows, samples, keep=False)
    found = static.mix(weights[...], samples[...], _parameters(static, scalars))
    mixed[...] = found.astype(mixed.dtype)


def _backward(static, index, fractions, weights, scalars, *refs):
    levels, points = len(static.shapes), index.shape[0]
    grids, (cotangent, d_fractions, d_weights, d_scalars, *given) = refs[:levels], refs[levels:]
    d_grids, (rows, samples, *scratch) = given[:levels], given[levels:]
    tables, d_tables = scratch[:levels], scratch[levels:]
    _make_tables(static, grids, tables)

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_scalars[...] = jnp.zeros(d_scalars.shape, jnp.float32)
        for table in d_tables:
            _clear(table)

    @pl.when((pl.program_id(2) == 0) & (pl.program_id(1) & 3 == 0))
    def _():
        for grid in d_grids:
            _clear(grid)

    _sample(static, index, fractions, tables, rows, samples, keep=True)
    parameters = _parameters(static, scalars)
    found, pullback = jax.vjp(static.mix, weights[...], samples[...], parameters)
    d_weights[...], samples[...], d_parameters = pullback(cotangent[...].astype(found.dtype))
    for i, d in enumerate(jax.tree.leaves(d_parameters)):
        d_scalars[i : i + 1, :] += d

    def spread(p):
        at = _part(p, LANES)
        d_sample = samples[_part(p, CHANNELS), :]
        x, y, of_neighbour = _neighbour_weights(fractions, points, p)
        a, b, c, d = _neighbours(rows[at, :])
        along_x = (1 - y) * (b - a) + y * (d - c)
        along_y = (1 - x) * (c - a) + x * (d - b)
        d_fractions[pl.ds(p, 1), :] = jnp.sum(d_sample * along_x, axis=0, keepdims=True)
        d_fractions[pl.ds(points + p, 1), :] = jnp.sum(d_sample * along_y, axis=0, keepdims=True)
        rows[at, :] = jnp.concatenate([w * d_sample for w in of_neighbour], axis=0).T

    _each(points, spread)

    def add(k):
        # Level beside level: the sums of different tables need not wait for one another.
        def row(q):
            for level, table in enumerate(d_tables):
                p = level * (points // levels) + k
                table[pl.ds(index[p, q], 1), :] += rows[pl.ds(p * LANES + q, 1), :]

        _each(LANES, row, unroll=not static.interpret)

    _each(points // levels, add)
    _add_tables(static, d_tables, d_grids)
