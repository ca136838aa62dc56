"""Boxes: conversion, area, overlap.

A box is four numbers in the last axis, either ``cxcywh`` (centre, width, height) or ``xyxy`` (left,
top, right, bottom), in any unit. Degenerate boxes (zero or negative width or height) have area zero
and give finite values and finite gradients everywhere: a fraction with a vanishing denominator is
zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = [
    "area",
    "cxcywh_to_xyxy",
    "elementwise_giou",
    "elementwise_iou",
    "pairwise_giou",
    "pairwise_iou",
    "xyxy_to_cxcywh",
]

# Smallest area that is divided by. Far below any box (1e-6 of the image on each side), and its
# square is still a normal float32, which the gradient of the quotient needs.
_SMALLEST_AREA = 1e-12


def cxcywh_to_xyxy(boxes: jax.Array) -> jax.Array:
    """Converts ``[..., 4]`` boxes from centre and size to corners."""
    centre, half = boxes[..., :2], 0.5 * boxes[..., 2:]
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def xyxy_to_cxcywh(boxes: jax.Array) -> jax.Array:
    """Converts ``[..., 4]`` boxes from corners to centre and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([0.5 * (low + high), high - low], axis=-1)


def inverse_sigmoid(x: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Logit of ``x`` [any shape], both ``x`` and ``1 - x`` taken as at least ``eps``."""
    x = jnp.clip(x, 0.0, 1.0)
    return jnp.log(jnp.maximum(x, eps) / jnp.maximum(1.0 - x, eps))


def area(boxes: jax.Array) -> jax.Array:
    """Area ``[...]`` of ``xyxy`` boxes ``[..., 4]``; 0 for inverted ones."""
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return jnp.maximum(width, 0.0) * jnp.maximum(height, 0.0)


def _divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """The quotient, and 0 with zero gradient where the denominator vanishes."""
    usable = denominator > _SMALLEST_AREA
    return jnp.where(usable, numerator / jnp.where(usable, denominator, 1.0), 0.0)


def _overlap(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Intersection and union area of broadcastable ``xyxy`` boxes."""
    # Coordinate by coordinate: an innermost axis of 4 would waste the vector lanes.
    width = jnp.minimum(a[..., 2], b[..., 2]) - jnp.maximum(a[..., 0], b[..., 0])
    height = jnp.minimum(a[..., 3], b[..., 3]) - jnp.maximum(a[..., 1], b[..., 1])
    intersection = jnp.maximum(width, 0.0) * jnp.maximum(height, 0.0)
    return intersection, area(a) + area(b) - intersection


def elementwise_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union of ``xyxy`` boxes ``a`` and ``b``.

    Args:
        a: float ``[..., 4]``.
        b: float ``[..., 4]``, broadcastable to ``a``.

    Returns:
        float ``[...]`` in [0, 1].
    """
    return _divide(*_overlap(a, b))


def elementwise_giou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Generalised intersection over union of ``xyxy`` boxes ``a`` and ``b``.

    ``GIoU = IoU - (hull - union) / hull`` with the smallest enclosing box as hull (Rezatofighi et
    al., arXiv:1902.09630, algorithm 1).

    Args:
        a: float ``[..., 4]``.
        b: float ``[..., 4]``, broadcastable to ``a``.

    Returns:
        float ``[...]`` in [-1, 1].
    """
    intersection, union = _overlap(a, b)
    width = jnp.maximum(a[..., 2], b[..., 2]) - jnp.minimum(a[..., 0], b[..., 0])
    height = jnp.maximum(a[..., 3], b[..., 3]) - jnp.minimum(a[..., 1], b[..., 1])
    hull = jnp.maximum(width, 0.0) * jnp.maximum(height, 0.0)
    return _divide(intersection, union) - _divide(hull - union, hull)


def pairwise_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """`elementwise_iou` of all pairs: ``[..., N, 4]``, ``[..., M, 4]`` → ``[..., N, M]``."""
    return elementwise_iou(a[..., :, None, :], b[..., None, :, :])


def pairwise_giou(a: jax.Array, b: jax.Array) -> jax.Array:
    """`elementwise_giou` of all pairs: ``[..., N, 4]``, ``[..., M, 4]`` → ``[..., N, M]``."""
    return elementwise_giou(a[..., :, None, :], b[..., None, :, :])
