"""Deformable sampling and the weighted sum of the samples, as one kernel for a TPU.

XLA would gather one row a point into main memory, write the samples, read them again to sum them
up, and in the backward pass scatter as many rows. Here the table of 2 x 2 neighbours
(``deformable.packed_table``) of one head of one image is copied into vector memory once, a block of
128 queries at a time samples it, and what leaves is the sum over a query's points; backward the
gradients of the table (summed in vector memory, in float32), of the fractions between the
neighbours, and of the weights. Nothing as large as the samples is ever in main memory.

A block, forward:

1. copy a table's row for every point and query; rows of one point lie together, [queries, 4 D];
2. turn them, [4 D, queries]: interpolation weights, of a query, are then one row for all channels,
   and the sum of the four neighbours is one of whole registers;
3. hand samples and weights to ``mix``.

Backward repeats this, pulls the cotangent back through ``mix``, and goes the same way in the
opposite order. All arithmetic is float32; a bfloat16 table is copied into a float32 one first,
because a single row can only be read of the latter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

from aqdetr_jax.ops import deformable
from aqdetr_jax.ops.deformable import LevelShapes

LANES = 128
CHANNELS = LANES // 4
"""Channels of a head that the kernel takes: with four neighbours they fill a row."""
VECTOR_MEMORY = 100 * 2**20
"""Bytes of vector memory that the kernel may ask for; a v5e or v6e core has 128 MiB."""
CHUNK = 16
"""Rows of a table that are converted or cleared at a time."""

Mix = Callable[..., Array]
"""``mix(weights [P, Q], samples [P * D, Q], parameters) -> [D, Q]``, each parameter [1, 1]."""


class _Static(NamedTuple):
    mix: Mix
    treedef: Any
    levels: int
    dtype: DTypeLike
    interpret: bool


def misfit(values: Array, locations: Array, shapes: LevelShapes) -> str | None:
    """Why the kernel cannot take these arrays (of ``sample_and_mix``); None if it can."""
    # A float32 table, its gradient, and the next head's of each, on their way.
    tables = 4 * sum(_rows(shape) for shape in shapes) * LANES * 4
    if values.shape[-1] != CHANNELS:
        return f"heads have {values.shape[-1]} channels, not {CHANNELS}"
    if tables > VECTOR_MEMORY * 0.9:
        return f"tables of {shapes} need {tables >> 20} MiB of vector memory"
    if not all(isinstance(n, int) for n in (*values.shape, *locations.shape)):
        return f"sizes {values.shape} and {locations.shape} are not all known"
    return None


def _rows(shape: tuple[int, int]) -> int:
    """Rows of a level's table, in whole chunks."""
    return -(-(shape[0] + 1) * (shape[1] + 1) // CHUNK) * CHUNK


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

    tables, indices = [], []
    fractions: tuple[list[Array], list[Array]] = ([], [])
    for level, tokens in enumerate(deformable.split_levels(values, shapes)):
        # A cell is in four rows, whose gradients are summed in float32 too.
        grid = deformable.level_grid(tokens, shapes[level]).astype(jnp.float32)
        points = locations[:, :, :, level].transpose(0, 2, 1, 3, 4)
        index, x_fraction, y_fraction = deformable.packed_index(points, shapes[level])
        table = deformable.packed_table(grid)
        rest = _rows(shapes[level]) - table.shape[2]
        tables.append(jnp.pad(table, ((0, 0), (0, 0), (0, rest), (0, 0))))
        indices.append(in_lanes(index))
        fractions[0].append(in_lanes(x_fraction))
        fractions[1].append(in_lanes(y_fraction))
    leaves, treedef = jax.tree.flatten(parameters)
    # At least one, which no mix reads: a block is not empty.
    of_head = [jnp.broadcast_to(jnp.reshape(x, (-1,)), (heads,)) for x in (*leaves, jnp.zeros(()))]
    scalars = jnp.stack(of_head, -1)[..., None]
    scalars = jnp.broadcast_to(scalars, (batch, *scalars.shape))
    static = _Static(mix, treedef, len(shapes), values.dtype, interpret)
    mixed = _mixed(
        static,
        tuple(tables),
        jnp.concatenate(indices, axis=2),
        jnp.concatenate(fractions[0] + fractions[1], axis=2),
        in_lanes(weights.astype(jnp.float32)),
        scalars,
    )
    return mixed[..., :queries].swapaxes(2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(static, tables, index, fractions, weights, scalars):
    """[B, M, T_l, 4 D]s, [B, M, P, Q], [B, M, 2 P, Q], [B, M, P, Q], [B, M, n, 1] -> [.., D, Q]."""
    return _mixed_fwd(static, tables, index, fractions, weights, scalars)[0]


def _mixed_fwd(static, tables, index, fractions, weights, scalars):
    tables = [table.astype(static.dtype) for table in tables]
    given = (index, fractions, weights, scalars, *tables)
    result = jax.ShapeDtypeStruct((*index.shape[:2], CHANNELS, index.shape[3]), static.dtype)
    mixed = _call(_forward, static, given, _inputs(given), [result], [_block(CHANNELS)])[0]
    return mixed, given


def _mixed_bwd(static, given, cotangent):
    results = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in given[1:]]
    specs = _inputs(given)
    d_fractions, d_weights, d_scalars, *d_tables = _call(
        _backward, static, (*given, cotangent), [*specs, _block(CHANNELS)], results, specs[1:]
    )
    return tuple(d_tables), None, d_fractions, d_weights, d_scalars


_mixed.defvjp(_mixed_fwd, _mixed_bwd)


def _call(kernel, static, given, in_specs, results, out_specs):
    """The kernel over images, heads and blocks of queries."""
    index, points = given[0], given[0].shape[2]
    scratch = [(points * LANES, LANES), (points * CHANNELS, LANES)]  # rows, samples
    if static.dtype != jnp.float32:
        scratch += [table.shape[2:] for table in given[4 : 4 + static.levels]]

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
                vmem_limit_bytes=VECTOR_MEMORY, dimension_semantics=("arbitrary",) * 3
            ),
            interpret=static.interpret,
        )(*given)

    return _on_each_device(run, index.shape[0])(*given)


