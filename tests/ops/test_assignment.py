"""The assignment solver against SciPy and hand cases; its sharding against the compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from aqdetr_jax.ops import assignment

assign = jax.jit(assignment.assign)
assign_repeated = jax.jit(assignment.assign_repeated)


def scipy_cost(cost):
    rows, columns = linear_sum_assignment(cost)
    return cost[rows, columns].sum()


def check(cost, valid, columns, tolerance=1e-5):
    """Every valid row has its own column, padded rows have none, and the cost is SciPy's."""
    cost, valid, columns = (np.asarray(x) for x in (cost, valid, columns))
    np.testing.assert_array_equal(columns >= 0, valid)
    chosen = columns[valid]
    assert len(set(chosen.tolist())) == len(chosen)
    assert np.all(chosen < cost.shape[1])
    used = cost[valid].astype(np.float64)
    got = used[np.arange(len(chosen)), chosen].sum()
    best = scipy_cost(used) if len(used) else 0.0
    assert got == pytest.approx(best, rel=tolerance, abs=tolerance)


HAND = [
    ([[-100, 100], [100, -100], [100, 100]], [0, 1], None),
    ([[400, 150, 400], [400, 450, 600], [300, 225, 300]], [1, 0, 2], 850),
    ([[400, 150, 400, 1], [400, 450, 600, 2], [300, 225, 300, 3]], None, 452),  # a tie
    ([[10, 10, 8], [9, 8, 1], [9, 7, 4]], [0, 2, 1], 18),
    ([[4, 1, 3], [2, 0, 5], [3, 2, 2]], [1, 0, 2], 5),
]


@pytest.mark.parametrize(("cost", "columns", "total"), HAND)
def test_hand_cases(cost, columns, total):
    cost = np.asarray(cost, np.float32)
    if len(cost) > cost.shape[1]:  # more rows than columns: the same matching, from the other side
        cost = cost.T
    got = np.asarray(assign(cost, np.ones(len(cost), bool)))
    if columns is not None:
        np.testing.assert_array_equal(got, columns)
    if total is not None:
        assert cost[np.arange(len(cost)), got].sum() == total


def test_second_hand_case_of_a_wide_matrix():
    cost = np.asarray([[-100, 100, 100], [100, 100, -100]], np.float32)
    np.testing.assert_array_equal(assign(cost, np.ones(2, bool)), [0, 2])


def test_self_matching_is_the_identity():
    points = np.random.default_rng(0).random((20, 4)).astype(np.float32)
    cost = np.abs(points[:, None] - points[None]).sum(-1)
    np.testing.assert_array_equal(assign(cost, np.ones(20, bool)), np.arange(20))


KINDS = [
    "uniform",
    "integers",
    "constant",
    "contested",
    "low rank",
    "equal rows",
    "equal columns",
    "large",
]


