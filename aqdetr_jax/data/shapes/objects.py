"""The ten objects of the generated set: outline, colour and fill texture of each class.

Outlines are polygons drawn at twice the resolution and averaged down. Hue and texture follow the
class only in part (:class:`~aqdetr_jax.data.shapes.dataset.ShapesSpec` says how far).
"""

from __future__ import annotations

import colorsys
import functools
import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from aqdetr_jax.data.shapes.spec import ShapesSpec

CLASS_NAMES = (
    "disc",
    "ring",
    "triangle",
    "square",
    "star",
    "cross",
    "crescent",
    "hexagon",
    "arrow",
    "heart",
)
TEXTURES = ("plain", "stripes", "dots", "gradient", "checks")

# Preferred hue (in turns) and texture of each class: together they name it, where they hold. Only
# the outline always does.
_HUES = (0.02, 0.52, 0.22, 0.72, 0.12, 0.42, 0.82, 0.32, 0.62, 0.92)
_HUE_SPREAD = 0.025
_TEXTURE_OF = (0, 3, 1, 4, 0, 1, 3, 2, 4, 2)

_SUPERSAMPLE = 2


@functools.cache
def _outline(label: int) -> tuple[np.ndarray, ...]:
    """Polygons [P, 2] of a class in [-1, 1]: the first is filled, the others are holes."""
    name = CLASS_NAMES[label]
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], 1)

    def regular(corners: int, phase: float = 0.0) -> np.ndarray:
        angle = 2 * np.pi * np.arange(corners) / corners + phase
        return np.stack([np.cos(angle), np.sin(angle)], 1)

    if name == "disc":
        return (circle,)
    if name == "ring":
        return (circle, 0.52 * circle)
    if name == "triangle":
        return (regular(3, -np.pi / 2),)
    if name == "square":
        return (regular(4, np.pi / 4),)
    if name == "hexagon":
        return (regular(6),)
    if name == "star":
        points = regular(10, -np.pi / 2)
        points[1::2] *= 0.42
        return (points,)
    if name == "cross":
        a, b = 0.33, 1.0
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b)]
        return (np.array([*corners, (-a, a), (-b, a), (-b, -a), (-a, -a)]),)
    if name == "crescent":
        # Outer circle of radius 1; the bite is a circle of radius 0.85 centred at (0.55, 0).
        meet = (1 + 0.55**2 - 0.85**2) / (2 * 0.55)
        start = math.acos(meet)
        outer = np.linspace(start, 2 * np.pi - start, 30)
        bite = math.atan2(math.sin(start), meet - 0.55)
        inner = np.linspace(-bite, -2 * np.pi + bite, 24)
        back = np.stack([0.55 + 0.85 * np.cos(inner), 0.85 * np.sin(inner)], 1)
        return (np.concatenate([np.stack([np.cos(outer), np.sin(outer)], 1), back[1:-1]]),)
    if name == "arrow":
        return (
            np.array(
                [
                    (1, 0),
                    (0.15, -0.8),
                    (0.15, -0.3),
                    (-1, -0.3),
                    (-1, 0.3),
                    (0.15, 0.3),
                    (0.15, 0.8),
                ]
            ),
        )
    # Heart: the usual parametric curve, scaled to the unit square.
    x = 16 * np.sin(turn) ** 3 / 16.5
    y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)) / 16.5
    return (np.stack([x, y], 1),)


def object_mask(rng: np.random.Generator, label: int, target: float, min_side: int) -> np.ndarray:
    """Draws one object; returns its coverage, float32 [h, w] in [0, 1], trimmed to the object."""
    polygons = _outline(label)
    angle = rng.uniform(0, 2 * np.pi)
    stretch = math.exp(rng.uniform(-0.22, 0.22))
    c, s = math.cos(angle), math.sin(angle)
    # Stretch along the object's own axis, then rotate.
    transform = np.array([[c, s], [-s, c]]) * np.array([[stretch], [1 / stretch]])
    moved = [p @ transform for p in polygons]
    low, high = moved[0].min(0), moved[0].max(0)
    extent = high - low
    scale = max(target / math.sqrt(extent[0] * extent[1]), (min_side + 0.6) / extent.min())
    width, height = (int(v) for v in np.ceil(extent * scale) + 2)
    canvas = Image.new("L", (width * _SUPERSAMPLE, height * _SUPERSAMPLE), 0)
    draw = ImageDraw.Draw(canvas)
    for i, polygon in enumerate(moved):
        points = ((polygon - low) * scale + 1.0) * _SUPERSAMPLE - 0.5
        draw.polygon(points.ravel().tolist(), fill=255 if i == 0 else 0)
    alpha = np.asarray(canvas.reduce(_SUPERSAMPLE), np.float32) / 255.0
    rows, columns = np.nonzero((alpha >= 0.5).any(1))[0], np.nonzero((alpha >= 0.5).any(0))[0]
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """A colour as float32 [3] RGB in 0..255; hue in turns, the others in [0, 1]."""
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32) * 255.0


def fill(
    rng: np.random.Generator,
    spec: ShapesSpec,
    label: int,
    shape: tuple[int, ...],
    behind: np.ndarray,
) -> np.ndarray:
    """Colours of one object, float32 [h, w, 3], in contrast to what lies behind it."""
    ground = behind[::4, ::4].reshape(-1, 3).mean(0)
    base = np.zeros(3, np.float32)
    for _ in range(4):
        if rng.random() < spec.hue_fidelity:
            hue = _HUES[label] + _HUE_SPREAD * rng.standard_normal()
        else:
            hue = rng.random()
        base = rgb(hue, rng.uniform(0.45, 1.0), rng.uniform(0.45, 1.0))
        if np.abs(base - ground).max() > 60:
            break
    preferred = rng.random() < spec.texture_fidelity
    texture = TEXTURES[_TEXTURE_OF[label] if preferred else int(rng.integers(len(TEXTURES)))]
    if texture == "plain":
        return np.broadcast_to(base, (*shape, 3))
    # The second tone is a lighter or darker one of the same hue.
    factor = rng.uniform(0.35, 0.65)
    if base.mean() > 110:
        other = base * factor
    else:
        other = base + (255 - base) * (1 - factor)
    blend = pattern(rng, texture, shape)
    return base + blend[..., None] * (other - base)


def pattern(rng: np.random.Generator, texture: str, shape: tuple[int, ...]) -> np.ndarray:
    """A two-tone pattern, float32 [h, w] in [0, 1]."""
    height, width = shape
    angle = rng.uniform(0, np.pi)
    c, s = math.cos(angle), math.sin(angle)
    y = np.arange(height, dtype=np.float32)[:, None]
    x = np.arange(width, dtype=np.float32)[None, :]
    u, v = c * x + s * y, c * y - s * x
    if texture == "gradient":
        span = max(float(u.max() - u.min()), 1.0)
        return (u - u.min()) / span
    # A period of a quarter of the object, at least 4 pixels: finer would vanish in the noise.
    period = max(4.0, rng.uniform(0.18, 0.32) * max(height, width))
    k = np.float32(2 * np.pi / period)
    if texture == "stripes":
        wave = np.sin(k * u)
    elif texture == "checks":
        wave = np.sin(k * u) * np.sin(k * v) * 2
    else:  # dots
        wave = np.cos(k * u) + np.cos(k * v) - 0.6
    wave *= 2.5
    wave += 0.5
    return np.clip(wave, 0.0, 1.0, out=wave)