def _on_each_device(function: Callable[..., Any], batch: int) -> Callable[..., Any]:
    """``function`` of each device's own images: XLA splits no kernel by itself.

    Over the axis "data" of the mesh that is set, if it divides the batch; else every device does
    all of it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return function
    divides = batch % mesh.shape.get("data", batch + 1) == 0
    spec = PartitionSpec("data") if divides else PartitionSpec()
    # check_vma=False: kernels are not checked for what varies between devices.
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def _block(rows: int, memory: Any = None) -> pl.BlockSpec:
    """A block of queries of [B, M, rows, Q]."""
    shape = (None, None, rows, LANES)
    return pl.BlockSpec(shape, lambda b, m, i: (b, m, 0, i), memory_space=memory)


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    """All that [B, M, ., .] has of a head of an image."""
    return pl.BlockSpec((None, None, *shape[2:]), lambda b, m, i: (b, m, 0, 0))


def _inputs(given) -> list[pl.BlockSpec]:
    index, fractions, weights, scalars, *tables = given
    blocks = [_block(index.shape[2], pltpu.SMEM)]
    blocks += [_block(x.shape[2]) for x in (fractions, weights)]
    return [*blocks, *(_whole(x.shape) for x in (scalars, *tables))]


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


def _chunks(table, do) -> None:
    """``do(rows)`` for one chunk of the table's rows after the other."""
    _each(table.shape[0] // CHUNK, lambda i: do(_part(i, CHUNK)))


def _float32(tables: Sequence[Any], scratch: Sequence[Any]) -> Sequence[Any]:
    """The tables themselves, or float32 copies, made for the first block of a head."""
    if not scratch:
        return tables

    @pl.when(pl.program_id(2) == 0)
    def _():
        for table, copy in zip(tables, scratch, strict=True):

            def convert(rows, table=table, copy=copy):
                copy[rows, :] = table[rows, :].astype(jnp.float32)

            _chunks(table, convert)

    return scratch


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
    given, (mixed, rows, samples, *copies) = refs[: static.levels], refs[static.levels :]
    tables = _float32(given, copies)
    _sample(static, index, fractions, tables, rows, samples, keep=False)
    found = static.mix(weights[...], samples[...], _parameters(static, scalars))
    mixed[...] = found.astype(mixed.dtype)


def _backward(static, index, fractions, weights, scalars, *refs):
    levels, points = static.levels, index.shape[0]
    cotangent, d_fractions, d_weights, d_scalars = refs[levels : levels + 4]
    d_tables, refs_left = refs[levels + 4 : 2 * levels + 4], refs[2 * levels + 4 :]
    rows, samples, *copies = refs_left
    tables = _float32(refs[:levels], copies)

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_scalars[...] = jnp.zeros(d_scalars.shape, jnp.float32)
        for table in d_tables:

            def clear(at, table=table):
                table[at, :] = jnp.zeros((CHUNK, LANES), jnp.float32)

            _chunks(table, clear)

    _sample(static, index, fractions, tables, rows, samples, keep=True)
    given = (weights[...], samples[...], _parameters(static, scalars))
    found, pullback = jax.vjp(static.mix, *given)
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
