"""Sampling and reference points against hand values and a restatement in NumPy."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqdetr_jax.ops import deformable

METHODS = ("gather", "packed", "dense")
each_method = pytest.mark.parametrize("method", METHODS)


def assert_same(found, want):
    """Equal to float32 rounding: to 1e-6 of the largest number."""
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6 * np.abs(want).max())


def sample_one(grid, points, method):
    """A grid [H, W] at points [K, 2] -> [K]."""
    grid, points = np.asarray(grid, "f4"), np.asarray(points, "f4")
    values = grid.reshape(1, -1, 1, 1)
    found = deformable.sample_values(
        values, points.reshape(1, 1, 1, 1, -1, 2), (grid.shape,), method
    )
    return np.asarray(found)[0, 0, 0]


# --- hand values ---------------------------------------------------------------------------------


@each_method
def test_a_single_cell(method):
    points = [(0, 0), (1, 1), (0, 1), (0.5, 0.5), (0.5, 0), (0.25, 0.5)]
    np.testing.assert_allclose(
        sample_one([[1.0]], points, method), [0.25, 0.25, 0.25, 1, 0.5, 0.75], atol=1e-6
    )


@each_method
def test_a_ramp(method):
    ramp = np.arange(8).reshape(4, 2)
    points = [(0.25, 0.25), (0.25, 0.5), (0.25, 0.75), (0.5, 0.125), (0.75, 0.875)]
    np.testing.assert_allclose(sample_one(ramp, points, method), [1, 3, 5, 0.5, 7], atol=1e-6)


@each_method
def test_zeros_outside(method):
    points = [(x, 0.5) for x in (0.95, 1.0, 1.04, 1.5, 7, 0.05, 0, -0.04, -0.5, -1e6)]
    found = sample_one(np.ones((10, 10)), points, method)
    np.testing.assert_allclose(found, [1, 0.5, 0.1, 0, 0, 1, 0.5, 0.1, 0, 0], atol=1e-6)


# --- a restatement, in double precision ----------------------------------------------------------


def reference(values, locations, shapes):
    """Eq. 3's samples [B, M, Q, L * K * D], cell by cell."""
    batch, _, heads, dim = values.shape
    queries, levels, count = locations.shape[1], locations.shape[3], locations.shape[4]
    out = np.zeros((batch, heads, queries, levels, count, dim))
    starts = np.cumsum([0] + [h * w for h, w in shapes])
    for b, q, m, lv, k in itertools.product(
        range(batch), range(queries), range(heads), range(levels), range(count)
    ):
        height, width = shapes[lv]
        x, y = locations[b, q, m, lv, k] * np.array([width, height]) - 0.5
        for i, j in itertools.product(range(height), range(width)):
            weight = max(0.0, 1 - abs(x - j)) * max(0.0, 1 - abs(y - i))
            if weight:
                out[b, m, q, lv, k] += weight * values[b, starts[lv] + i * width + j, m]
    return out.reshape(batch, heads, queries, levels * count * dim)


SHAPES = ((6, 4), (3, 2), (1, 5))


def case(seed, queries=5, heads=2, points=3, dim=4):
    rng = np.random.default_rng(seed)
    cells = deformable.token_count(SHAPES)
    values = rng.normal(size=(2, cells, heads, dim)).astype("f4")
    # A fifth of the range on every side lies outside.
    locations = rng.uniform(-0.3, 1.3, (2, queries, heads, len(SHAPES), points, 2)).astype("f4")
    return values, locations, rng


@pytest.mark.accelerator
@each_method
def test_samples_are_those_of_the_formula(method):
    values, locations, _ = case(0)
    found = deformable.sample_values(values, locations, SHAPES, method)
    want = reference(values.astype("f8"), locations.astype("f8"), SHAPES)
    assert np.abs(want).max() > 1
    assert_same(found, want)


@pytest.mark.accelerator
@each_method
def test_gradients_are_those_of_the_formula(method):
    """Linear in the values, piecewise bilinear in a location: differences are exact."""
    values, locations, rng = case(1, queries=2, points=2)
    cotangent = rng.normal(size=(2, 2, 2, len(SHAPES) * 2 * 4))

    def loss(v, x):
        return jnp.sum(deformable.sample_values(v, x, SHAPES, method) * cotangent.astype("f4"))

    d_values, d_locations = jax.grad(loss, (0, 1))(values, locations)
    v64, x64 = values.astype("f8"), locations.astype("f8")

    def numeric(f, at, step):
        out = np.zeros_like(at)
        for index in np.ndindex(*at.shape):
            up, down = at.copy(), at.copy()
            up[index] += step
            down[index] -= step
            out[index] = (f(up) - f(down)) / (2 * step)
        return out

    def at_location(x):
        return np.sum(reference(v64, x, SHAPES) * cotangent)

    assert_same(d_locations, numeric(at_location, x64, 1e-6))
    # With respect to the values: the transpose, on one random direction.
    direction = rng.normal(size=values.shape)
    want = np.sum(reference(direction, x64, SHAPES) * cotangent)
    np.testing.assert_allclose(np.sum(np.asarray(d_values, "f8") * direction), want, rtol=1e-6)


