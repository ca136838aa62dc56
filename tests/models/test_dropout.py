"""Masks by counting: their statistics, and what they do and do not depend on."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from aqdetr_jax.models.dropout import drawing, dropout, row_keys

RATE = 0.1
SHAPE = (4, 8, 64, 128)
KEYS = np.asarray(row_keys(jax.random.key(0), SHAPE[0]))
SURE = 1e-6
"""Two-sided probability of a statistic to lie outside of what is accepted, were it random."""


class Twice(nn.Module):
    """Two places, one of which is passed twice."""

    rate: float = RATE

    @nn.compact
    def __call__(self, x):
        place, other = Place(self.rate, name="place"), Place(self.rate, name="other")
        return place(x), place(x), other(x)


class Place(nn.Module):
    rate: float
    train: bool = True

    def __call__(self, x):
        return dropout(self, x, self.rate, train=self.train)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, keys, x):
    with drawing(keys):
        return module.apply({}, x)


@functools.cache
def dropped():
    """bool [5, *SHAPE]: a place, the same again, another place, another step, the last rate."""
    ones = jnp.ones(SHAPE)
    later = row_keys(jax.random.key(1), SHAPE[0])
    found = [*apply(Twice(), KEYS, ones), apply(Twice(), later, ones)[0]]
    return np.stack(found) == 0


def likely(share, expected, count):
    """Whether a share of independent draws is within chance."""
    z = (share - expected) / np.sqrt(expected * (1 - expected) / count)
    return abs(z) < stats.norm.isf(SURE / 2)


def test_share_of_zeros_everywhere():
    masks = dropped()
    for axes in ((0,), (0, 1), (0, 2), (0, 3), (0, 4)):
        share = masks.mean(tuple(i for i in range(5) if i not in axes))
        count = masks.size / share.size
        for value in share.ravel():
            assert likely(value, RATE, count), (axes, value)


def test_zeros_of_blocks_are_binomial():
    """Too even and too clustered masks have the right share too."""
    counts = dropped().reshape(-1, 256).sum(1)
    edges = np.arange(12, 41)
    seen = np.histogram(np.clip(counts, 12, 39), edges)[0]
    expected = stats.binom(256, RATE).pmf(np.arange(257))
    expected = np.array([*np.add.reduceat(expected, [0, *range(13, 39)]), expected[39:].sum()])
    expected[-2] -= expected[-1]
    assert stats.chisquare(seen, expected * len(counts)).pvalue > SURE


def test_places_calls_steps_and_images_are_independent():
    masks = dropped()
    pairs = [(masks[i], masks[j]) for i in range(len(masks)) for j in range(i)]
    pairs += [(masks[0][i], masks[0][j]) for i in range(SHAPE[0]) for j in range(i)]
    for a, b in pairs:
        assert likely((a & b).mean(), RATE**2, a.size)


@pytest.mark.parametrize("axis", [1, 2, 3, 4])
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 32])
def test_neighbours_are_independent(axis, lag):
    masks = np.moveaxis(dropped(), axis, 0)
    if lag < len(masks):
        both = masks[lag:] & masks[:-lag]
        # Pairs overlap: their shares vary a little more than those of independent draws.
        assert likely(both.mean(), RATE**2, both.size / 1.2)


def test_what_is_kept_is_scaled_up():
    x = np.random.default_rng(0).normal(size=SHAPE).astype("f4")
    zero = dropped()[0]
    found = np.asarray(apply(Twice(), KEYS, x)[0])
    np.testing.assert_array_equal(found[zero], 0)
    np.testing.assert_allclose(found[~zero], x[~zero] / 0.9, rtol=1e-6)


@pytest.mark.parametrize(("rate", "share"), [(0.0, 0), (1.0, 1), (0.5, 0.5), (1e-3, 1e-3)])
def test_rates(rate, share):
    found = np.asarray(apply(Place(rate), KEYS, jnp.ones(SHAPE))) == 0
    assert found.mean() == share if share in (0, 1) else likely(found.mean(), share, found.size)


def test_a_mask_depends_on_the_image_not_on_its_batch():
    """Parts of a batch, on devices or one after the other, drop what the whole drops."""
    whole = dropped()[0]
    rows = np.array([3, 1])
    part = apply(Twice(), KEYS[rows], jnp.ones((2, *SHAPE[1:])))[0]
    np.testing.assert_array_equal(np.asarray(part) == 0, whole[rows])
    # Keys of a larger batch begin with those of a smaller one.
    np.testing.assert_array_equal(row_keys(jax.random.key(0), 9)[: SHAPE[0]], KEYS)


def test_several_rows_of_an_image_are_one_longer_image():
    """Query sets are folded into the batch: [B * n, ...] counts on within the image."""
    folded = apply(Twice(), KEYS, jnp.ones((SHAPE[0] * 8, *SHAPE[2:])))[0]
    np.testing.assert_array_equal(np.asarray(folded).reshape(SHAPE) == 0, dropped()[0])


def test_what_is_computed_again_drops_the_same():
    """The gradient of ``sum(w * drop(x))`` is w where x was kept, and 0 elsewhere."""
    x, weight = np.random.default_rng(1).normal(size=(2, *SHAPE)).astype("f4")

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            place = Place(RATE, name="place")
            return place(jnp.sin(x)), place(x)

    class Model(nn.Module):
        remat: bool

        @nn.compact
        def __call__(self, x):
            layer = nn.remat(Layer) if self.remat else Layer
            return layer(name="layer")(x)

    @functools.partial(jax.jit, static_argnums=0)
    def run(remat):
        def loss(x):
            with drawing(KEYS):
                outputs = Model(remat).apply({}, x)
            return jnp.sum(weight * outputs[1]) + 0 * jnp.sum(outputs[0]), outputs

        return jax.grad(loss, has_aux=True)(x)

    plain, again = run(False), run(True)
    for gradient, (first, second) in (plain, again):
        np.testing.assert_allclose(gradient, np.where(second == 0, 0, weight / 0.9), rtol=1e-6)
        assert ((first == 0) != (second == 0)).any()
    jax.tree.map(np.testing.assert_array_equal, plain[1], again[1])


def test_nothing_is_dropped_outside_of_training():
    x = jnp.ones(SHAPE)
    assert Place(RATE, train=False).apply({}, x) is x


def test_keys_are_needed_and_must_fit():
    with pytest.raises(ValueError, match=r"place drops in training: .*models\.dropout\.drawing"):
        Twice().apply({}, jnp.ones(SHAPE))
    with pytest.raises(ValueError, match="6 rows are not of 4 images"):
        apply(Place(RATE), KEYS, jnp.ones((6, 3)))
