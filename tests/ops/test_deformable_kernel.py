"""The TPU kernel, interpreted, against the plain gather and the compiler for a TPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqdetr_jax.ops import deformable, deformable_kernel

SHAPES = ((6, 4), (3, 2), (1, 5))
LEVELS = len(SHAPES)


def case(seed, batch=1, queries=130, heads=5, points=2):
    """More queries than a block has, and a fifth of the points outside on every side."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(batch, deformable.token_count(SHAPES), heads, 32))
    locations = rng.uniform(-0.3, 1.3, (batch, queries, heads, LEVELS, points, 2))
    weights = rng.dirichlet(np.ones(LEVELS * points), (batch, heads, queries))
    scale = rng.uniform(0.5, 2, (heads, 1, 1))
    cotangent = rng.normal(size=(batch, heads, queries, 32))
    return [x.astype("f4") for x in (values, locations, weights, scale, cotangent)]


def mix(weights, samples, scale):
    """Not linear in the samples, as a quantizer is not."""
    samples = samples.reshape(weights.shape[0], -1, weights.shape[1])
    return jnp.sum(weights[:, None] * jnp.sin(scale * samples), axis=0)


def by_kernel(values, locations, weights, scale):
    return deformable_kernel.sample_and_mix(mix, values, locations, weights, scale, SHAPES, True)


def by_gather(values, locations, weights, scale):
    samples = deformable.sample_values(values, locations, SHAPES, "gather")
    samples = samples.reshape(*weights.shape, -1).astype("f4")
    return jnp.einsum("bmqp,bmqpd->bmqd", weights, jnp.sin(scale[..., None] * samples))


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(function, values, locations, weights, scale, cotangent):
    out, pullback = jax.vjp(function, values, locations, weights, scale)
    return out, *pullback(cotangent.astype(out.dtype))


@pytest.mark.parametrize("on_centres", [False, True])
def test_value_and_every_gradient_are_those_of_the_gather(on_centres):
    """On cell centres too, where every attention begins and gradients have two sides."""
    values, locations, *rest = case(0)
    if on_centres:
        size = np.array([(w, h) for h, w in SHAPES])[:, None]
        locations = ((np.floor(locations * size) + 0.5) / size).astype("f4")
    found = value_and_grad(by_kernel, values, locations, *rest)
    want = value_and_grad(by_gather, values, locations, *rest)
    np.testing.assert_allclose(found[0], want[0], rtol=0, atol=1e-6)
    for a, b in zip(found[1:], want[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())
        assert np.abs(b).max() > 0.1


def test_a_bfloat16_table_is_only_rounded_once_and_summed_in_float32():
    """1024 points share a cell: a bfloat16 sum of ones ends at 256."""
    values, locations, *rest = case(1)
    rounded = jnp.asarray(values, jnp.bfloat16)
    rest[-1] = rest[-1].astype(jnp.bfloat16).astype("f4")
    found = value_and_grad(by_kernel, rounded, locations, *rest)
    want = value_and_grad(by_kernel, rounded.astype("f4"), locations, *rest)
    assert found[0].dtype == found[1].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[0], want[0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(found[1], want[1].astype(jnp.bfloat16))
    for a, b in zip(found[2:], want[2:], strict=True):
        np.testing.assert_array_equal(a, b)

    def total(values):
        points = jnp.full((1, 1024, 1, 1, 1, 2), 0.25)
        weights = jnp.ones((1, 1, 1024, 1))
        return jnp.sum(
            deformable_kernel.sample_and_mix(
                lambda w, s, _: w * s, values, points, weights, None, ((2, 2),), True
            )
        )

    found = jax.jit(jax.grad(total))(jnp.zeros((1, 4, 1, 32), jnp.bfloat16))
    np.testing.assert_array_equal(found[0, :, 0].astype("f4"), np.eye(4)[:, :1] * [[1024] * 32])


def test_each_device_samples_its_own_images(run_python):
    """What 4 devices make of 4 images, or of 3, is what one makes; gradients need no collective."""
    run_python(SHARDED, devices=4)


SHARDED = """
    import sys
    import jax, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    sys.path.insert(0, "tests/ops")
    from test_deformable_kernel import case, value_and_grad, by_kernel

    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    for batch, split in ((4, PartitionSpec("data")), (3, PartitionSpec())):
        *arrays, scale, cotangent = case(2, batch, queries=5, heads=1, points=1)
        given = (*arrays, scale[0, 0, 0], cotangent)
        want = jax.jit(by_kernel)(*given[:-1])
        gradient = jax.jit(lambda *x: value_and_grad(by_kernel, *x)[1:4])
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, NamedSharding(mesh, split)) for x in arrays]
            found = jax.jit(by_kernel)(*placed, given[-2])
            text = gradient.lower(*placed, *given[-2:]).compile().as_text()
        np.testing.assert_array_equal(found, want)
        assert found.sharding.shard_shape(found.shape)[0] == (2 if batch == 4 else 3)
        assert "all-" not in text and "collective" not in text
"""


def test_what_does_not_fit_is_named():
    values, locations, *_ = case(3)
    assert deformable_kernel.misfit(values, locations, SHAPES) is None
    assert "16 channels, not 32" in deformable_kernel.misfit(values[..., :16], locations, SHAPES)
    large = ((200, 300), (100, 150))
    assert "MiB of vector memory" in deformable_kernel.misfit(values, locations, large)
    # COCO's largest bucket fits.
    coco = tuple((-(-800 // s), -(-1344 // s)) for s in (8, 16, 32, 64))
    assert deformable_kernel.misfit(values, locations, coco) is None
    # But not into the vector memory of chips that have little of it, here or elsewhere.
    device = jax.sharding.AbstractDevice("TPU v4", 1, "tpu")
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((4,), ("data",), abstract_device=device)
    ):
        assert "the kernel has 15" in deformable_kernel.misfit(values, locations, coco)
        assert deformable_kernel.misfit(values, locations, SHAPES) is None