@pytest.mark.accelerator
@given(st.integers(0, 2**31), st.booleans())
@settings(max_examples=25)
def test_all_ways_agree_forward_and_gradient(seed, on_centres):
    """On cell centres too, where every deformable attention begins and gradients have two sides."""
    values, locations, rng = case(seed)
    if on_centres:
        size = np.array([(w, h) for h, w in SHAPES])[:, None]
        locations = ((np.floor(locations * size) + 0.5) / size).astype("f4")
    cotangent = rng.normal(size=(2, 2, 5, len(SHAPES) * 3 * 4)).astype("f4")
    found = [_value_and_grad(values, locations, cotangent, method) for method in METHODS]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_same(b, a)


def _value_and_grad(values, locations, cotangent, method):
    return _COMPILED[method](values, locations, cotangent)


def _compiled(method):
    def both(values, locations, cotangent):
        def samples(v, x):
            return deformable.sample_values(v, x, SHAPES, method)

        out, pullback = jax.vjp(samples, values, locations)
        return out, *pullback(cotangent)

    return jax.jit(both)


_COMPILED = {method: _compiled(method) for method in (*METHODS, "auto")}


# --- the rest ------------------------------------------------------------------------------------


def test_auto_is_the_same_and_chosen_by_the_platform():
    values, locations, rng = case(3)
    cotangent = rng.normal(size=(2, 2, 5, len(SHAPES) * 3 * 4)).astype("f4")

    def auto(v, x):
        return deformable.sample_values(v, x, SHAPES)

    pair = (_value_and_grad(values, locations, cotangent, m) for m in ("auto", "gather"))
    for a, b in zip(*pair, strict=True):
        assert_same(a, b)
    for platform, gathers in (("cpu", True), ("cuda", True), ("tpu", False)):
        text = jax.export.export(jax.jit(auto), platforms=[platform])(values, locations)
        assert ("gather" in text.mlir_module()) == gathers


def test_attention_is_the_weighted_sum_heads_side_by_side():
    values, locations, rng = case(4)
    weights = rng.dirichlet(np.ones(9), (2, 5, 2)).reshape(2, 5, 2, 3, 3).astype("f4")
    samples = reference(values.astype("f8"), locations.astype("f8"), SHAPES)
    samples = samples.reshape(2, 2, 5, 9, 4)
    want = np.zeros((2, 5, 8))
    for m in range(2):
        for p in range(9):
            weight = weights.reshape(2, 5, 2, 9)[:, :, m, p, None]
            want[..., 4 * m : 4 * m + 4] += weight * samples[:, m, :, p]
    found = deformable.deformable_attention(values, locations, weights, SHAPES, "packed")
    np.testing.assert_allclose(found, want, atol=3e-6)


def test_attention_map_times_values_is_the_attention():
    values, locations, rng = case(5)
    weights = rng.uniform(size=(2, 5, 2, 3, 3)).astype("f4")
    total = 0.0
    for lv, tokens in enumerate(deformable.split_levels(values, SHAPES)):
        one = deformable.attention_map(locations[:, :, :, lv], weights[:, :, :, lv], SHAPES[lv])
        assert one.shape == (2, 5, 2, *SHAPES[lv])
        total += np.einsum("bqms,bsmd->bqmd", one.reshape(2, 5, 2, -1), tokens)
    found = deformable.deformable_attention(values, locations, weights, SHAPES, "gather")
    np.testing.assert_allclose(found, total.reshape(2, 5, 8), atol=3e-6)


def test_bfloat16_values_stay_bfloat16():
    values, locations, _ = case(6)
    for method in METHODS:
        found = deformable.sample_values(values.astype(jnp.bfloat16), locations, SHAPES, method)
        assert found.dtype == jnp.bfloat16
        want = deformable.sample_values(values, locations, SHAPES, method)
        np.testing.assert_allclose(found.astype("f4"), want, atol=0.06)


