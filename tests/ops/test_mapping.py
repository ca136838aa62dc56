"""What is mapped over a mesh, as a TPU would get it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from aqdetr_jax.ops import assignment, deformable_kernel
from aqdetr_jax.parallel.mesh import make_mesh


def assigned(cost):
    return assignment.assign_sharded(cost, jnp.ones((), jnp.int32), batch_axis=0)[0]


def sampled(values):
    """The gradient, so that both of the kernel's programs are made."""
    batch = len(values)
    locations = jnp.full((batch, 3, 1, 1, 1, 2), 0.5)
    weights = jnp.ones((batch, 1, 3, 1))

    def mix(weights, samples, _):
        return weights * samples

    def total(values):
        mixed = deformable_kernel.sample_and_mix(mix, values, locations, weights, (), ((2, 4),))
        return jnp.sum(jnp.square(mixed))

    return jax.grad(total)(values)


@pytest.mark.parametrize(
    "axes", [None, {"data"}, {"data", "model"}], ids=["nothing", "data", "data and model"]
)
@pytest.mark.parametrize(
    ("function", "shape"),
    [(assigned, (2, 3, 8)), (sampled, (2, 8, 1, 32))],
    ids=["matcher", "sampling"],
)
def test_kernels_are_mapped_over_whatever_axes_are_left(function, shape, axes):
    """A TPU refuses a kernel of which any axis is left to XLA, even one of a single device.

    Micro-batches are mapped over "data" alone: parameters may be split over "model".
    """
    each = PartitionSpec("data")

    def mapped(x):
        if axes is None:
            return function(x)
        return jax.shard_map(
            function, in_specs=each, out_specs=each, axis_names=axes, check_vma=False
        )(x)

    with jax.set_mesh(make_mesh(data=1)):
        traced = jax.jit(mapped).trace(jax.ShapeDtypeStruct(shape, jnp.float32))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text
