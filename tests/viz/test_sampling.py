"""Sampling points where they belong, and dense maps against the pure function."""

import numpy as np
import pytest

from aqdetr_jax.ops.deformable import attention_map
from aqdetr_jax.viz.sampling import LEVEL_COLORS, Samples, sampling_grid, splat


def one_point(x, y, weight=1.0, level=0):
    """One head, two levels, one point each; all weight on one of them."""
    locations = np.zeros((1, 2, 1, 2)) + 0.5
    weights = np.zeros((1, 2, 1))
    locations[0, level, 0], weights[0, level, 0] = (x, y), weight
    return Samples(locations, weights, np.array([0.5, 0.5, 0.5, 0.5]))


def spots(picture, color):
    """Centre of the pixels of a colour, in the whole picture."""
    rows, columns = np.nonzero((np.asarray(picture) == color).all(-1))
    return np.array([columns.mean(), rows.mean()]) if len(rows) else None


def drawn(*rows, titles=("a",), **options):
    image = np.full((36, 72, 3), 100, np.uint8)
    return sampling_grid(image, rows, titles=titles, **options)


def test_points_lie_where_they_sample_and_have_their_levels_colour():
    for level in (0, 1):
        left = drawn([one_point(0.25, 0.5, level=level)]).crop((0, 0, 384, 230))
        right = drawn([one_point(0.75, 0.5, level=level)]).crop((0, 0, 384, 230))
        lower = drawn([one_point(0.25, 0.75, level=level)]).crop((0, 0, 384, 230))
        a, b, c = (spots(p, LEVEL_COLORS[level]) for p in (left, right, lower))
        # Enlarged five times, to 360 x 180.
        np.testing.assert_allclose(b - a, [180, 0], atol=1.5)
        np.testing.assert_allclose(c - a, [0, 45], atol=1.5)


def test_the_box_is_drawn_and_models_stand_side_by_side():
    picture = np.asarray(drawn([one_point(0.5, 0.5), one_point(0.1, 0.1)], titles=("a", "b")))
    assert picture.shape[1] > 2 * 360
    white = (picture[60:230, 20:360] == 255).all(-1)
    assert white.sum() > 300  # the frame of the box, on a dimmed picture


def test_points_outside_are_not_drawn_but_counted(monkeypatch):
    notes = []
    monkeypatch.setattr(
        "aqdetr_jax.viz.sampling.detections.note", lambda p, text: notes.append(text) or p
    )
    picture = drawn([one_point(1.5, 0.5)], labels=["circle 0.93"])
    assert spots(picture.crop((0, 0, 384, 215)), LEVEL_COLORS[0]) is None
    drawn([one_point(0.5, 0.5)], labels=["circle 0.93"])
    assert notes == ["circle 0.93, 100.0% of the weight outside", "circle 0.93"]


def test_rows_must_fit_the_titles():
    with pytest.raises(ValueError, match="samples of"):
        drawn([one_point(0, 0)], titles=("a", "b"))
    with pytest.raises(ValueError, match="samples of"):
        sampling_grid(np.zeros((4, 4, 3), np.uint8), [], titles=("a",))


def test_splat_is_the_sum_of_the_levels_maps():
    rng = np.random.default_rng(0)
    locations = rng.uniform(-0.2, 1.2, (5, 2, 3, 4, 2)).astype("f4")
    weights = rng.dirichlet(np.ones(12), (2, 5)).astype("f4")
    found = splat(locations, weights, (4, 6))
    per_point = weights.reshape(2, 5, 3, 4).transpose(1, 0, 2, 3)
    want = sum(
        attention_map(locations[:, :, level], per_point[:, :, level], (4, 6)) for level in range(3)
    )
    np.testing.assert_allclose(
        found, np.asarray(want).transpose(1, 0, 2, 3).reshape(2, 5, -1), atol=1e-6
    )
    assert np.all(found.sum(-1) <= 1 + 1e-6)
    assert found.sum(-1).min() < 0.9