def make_cost(rng, kind, shape):
    problems, rows, columns = shape
    if kind == "integers":
        cost = rng.integers(-2, 3, shape)
    elif kind == "constant":
        cost = np.full(shape, 3.0)
    elif kind == "contested":  # some columns are good for every row, as in trained models
        cost = rng.normal(size=shape) + rng.normal(size=(problems, 1, columns))
    elif kind == "low rank":  # every row likes the same columns: the longest augmenting paths
        cost = rng.random((problems, rows, 1)) * rng.random((problems, 1, columns))
    elif kind == "equal rows":
        cost = np.repeat(rng.random((problems, (rows + 2) // 3, columns)), 3, axis=1)[:, :rows]
    elif kind == "equal columns":
        cost = np.repeat(rng.random((problems, rows, (columns + 2) // 3)), 3, axis=2)[..., :columns]
    elif kind == "large":
        cost = rng.random(shape) * 1e6 - 5e5
    else:
        cost = rng.random(shape)
    return cost.astype(np.float32)


@pytest.mark.accelerator
@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
def test_cost_equals_scipy(seed, kind):
    rng = np.random.default_rng(seed)
    cost = make_cost(rng, kind, (6, 7, 9))
    valid = rng.random((6, 7)) < rng.choice([0.3, 0.7, 1.0])  # real rows anywhere between padding
    columns = assign(cost, valid)
    for p in range(6):
        check(cost[p], valid[p], columns[p])


@pytest.mark.accelerator
@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 1, 5), (4, 16, 16), (2, 20, 100), (2, 30, 31)])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(shape, kind):
    rng = np.random.default_rng(1)
    cost = make_cost(rng, kind, shape)
    valid = np.arange(shape[1]) < rng.integers(0, shape[1] + 1, (shape[0], 1))
    valid[0] = True
    columns = assign(cost, valid)
    for p in range(shape[0]):
        check(cost[p], valid[p], columns[p])


def test_single_equals_batched_and_any_leading_axes():
    rng = np.random.default_rng(2)
    cost = rng.random((2, 3, 15, 100)).astype(np.float32)
    valid = np.arange(15) < rng.integers(0, 16, (3, 1))  # broadcast over the first axis
    together = assign(cost, valid)
    for i in range(2):
        for j in range(3):
            np.testing.assert_array_equal(together[i, j], assign(cost[i, j], valid[j]))


def test_nothing_to_assign():
    columns = assign(np.ones((4, 5, 6), np.float32), np.zeros((4, 5), bool))
    np.testing.assert_array_equal(columns, np.full((4, 5), -1))
    assert assign(np.ones((4, 0, 6), np.float32), np.zeros((4, 0), bool)).shape == (4, 0)


def test_more_rows_than_columns_places_the_first():
    cost = np.random.default_rng(3).random((8, 3)).astype(np.float32)
    valid = np.asarray([1, 0, 1, 1, 1, 1, 0, 1], bool)
    columns = np.asarray(assign(cost, valid))
    placed = np.asarray([1, 0, 1, 1, 0, 0, 0, 0], bool)
    check(cost, placed, columns)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_costs_are_avoided_and_counted(bad):
    rng = np.random.default_rng(4)
    cost = rng.random((3, 4, 6)).astype(np.float32)
    valid = np.ones((3, 4), bool)
    valid[0, 3] = False
    cost[0, 0, :5] = bad  # only column 5 is left for this row
    cost[0, 3] = bad  # padding: neither replaced nor counted
    cost[1, :, 2] = bad  # a column to avoid
    cost[2] = bad  # nothing finite: any matching will do
    clean, replaced = assignment.sanitize_cost(cost, valid)
    np.testing.assert_array_equal(replaced, [5, 4, 24])
    assert np.isfinite(clean).all()
    np.testing.assert_array_equal(clean[2], 0.0)
    for p in range(2):
        good = np.isfinite(cost[p]) & valid[p][:, None]
        np.testing.assert_array_equal(np.asarray(clean[p])[good], cost[p][good])
        assert np.asarray(clean[p])[valid[p]].max() > cost[p][good].max()
    columns = np.asarray(assign(cost, valid))
    assert columns[0, 0] == 5
    assert 2 not in columns[1]
    for p in range(3):
        check(np.asarray(clean[p]), valid[p], columns[p])


@pytest.mark.parametrize("value", [3e38, -3e38, 1e20])
def test_huge_finite_costs_stay_finite_and_below_the_replacement(value):
    cost = np.full((1, 2, 3), value, np.float32)
    cost[0, 0, 0] = np.nan
    clean, replaced = assignment.sanitize_cost(cost, np.ones((1, 2), bool))
    assert np.isfinite(clean).all()
    assert clean[0, 0, 0] > clean[0, 0, 1]
    assert replaced[0] == 1
    assert assign(cost, np.ones((1, 2), bool))[0, 0] != 0


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
def test_supply_equals_repeated_rows(seed, kind):
    """A row of supply k costs what k equal rows cost SciPy (H-DETR's formulation)."""
    rng = np.random.default_rng(seed)
    cost = make_cost(rng, kind, (6, 5, 14))
    supply = rng.integers(0, 4, (6, 5)).astype(np.int32)
    num_columns = np.maximum(supply.sum(1), rng.integers(1, 15, 6)).clip(max=14).astype(np.int32)
    owner, _ = assign_repeated(cost, supply, num_columns)
    owner = np.asarray(owner)
    for p in range(6):
        real = cost[p, :, : num_columns[p]]
        wanted = supply[p].copy()  # of more units than columns, the first are placed
        before = np.cumsum(wanted) - wanted
        wanted = np.clip(num_columns[p] - before, 0, wanted)
        assert np.all(owner[p, num_columns[p] :] == -1)
        held = np.flatnonzero(owner[p] >= 0)
        np.testing.assert_array_equal(np.bincount(owner[p][held], minlength=5), wanted)
        repeated = np.repeat(real.astype(np.float64), wanted, axis=0)
        assert real[owner[p][held], held].sum() == pytest.approx(
            scipy_cost(repeated), rel=1e-5, abs=1e-5
        )


loop = jax.jit(lambda cost, supply, count: assignment._loop(cost, supply, count)[1])


@pytest.mark.parametrize(("kind", "most"), [("uniform", 1.5), ("contested", 3)])
def test_iterations_stay_close_to_the_work(kind, most):
    """One flat loop: few more iterations than the largest number of units to place."""
    rng = np.random.default_rng(5)
    supply = np.where(np.arange(12) < rng.integers(0, 13, (192, 1)), 3, 0).astype(np.int32)
    units = supply.sum(1).max()
    iterations = loop(make_cost(rng, kind, (192, 12, 75)), supply, np.full(192, 75, np.int32))
    assert units <= iterations <= most * units


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
def test_iterations_never_exceed_those_of_searches_alone(seed, kind):
    """2 R - 1 a unit, R being the rows that want one: R scans and R - 1 flips after the first."""
    rng = np.random.default_rng(seed)
    cost = make_cost(rng, kind, (4, 6, 12))
    supply = rng.integers(0, 3, (4, 6)).astype(np.int32)
    iterations = loop(cost, supply, np.full(4, 12, np.int32))
    bound = np.max(supply.sum(1) * (2 * (supply > 0).sum(1) - 1))
    assert supply.sum(1).max() <= iterations <= max(bound, 0)


def test_no_gradient_flows():
    def total(cost):
        owner, _ = assignment.assign_repeated(cost, jnp.ones(3, jnp.int32))
        return jnp.sum(jnp.where(owner >= 0, jnp.min(cost, axis=0), 0.0))

    gradient = jax.jit(jax.grad(total))(
        jnp.asarray(np.random.default_rng(6).random((3, 4)), jnp.float32)
    )
    assert np.isfinite(gradient).all()


def test_sharded_without_a_mesh_and_its_error():
    cost = np.random.default_rng(7).random((2, 3, 4, 5)).astype(np.float32)
    supply = np.ones((3, 4), np.int32)
    assign_sharded = jax.jit(assignment.assign_sharded, static_argnames="batch_axis")
    owner, replaced = assign_sharded(cost, supply, batch_axis=1)
    np.testing.assert_array_equal(owner, assign_repeated(cost, supply)[0])
    assert replaced.shape == (2, 3)
    with pytest.raises(ValueError, match=r"batch_axis=2 must be one of the 2 leading axes"):
        assignment.assign_sharded(cost, supply, batch_axis=2)


SHARDED = """
    import re
    import jax, numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
    from aqdetr_jax.losses.criterion import LossWeights
    from aqdetr_jax.losses.matching import QuerySet, match_sets
    from aqdetr_jax.losses.targets import Predictions, Targets
    from aqdetr_jax.ops import assignment

    assert jax.device_count() == 8
    rng = np.random.default_rng(0)
    cost = rng.random((2, 8, 6, 20)).astype(np.float32)
    supply = (np.arange(6) < rng.integers(0, 7, (8, 1))).astype(np.int32) * 2
    alone, _ = assignment.assign_repeated(cost, supply)

    def make_mesh(shape, names):
        devices = np.asarray(jax.devices()).reshape(shape)
        return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(shape))

    def text(f, *args):
        return jax.jit(f).lower(*args).compile().as_text()

    collective = re.compile(r"all-reduce|all-gather|all-to-all|collective|reduce-scatter")
    for shape, names in (((8,), ("data",)), ((4, 2), ("data", "model")), ((8,), ("model",))):
        mesh = make_mesh(shape, names)
        data = "data" if "data" in names else None
        put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
        c, s = put(cost, None, data), put(supply, data)
        f = lambda c, s: assignment.assign_sharded(c, s, batch_axis=1)
        with jax.set_mesh(mesh):
            together, _ = jax.jit(f)(c, s)
            compiled = text(f, c, s)
        np.testing.assert_array_equal(together, alone)
        assert "while" in compiled
        assert not collective.search(compiled), (shape, collective.findall(compiled))
        # the mesh as an argument, and a batch that the mesh does not divide
        f = lambda c, s: assignment.assign_sharded(c, s, batch_axis=1, mesh=mesh)
        np.testing.assert_array_equal(jax.jit(f)(c, s)[0], alone)
        f = lambda c, s: assignment.assign_sharded(c, s, batch_axis=1)
        with jax.set_mesh(mesh):
            few, _ = jax.jit(f)(cost[:, :3], supply[:3])
        np.testing.assert_array_equal(few, alone[:, :3])
        if data is None:
            continue
        # inside a shard_map that already has the axis, the batch is local
        with jax.set_mesh(mesh):
            inner = jax.jit(jax.shard_map(
                lambda c, s: assignment.assign_sharded(c, s, batch_axis=1)[0],
                in_specs=(P(None, "data"), P("data")), out_specs=P(None, "data"), check_vma=False))
            np.testing.assert_array_equal(inner(c, s), alone)
        # without shard_map the trap is real: this is what the wrapper is for
        if shape == (8,):
            naive = text(lambda c, s: assignment.assign_repeated(c, s)[0], c, s)
            assert collective.search(naive)

    # the whole matcher, cost included, is local to a device
    mesh = make_mesh((4, 2), ("data", "model"))
    f32 = lambda *shape: rng.random(shape).astype(np.float32)
    sets = lambda b, r: [QuerySet(Predictions(*b[:2]), r), QuerySet(Predictions(*b[2:]), 2 * r)]
    batch = [f32(2, 8, 10, 5), f32(2, 8, 10, 4), f32(2, 8, 20, 5), f32(2, 8, 20, 4)]
    targets = Targets(f32(8, 6, 4), rng.integers(0, 4, (8, 6)).astype(np.int32), supply > 0)
    f = lambda b, t: match_sets(sets(b, t.valid.astype(np.int32)), t, LossWeights())
    expected = jax.jit(f)(batch, targets)
    with jax.set_mesh(mesh):
        put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
        batch = [put(x, None, "data") for x in batch]
        targets = jax.tree.map(lambda x: put(x, "data"), targets)
        got = jax.jit(f)(batch, targets)
        compiled = text(f, batch, targets)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert not collective.search(compiled), collective.findall(compiled)
    print("passed")
"""


def test_sharded_on_eight_devices_has_no_collective(run_python):
    assert run_python(SHARDED).strip() == "passed"
