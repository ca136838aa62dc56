"""Position encodings and masks against NumPy, cell by cell."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqdetr_jax.ops import position
from aqdetr_jax.ops.position import downsample_mask, encode_points, spread_points

sine_position_encoding = functools.partial(jax.jit, static_argnames=("channels", "offset"))(
    position.sine_position_encoding
)


def restated(mask, channels, offset):
    """DETR's encoding (Carion et al., appendix A.4), one cell and one channel at a time."""
    batch, height, width = mask.shape
    half = channels // 2
    out = np.zeros((batch, height, width, channels))
    for b, i, j in np.ndindex(batch, height, width):
        y, x = mask[b, : i + 1, j].sum(), mask[b, i, : j + 1].sum()
        y = (y + offset) / (mask[b, :, j].sum() + 1e-6) * 2 * math.pi
        x = (x + offset) / (mask[b, i].sum() + 1e-6) * 2 * math.pi
        for k, coordinate in enumerate((y, x)):
            for c in range(half):
                angle = coordinate / 10000 ** (2 * (c // 2) / half)
                out[b, i, j, k * half + c] = math.cos(angle) if c % 2 else math.sin(angle)
    return out


def padded_mask(height, width, sizes):
    mask = np.zeros((len(sizes), height, width), bool)
    for row, (h, w) in zip(mask, sizes, strict=True):
        row[:h, :w] = True
    return mask


@pytest.mark.parametrize("offset", [0.0, -0.5])
def test_encoding_of_padded_images(offset):
    mask = padded_mask(4, 5, [(4, 5), (3, 2), (1, 5)])
    got = sine_position_encoding(jnp.asarray(mask), 8, offset=offset)
    assert got.dtype == jnp.float32
    expected = restated(mask, 8, offset)
    # Padded cells of an offset encoding divide by 1e-6 there; nothing reads them.
    np.testing.assert_allclose(np.asarray(got)[mask], expected[mask], atol=2e-5)
    assert np.all(np.isfinite(got))


def test_padding_does_not_move_the_encoding():
    alone = sine_position_encoding(jnp.ones((1, 3, 2), bool), 16)
    padded = sine_position_encoding(jnp.asarray(padded_mask(5, 7, [(3, 2)])), 16)
    np.testing.assert_allclose(padded[:, :3, :2], alone, atol=1e-6)


def test_y_comes_first():
    encoding = np.asarray(sine_position_encoding(jnp.ones((1, 3, 4), bool), 8))[0]
    assert np.ptp(encoding[..., :4], axis=1).max() == 0
    assert np.ptp(encoding[..., 4:], axis=0).max() == 0


@pytest.mark.parametrize("channels", [2, 6, 13])
def test_channels_must_divide_by_four(channels):
    with pytest.raises(ValueError, match="divisible by 4"):
        sine_position_encoding(jnp.ones((1, 2, 2), bool), channels)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (3, 5), (8, 12), (1, 1), (5, 7)])
def test_mask_is_resized_to_the_nearest_pixel(height, width):
    mask = np.random.default_rng(0).random((2, 8, 12)) < 0.5
    got = downsample_mask(jnp.asarray(mask), height, width)
    assert got.dtype == bool
    for i, j in np.ndindex(height, width):
        pixel = mask[:, math.floor(i * 8 / height), math.floor(j * 12 / width)]
        np.testing.assert_array_equal(got[:, i, j], pixel)


def test_a_cell_is_valid_when_its_first_pixel_is():
    mask = jnp.asarray(padded_mask(64, 96, [(33, 65), (32, 64)]))
    cells = np.asarray(downsample_mask(mask, 2, 3))
    np.testing.assert_array_equal(cells, padded_mask(2, 3, [(2, 3), (1, 2)]))


def test_spread_points_are_even_at_every_count():
    """Any run of the sequence fills the square: no large hole, no two points on one spot."""
    for count, first in ((25, 0), (50, 25), (300, 100)):
        points = spread_points(count, first)
        np.testing.assert_array_equal(points, spread_points(first + count)[first:])
        assert ((points >= 0) & (points < 1)).all()
        apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
        apart[np.diag_indices(count)] = np.inf
        # A square lattice of as many points has this distance.
        lattice = 1 / np.sqrt(count)
        assert apart.min() > 0.4 * lattice
        grid = np.stack(np.meshgrid(*[np.linspace(0.05, 0.95, 30)] * 2), -1).reshape(-1, 1, 2)
        assert np.linalg.norm(grid - points[None], axis=-1).min(1).max() < 1.6 * lattice


def test_a_point_has_the_code_of_its_cell():
    """What queries start from is what the keys of the cell under them carry."""
    side, dim = 16, 32
    cells = sine_position_encoding(jnp.ones((1, side, side), bool), dim)[0]
    centres = (np.arange(side) + 1) / side * 2 * np.pi  # DETR counts cells from 1, up to 2 pi
    points = jnp.asarray([[centres[3], centres[9]]], jnp.float32)  # x, y
    np.testing.assert_allclose(encode_points(points, dim)[0], cells[9, 3], atol=1e-4)