@pytest.mark.accelerator
@each_method
def test_sums_of_bfloat16_gradients_do_not_stall(method):
    """1024 points share a cell: a bfloat16 sum of ones ends at 256."""
    points = jnp.full((1, 1024, 1, 1, 1, 2), 0.25)

    def total(values):
        return jnp.sum(deformable.sample_values(values, points, ((2, 2),), method).astype("f4"))

    found = jax.jit(jax.grad(total))(jnp.zeros((1, 4, 1, 3), jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[0, :, 0].astype("f4"), np.eye(4)[:, :1] * [[1024] * 3])


def test_dense_samples_are_not_rounded_by_a_matrix_unit():
    """By default it would multiply float32 in fewer bits, off a CPU; forward and gradient."""
    values, locations, _ = case(8)

    def total(v, x):
        return jnp.sum(deformable.sample_values(v, x, SHAPES, "dense") ** 2)

    text = str(jax.make_jaxpr(jax.grad(total, (0, 1)))(values, locations))
    products = text.count("= dot_general[")
    assert products == 3 * len(SHAPES) * 3
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


def test_wrong_sizes_are_named():
    values, locations, _ = case(7)
    with pytest.raises(ValueError, match=r"levels .* do not fit values \(2, 35, 2, 4\)"):
        deformable.sample_values(values, locations, ((6, 4), (3, 2)))
    with pytest.raises(ValueError, match="2 or 4 coordinates"):
        deformable.sampling_locations(np.zeros((1, 1, 3, 3)), np.zeros((1, 1, 2, 3, 3, 2)), SHAPES)


def test_valid_ratios_are_of_the_top_left_corner():
    mask = np.zeros((2, 4, 8), bool)
    mask[0, :3, :2] = True
    mask[1] = True
    half = np.zeros((2, 2, 4), bool)
    half[0, :2, :1] = True
    half[1] = True
    found = deformable.valid_ratios([mask, half])
    np.testing.assert_allclose(found, [[[2 / 8, 3 / 4], [1 / 4, 1]], [[1, 1], [1, 1]]])


def test_encoder_reference_points():
    """Whole images: every token's own centre, the same on every level."""
    points = deformable.encoder_reference_points(((2, 4), (1, 2)), np.ones((1, 2, 2), "f4"))
    assert points.shape == (1, 10, 2, 2)
    np.testing.assert_allclose(points[0, :, 0], points[0, :, 1])
    np.testing.assert_allclose(points[0, 0, 0], [0.125, 0.25])
    np.testing.assert_allclose(points[0, 7, 1], [0.875, 0.75])
    np.testing.assert_allclose(points[0, 9, 0], [0.75, 0.5])


def test_encoder_reference_points_of_a_padded_image():
    """On its own level a token points at itself; elsewhere at the same place of the image."""
    ratios = np.array([[[0.5, 1.0], [0.75, 0.5]]], "f4")
    points = deformable.encoder_reference_points(((2, 4), (2, 2)), ratios)
    np.testing.assert_allclose(points[0, 0, 0], [0.125, 0.25])  # token (0, 0) of level 0
    np.testing.assert_allclose(points[0, 0, 1], [0.125 / 0.5 * 0.75, 0.25 / 1.0 * 0.5])
    np.testing.assert_allclose(points[0, 11, 1], [0.75, 0.75])  # token (1, 1) of level 1
    np.testing.assert_allclose(points[0, 11, 0], [0.75 / 0.75 * 0.5, 0.75 / 0.5 * 1.0])


def test_sampling_locations_of_points_and_of_boxes():
    reference = np.full((1, 1, 2, 2), 0.5, "f4")
    offsets = np.zeros((1, 1, 1, 2, 3, 2), "f4")
    offsets[..., 0], offsets[..., 1] = 1.0, -2.0
    found = deformable.sampling_locations(reference, offsets, ((4, 8), (2, 4)))
    np.testing.assert_allclose(found[0, 0, 0, 0, 0], [0.5 + 1 / 8, 0.5 - 2 / 4])
    np.testing.assert_allclose(found[0, 0, 0, 1, 2], [0.5 + 1 / 4, 0.5 - 2 / 2])
    boxes = np.array([0.5, 0.5, 0.2, 0.6], "f4").reshape(1, 1, 1, 4).repeat(2, 2)
    found = deformable.sampling_locations(boxes, offsets, ((4, 8), (2, 4)))
    # Three points: an offset of 3 would lie on the box's edge.
    np.testing.assert_allclose(found[0, 0, 0, 1, 1], [0.5 + 0.1 / 3, 0.5 - 2 * 0.3 / 3], rtol=1e-6)
