"""Sine position encodings of padded images, and the masks they need."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array


def downsample_mask(mask: Array, height: int, width: int) -> Array:
    """Nearest-neighbour resize of a pixel mask, as torch's ``interpolate`` does it.

    Args:
      mask: bool [B, H, W], True = real pixel.
      height: rows of the feature map.
      width: columns of the feature map.

    Returns:
      bool [B, height, width]; cell (i, j) takes pixel (floor(i H / height), floor(j W / width)).
    """
    rows = np.arange(height) * mask.shape[1] // height
    columns = np.arange(width) * mask.shape[2] // width
    return mask[:, rows][:, :, columns]


def sine_position_encoding(
    mask: Array,
    channels: int,
    *,
    temperature: float = 10000.0,
    scale: float = 2 * math.pi,
    offset: float = 0.0,
) -> Array:
    """Normalised 2-d sine position encoding (DETR, appendix A.4 and its code).

    A cell's coordinate is its count of valid cells from the top (left), divided by the count of
    valid cells of the whole column (row), times ``scale``: padding never moves an image's encoding.

    Args:
      mask: bool [B, H, W], True = valid cell.
      channels: total channels, half for y and half for x; divisible by 4.
      temperature: base of the frequencies.
      scale: range of the normalised coordinate.
      offset: added to the count before normalising (0 in DETR, -0.5 in Deformable DETR).

    Returns:
      float32 [B, H, W, channels]: y first, then x; sine and cosine interleaved.
    """
    if channels % 4:
        raise ValueError(f"position encoding needs channels divisible by 4, got {channels}")
    valid = mask.astype(jnp.float32)
    y = jnp.cumsum(valid, axis=1)
    x = jnp.cumsum(valid, axis=2)
    y = (y + offset) / (y[:, -1:, :] + 1e-6) * scale
    x = (x + offset) / (x[:, :, -1:] + 1e-6) * scale
    return encode_points(jnp.stack([x, y], axis=-1), channels, temperature=temperature)


def encode_points(points: Array, channels: int, *, temperature: float = 10000.0) -> Array:
    """Sine encoding of points, as ``sine_position_encoding`` has it for cells.

    Args:
      points: float32 [..., 2], (x, y) times the range of the coordinate (2 pi for the whole image).
      channels: total channels, half for y and half for x; divisible by 4.
      temperature: base of the frequencies.

    Returns:
      float32 [..., channels]: y first, then x; sine and cosine interleaved.
    """
    return encode_coordinates(points[..., ::-1], channels // 2, temperature=temperature)


def encode_coordinates(coordinates: Array, width: int, *, temperature: float = 10000.0) -> Array:
    """Sine encoding of every coordinate, one after the other.

    Args:
      coordinates: float32 [..., n], times the range of the coordinate.
      width: channels of each coordinate, even.
      temperature: base of the frequencies.

    Returns:
      float32 [..., n * width]; sine and cosine interleaved.
    """
    power = 2 * (np.arange(width) // 2) / width
    angle = coordinates[..., None] / jnp.asarray(temperature**power, jnp.float32)
    pair = jnp.stack([jnp.sin(angle[..., 0::2]), jnp.cos(angle[..., 1::2])], axis=-1)
    return pair.reshape(*coordinates.shape[:-1], -1)


def spread_points(count: int, first: int = 0) -> np.ndarray:
    """Points of an evenly spread (R2 low-discrepancy) sequence in the unit square.

    Args:
      count: number of points.
      first: index of the first one.

    Returns:
      float32 [count, 2].
    """
    index = np.arange(first, first + count)[:, None]
    # Powers of the inverse plastic number: the two-dimensional golden ratio (Roberts, 2018).
    return ((0.5 + index * np.array([0.7548776662466927, 0.5698402909980532])) % 1).astype("f4")
