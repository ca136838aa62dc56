"""The TPU's kernel: interpreted on the CPU, and lowered for a TPU that is not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_assignment import KINDS, make_cost

from aqdetr_jax.ops import assignment, assignment_kernel


def test_interpreted_equals_the_loop():
    """All kinds of costs, in blocks that the problems do not fill; also problems with no units."""
    rng = np.random.default_rng(0)
    rows, columns = 7, 21
    cost = np.concatenate([make_cost(rng, kind, (3, rows, columns)) for kind in KINDS])
    cost = cost[:-1]
    supply = rng.integers(0, 4, cost.shape[:2]).astype(np.int32)
    supply[4] = 0
    count = rng.integers(1, columns + 1, len(cost)).astype(np.int32)
    count[0] = supply[0].sum()  # every column is used
    wanted = assignment._limit(supply, count)
    assert np.any(np.asarray(wanted) < supply)
    owner, iterations = jax.jit(assignment._loop)(cost, wanted, count)
    assert iterations > 21
    got = assignment_kernel.solve(cost, wanted, count, 8, interpret=True)
    np.testing.assert_array_equal(got, owner)
    held = np.stack([np.bincount(o[o >= 0], minlength=rows) for o in np.asarray(got)])
    np.testing.assert_array_equal(held, wanted)


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((48, 100, 300), 48),  # DETR, 4 images a chip
        ((96, 100, 300), 48),
        ((100, 100, 300), 40),  # as even as the number of blocks allows
        ((48, 100, 1500), 16),  # Deformable DETR
        ((1, 5, 7), 8),
        ((8, 512, 4096), None),
    ],
)
def test_block(shape, block):
    assert assignment_kernel.block_of(shape) == block
    if block is not None:
        padded = [-(-n // m) * m for n, m in zip(shape[1:], (8, 128), strict=True)]
        assert 4 * block * np.prod(padded) <= 12 * 2**20


@pytest.mark.parametrize(
    ("platform", "shape", "kernels"),
    [("tpu", (9, 5, 30), 1), ("cpu", (9, 5, 30), 0), ("tpu", (8, 512, 4096), 0)],
)
def test_chosen_on_a_tpu_only_and_where_it_fits(platform, shape, kernels):
    cost = jax.ShapeDtypeStruct(shape, jnp.float32)
    supply = jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    traced = jax.jit(lambda c, s: assignment.assign_repeated(c, s)[0]).trace(cost, supply)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@tpu_custom_call") == kernels
    assert text.count("stablehlo.while") == 1 - kernels
