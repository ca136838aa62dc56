"""Multi-scale deformable attention (Zhu et al., ICLR 2021, section 4.1) as pure functions.

Eq. 3: ``sum_m W_m [ sum_lk A_mlqk W'_m x^l(phi_l(p_q) + dp_mlqk) ]`` (heads m, levels l, points k).
Here are the samples ``W' x^l(...)`` (``sample_values``) and where they are taken
(``sampling_locations``); projections and the weighted sum belong to the module.

A level is a grid of cells; a location is a point (x, y) of the unit square over that grid, whose
cell ``i`` has its centre at ``(i + 0.5) / size``. Sampling is bilinear between cell centres with
zeros outside (torch's ``grid_sample`` with ``align_corners=False``, "zeros").

The same samples can be had in three ways, which agree to rounding, forward and gradient:

* "gather": four rows per point, one for each neighbour. The plain reference.
* "packed": one row per point, out of a map whose cells hold their 2 x 2 neighbours: a fourth of the
  gathers (and of the backward pass' scatters), four times as wide. Neighbours lie beside channels
  and so do points, so that 128 lanes of a vector unit are filled: products with matrices of zeros
  and ones spread the weights over the channels and put each point's sum in its place.
* "dense": a matrix product with the interpolation weights of every cell; without any gather, for
  levels of few cells.

On a TPU their weighted sum can be had without the samples: ``deformable_kernel``.

Gradients with respect to a location are those of the cell right of (below) a centre where a point
hits it exactly, in all of them.

Values may be bfloat16. Locations and all sums are float32 still, those over the points that share
a cell in the backward pass too: a cell of a coarse level is hit by hundreds of points, whose sum a
bfloat16 does not hold. ("dense" and "packed" then round their weights to bfloat16, as operands of a
matrix product.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

LevelShapes = tuple[tuple[int, int], ...]
"""(height, width) of each level; static."""

Sampling = Literal["auto", "gather", "packed", "dense", "kernel"]

DENSE_CELLS = 256
"""Levels of at most this many cells count as small; see ``experiments/deformable_tpu.py``."""


def token_count(shapes: LevelShapes) -> int:
    """S, cells of all levels."""
    return sum(h * w for h, w in shapes)


def split_levels(tokens: Array, shapes: LevelShapes) -> list[Array]:
    """``[B, S, ...]`` -> one ``[B, H_l W_l, ...]`` per level."""
    stops = np.cumsum([h * w for h, w in shapes])[:-1]
    return jnp.split(tokens, stops, axis=1)


def valid_ratios(masks: Sequence[Array]) -> Array:
    """The part of each level that is no padding.

    Args:
      masks: bool ``[B, H_l, W_l]`` per level, True = real; images lie in the top left corner.

    Returns:
      float32 ``[B, L, 2]``: (x, y) ratio in (0, 1], by the first row and the first column.
    """
    ratios = [
        jnp.stack([jnp.mean(m[:, 0, :], -1, dtype="f4"), jnp.mean(m[:, :, 0], -1, dtype="f4")], -1)
        for m in masks
    ]
    return jnp.stack(ratios, axis=1)


def encoder_reference_points(shapes: LevelShapes, ratios: Array) -> Array:
    """Every cell's own centre, on all levels.

    Args:
      shapes: sizes of the levels.
      ratios: ``[B, L, 2]``, see ``valid_ratios``.

    Returns:
      float32 ``[B, S, L, 2]``: token s's centre in units of level l's whole grid. (The centre in
      units of the image without padding, times the level's valid ratio.)
    """
    points = []
    for level, (height, width) in enumerate(shapes):
        y, x = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
        cells = np.stack([x, y], -1).reshape(1, -1, 2).astype("f4")
        points.append(cells / (ratios[:, level, None] * np.array([width, height], "f4")))
    return jnp.concatenate(points, axis=1)[:, :, None] * ratios[:, None]


def encoder_proposals(masks: Sequence[Array]) -> tuple[Array, Array]:
    """The boxes that stand for the encoder's tokens in the two-stage variant (appendix A.4).

    Each is centred on its token and 0.05 * 2^l wide and high, in units of the real image.

    Args:
      masks: bool ``[B, H_l, W_l]`` per level, True = real.

    Returns:
      (boxes float32 ``[B, S, 4]``, cxcywh; bool ``[B, S]``, whether a token may propose: it is no
      padding and its box lies in (0.01, 0.99) in every coordinate).
    """
    boxes, allowed = [], []
    for level, mask in enumerate(masks):
        height, width = mask.shape[1:]
        real = jnp.stack([jnp.sum(mask[:, 0, :], -1), jnp.sum(mask[:, :, 0], -1)], -1)
        y, x = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
        centres = np.stack([x, y], -1).reshape(1, -1, 2).astype("f4") / real[:, None]
        size = jnp.full_like(centres, 0.05 * 2.0**level)
        boxes.append(jnp.concatenate([centres, size], -1))
        allowed.append(mask.reshape(mask.shape[0], -1))
    box = jnp.concatenate(boxes, 1)
    inside = jnp.all((box > 0.01) & (box < 0.99), axis=-1)
    return box, inside & jnp.concatenate(allowed, 1)


def sampling_locations(reference: Array, offsets: Array, shapes: LevelShapes) -> Array:
    """``phi_l(p_q) + dp_mlqk``.

    Args:
      reference: ``[B, Q, L, 2]`` points, or ``[B, Q, L, 4]`` boxes (cx, cy, w, h), in units of the
        level's grid.
      offsets: ``[B, Q, M, L, K, 2]`` as predicted (M heads, K points): in cells of the level for
        points, in halves of the box divided by K for boxes.
      shapes: sizes of the levels.

    Returns:
      ``[B, Q, M, L, K, 2]`` locations, (x, y).
    """
    centre = reference[:, :, None, :, None, :2]
    if reference.shape[-1] == 2:
        size = np.array([(w, h) for h, w in shapes], "f4")
        return centre + offsets / size[:, None]
    if reference.shape[-1] != 4:
        raise ValueError(f"reference points have 2 or 4 coordinates, got {reference.shape}")
    extent = reference[:, :, None, :, None, 2:]
    return centre + offsets / offsets.shape[-2] * extent * 0.5


def sample_values(
    values: Array, locations: Array, shapes: LevelShapes, method: Sampling = "auto"
) -> Array:
    """Bilinear samples ``W'_m x^l(location)`` of every query, head, level and point.

    Args:
      values: ``[B, S, M, D]`` projected tokens, zero where padded.
      locations: ``[B, Q, M, L, K, 2]``, (x, y); anywhere, zeros outside.
      shapes: sizes of the levels, S cells in all.
      method: how; see the module. "auto" chooses by level and by the platform that it is compiled
        for: "gather" on a CPU or GPU, elsewhere "dense" on small levels and "packed" on others.
        "kernel", which has no samples, is "packed" here.

    Returns:
      ``[B, M, Q, L * K * D]`` in the dtype of ``values``: points beside channels, the layout of
      their product with the attention weights.

    Raises:
      ValueError: the sizes do not fit together.
    """
    if values.shape[1] != token_count(shapes) or locations.shape[3] != len(shapes):
        raise ValueError(
            f"levels {shapes} do not fit values {values.shape} and locations {locations.shape}"
        )
    samples = []
    for level, tokens in enumerate(split_levels(values, shapes)):
        height, width = shapes[level]
        grid = tokens.transpose(0, 2, 1, 3).reshape(
            tokens.shape[0], tokens.shape[2], height, width, tokens.shape[3]
        )
        points = locations[:, :, :, level].transpose(0, 2, 1, 3, 4)  # [B, M, Q, K, 2]
        samples.append(_sample_level(grid, points, method))
    return jnp.concatenate(samples, axis=-1)


def _sample_level(grid: Array, points: Array, method: Sampling) -> Array:
    if method != "auto":
        return _SAMPLERS[method](grid, points)
    small = grid.shape[2] * grid.shape[3] <= DENSE_CELLS
    other = _dense if small else _packed
    return lax.platform_dependent(grid, points, cpu=_gather, cuda=_gather, default=other)


def deformable_attention(
    values: Array,
    locations: Array,
    weights: Array,
    shapes: LevelShapes,
    method: Sampling = "auto",
) -> Array:
    """``sum_l sum_k A_mlqk W'_m x^l(...)`` in floats, heads concatenated.

    Args:
      values: ``[B, S, M, D]``.
      locations: ``[B, Q, M, L, K, 2]``.
      weights: ``[B, Q, M, L, K]``, summing to 1 over levels and points.
      shapes: sizes of the levels.
      method: see ``sample_values``.

    Returns:
      ``[B, Q, M * D]``.
    """
    samples = sample_values(values, locations, shapes, method)
    flat = weights.reshape(*weights.shape[:3], -1)
    samples = samples.reshape(*samples.shape[:3], flat.shape[-1], -1)
    mixed = jnp.einsum("bqmp,bmqpd->bqmd", flat, samples)
    return mixed.reshape(*mixed.shape[:2], -1)


def attention_map(locations: Array, weights: Array, shape: tuple[int, int]) -> Array:
    """The dense map that one level's points induce: each weight splat on its four cells.

    Args:
      locations: ``[..., K, 2]`` on that level.
      weights: ``[..., K]``.
      shape: (height, width) of the level.

    Returns:
      ``[..., height, width]``, such that the map's product with the values is the attention's
      output. What falls outside the grid is lost, as zeros are sampled there.
    """
    rows, columns = _interpolation(locations, shape)
    return jnp.einsum("...kh,...kw->...hw", rows * weights[..., None], columns)


# --- the ways: grid [B, M, H, W, D], points [B, M, Q, K, 2] -> [B, M, Q, K * D] -----------


def corners(points: Array, shape: tuple[int, int]) -> tuple[Array, Array, Array, Array]:
    """First neighbour (int32, from -1) and its fraction, of x and of y.

    Points more than a cell outside are moved to where every neighbour that counts is a zero.
    """
    found = []
    for coordinate, size in ((points[..., 0], shape[1]), (points[..., 1], shape[0])):
        position = coordinate * size - 0.5
        # Not a clip, whose gradient at its ends is a half.
        position = jnp.where(
            (position >= -1) & (position < size), position, jnp.where(position < -1, -1.0, size)
        )
        first = lax.stop_gradient(jnp.minimum(jnp.floor(position), size - 1))
        found += [first.astype(jnp.int32), position - first]
    x, x_fraction, y, y_fraction = found
    return x, x_fraction, y, y_fraction


def _neighbours(points: Array, shape: tuple[int, int]):
    """Flat index, whether it is inside, weight along y and along x, of the four neighbours."""
    height, width = shape
    x, fx, y, fy = corners(points, shape)
    for dy, wy in ((0, 1 - fy), (1, fy)):
        for dx, wx in ((0, 1 - fx), (1, fx)):
            row, column = y + dy, x + dx
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)
            yield index, inside, wy, wx


def _gather(grid: Array, points: Array) -> Array:
    flat = _flat(grid)
    total = jnp.zeros((), jnp.float32)
    for index, inside, wy, wx in _neighbours(points, _cells(grid)):
        weight = jnp.where(inside, wy * wx, 0.0)
        rows = _take_rows(flat, index).astype(jnp.float32)
        # Their product, written so that the weight's gradient is a product too: as a sum over the
        # channels it takes XLA's CPU backend ten times as long.
        total += jnp.einsum("...d,...->...d", rows, weight, precision=lax.Precision.HIGHEST)
    return total.astype(grid.dtype).reshape(*total.shape[:3], -1)


def _cells(grid: Array) -> tuple[int, int]:
    """(H, W) of [B, M, H, W, D]."""
    return grid.shape[2], grid.shape[3]


def _flat(grid: Array) -> Array:
    """[B, M, H, W, D] -> [B, M, H * W, D]."""
    return grid.reshape(*grid.shape[:2], -1, grid.shape[4])


def _packed(grid: Array, points: Array) -> Array:
    (height, width), channels, count = _cells(grid), grid.shape[4], points.shape[3]
    x, fx, y, fy = corners(points, (height, width))
    padded = jnp.pad(grid, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    table = jnp.concatenate(
        [padded[:, :, i : height + 1 + i, j : width + 1 + j] for i in (0, 1) for j in (0, 1)],
        axis=-1,
    )
    table, index = _flat(table), (y + 1) * (width + 1) + x + 1
    weights = jnp.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx], axis=-1)
    product = functools.partial(
        jnp.matmul, precision=_precision(grid.dtype), preferred_element_type=jnp.float32
    )
    spread = np.kron(np.eye(4, dtype="f4"), np.ones((1, channels), "f4"))  # [4, 4 D]
    total = jnp.zeros((), jnp.float32)
    for point, place in enumerate(np.eye(count, dtype="f4")):
        rows = _take_rows(table, index[..., point, None])[..., 0, :].astype(jnp.float32)
        weighted = rows * product(weights[..., point, :], spread)
        add = np.kron(np.outer(np.ones(4), place), np.eye(channels)).astype("f4")  # [4 D, K D]
        total += product(weighted, add)
    return total.astype(grid.dtype)


def _precision(dtype: DTypeLike) -> lax.Precision:
    """Of products that only interpolate.

    Matrix units round float32 operands unless told not to: neither samples nor the gradients of
    locations would then be those of the other ways.
    """
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def _take_rows(table: Array, index: Array) -> Array:
    """``table [B, M, T, E]`` at ``index [B, M, Q, K]`` -> ``[B, M, Q, K, E]``."""
    return _rows((table.shape[2], table.dtype), table, index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(kind: tuple[int, DTypeLike], table: Array, index: Array) -> Array:
    batch, heads = index.shape[:2]
    flat = index.reshape(batch, heads, -1)
    take = jax.vmap(jax.vmap(lambda rows, i: rows.at[i].get(mode="promise_in_bounds")))
    return take(table, flat).reshape(*index.shape, table.shape[-1])


def _rows_fwd(kind, table, index):
    return _rows(kind, table, index), index


def _rows_bwd(kind, index, cotangent):
    """Adds up what every row is asked for, in float32 whatever the rows are."""
    count, dtype = kind
    (batch, heads), width = index.shape[:2], cotangent.shape[-1]
    add = jax.vmap(jax.vmap(lambda rows, i, x: rows.at[i].add(x, mode="promise_in_bounds")))
    total = add(
        jnp.zeros((batch, heads, count, width), jnp.float32),
        index.reshape(batch, heads, -1),
        cotangent.astype(jnp.float32).reshape(batch, heads, -1, width),
    )
    return total.astype(dtype), None


_rows.defvjp(_rows_fwd, _rows_bwd)


def _dense(grid: Array, points: Array) -> Array:
    rows, columns = _interpolation(points, _cells(grid))
    cells, count = _flat(grid), points.shape[3]
    total = jnp.zeros((), jnp.float32)
    for point in range(count):
        matrix = rows[..., point, :, None] * columns[..., point, None, :]
        matrix = matrix.reshape(*points.shape[:3], -1).astype(grid.dtype)
        # In its place among the other points' channels: a matrix unit is as wide as all of them.
        before, after = point * grid.shape[4], (count - 1 - point) * grid.shape[4]
        placed = jnp.pad(cells, ((0, 0), (0, 0), (0, 0), (before, after)))
        total += jnp.matmul(
            matrix, placed, precision=_precision(grid.dtype), preferred_element_type=jnp.float32
        )
    return total.astype(grid.dtype)


def _interpolation(points: Array, shape: tuple[int, int]) -> tuple[Array, Array]:
    """Weights of every row ``[..., H]`` and of every column ``[..., W]`` at points ``[..., 2]``."""
    x, fx, y, fy = corners(points, shape)

    def weights(first, fraction, size):
        cell = np.arange(size)
        distance = cell - first[..., None]
        return jnp.where(distance == 0, 1 - fraction[..., None], 0.0) + jnp.where(
            distance == 1, fraction[..., None], 0.0
        )

    return weights(y, fy, shape[0]), weights(x, fx, shape[1])


_SAMPLERS: dict[str, Callable[[Array, Array], Array]] = {
    "gather": _gather,
    "packed": _packed,
    "dense": _dense,
    "kernel": _packed,  # of which only the weighted sum is a kernel's
}
