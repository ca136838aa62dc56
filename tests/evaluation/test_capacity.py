"""Measures of what queries can say, against values by hand and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.spatial
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from aqdetr_jax.evaluation import capacity as C


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_entropy_is_that_of_scipys_normal():
    x = drawn(7, 5, 3) * np.array([0.5, 1.0, 4.0]) + 2
    wanted = [scipy.stats.norm(scale=x[..., c].std()).entropy() for c in range(3)]
    assert C.gaussian_entropy(x) == pytest.approx(np.mean(wanted))
    assert C.gaussian_entropy(2 * x) - C.gaussian_entropy(x) == pytest.approx(np.log(2))
    assert np.isfinite(C.gaussian_entropy(np.ones((4, 3))))


@given(st.integers(1, 6))
def test_rank_of_equal_directions(rank):
    """Of r orthogonal directions of one length the rank is r."""
    queries = np.zeros((2, 12, 8))
    for i in range(12):
        queries[:, i, i % rank] = 1.0
    sizes = np.bincount(np.arange(12) % rank) ** 0.5
    shares = sizes / sizes.sum()
    assert C.effective_rank(queries) == pytest.approx(np.exp(scipy.stats.entropy(shares)))
    if 12 % rank == 0:
        assert C.effective_rank(queries) == pytest.approx(rank)


def test_cosine_of_all_pairs():
    x = drawn(3, 6, 4)
    wanted = [1 - scipy.spatial.distance.pdist(one, "cosine").mean() for one in x]
    assert C.mean_cosine(x) == pytest.approx(np.mean(wanted))


def test_distinct_boxes():
    """The second repeats the first; the third overlaps it by 0.8 only; the fourth lies elsewhere.

    Of the second image's three equal boxes one counts.
    """
    one = [[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.19], [0.5, 0.5, 0.2, 0.16], [0.1, 0.1, 0.1, 0.1]]
    two = [[0.5, 0.5, 0.2, 0.2]] * 3 + [[0.9, 0.9, 0.1, 0.1]]
    scores = np.array([[0.9, 0.8, 0.7, 0.1], [0.2, 0.5, 0.5, 0.9]])
    found = C.distinct_predictions(np.array([one, two]), scores)
    assert found.tolist() == [3, 2]
    assert C.distinct_predictions(np.array([one, two]), scores, iou=0.75).tolist() == [2, 2]
