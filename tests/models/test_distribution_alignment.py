"""Q-DETR's alignment of the co-attention's query (eq. 9), and where it is."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_models
from test_transformer_layers import DIM, HEADS, VALID, arrays, np_dense, randomized
from tiny_models import CONFIGS, shapes_of

from aqdetr_jax.models.attention import MultiHeadAttention
from aqdetr_jax.models.layers import DistributionAlignment
from aqdetr_jax.models.quantized import OBSERVED
from aqdetr_jax.quant.calibrate import aligned_parameters
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.quant.policy import Policy, stock_policy
from aqdetr_jax.quant.record import OpRecord
from aqdetr_jax.quant.spec import GRID_PARAMETERS

pytestmark = pytest.mark.usefixtures("quick_compile")

ALIGNED = Policy(align_queries=True)
"""Float grids, so that nothing but the alignment is seen."""


def np_aligned(q, scale, bias):
    """Equation 9, one query at a time."""
    out = np.empty_like(q, np.float64)
    for index in np.ndindex(*q.shape[:-1]):
        mean, variance = q[index].mean(), q[index].astype(np.float64).var()
        out[index] = (q[index] - mean) / np.sqrt(variance + 1e-5) * scale + bias
    return out


def test_the_equation():
    q, scale, bias = arrays((2, 3, 5, 8), (8,), (8,))
    variables = {"params": {"scale": scale, "bias": bias}}
    got = DistributionAlignment(ALIGNED).apply(variables, q)
    np.testing.assert_allclose(got, np_aligned(q, scale, bias), rtol=1e-4, atol=1e-5)


def test_every_heads_query_is_aligned_before_the_scores():
    module = MultiHeadAttention(DIM, HEADS, ALIGNED, co_attention=True)
    query, key, value = arrays((2, 5, DIM), (2, 6, DIM), (2, 6, DIM))
    variables = randomized(module.init, query, key, value, VALID)
    p, size = variables["params"], DIM // HEADS
    assert p["alignment"]["scale"].shape == (size,)
    q, k = np_dense(p["q_proj"], query), np_dense(p["k_proj"], key)
    q = np_aligned(q.reshape(2, 5, HEADS, size), p["alignment"]["scale"], p["alignment"]["bias"])
    scores = np.einsum("bqhd,bkhd->bhqk", q, k.reshape(2, 6, HEADS, size)) / np.sqrt(size)
    _, maps = module.apply(variables, query, key, value, VALID)
    real = np.broadcast_to(VALID[:, None, None], scores.shape)
    np.testing.assert_allclose(maps.scores[real], scores[real], rtol=1e-4, atol=1e-4)


def test_calibration_sees_the_query_as_it_is_and_starts_close_to_it():
    observing = dataclasses.replace(ALIGNED, arithmetic="observe")
    module = DistributionAlignment(observing)
    q = 0.7 + 2 * arrays((2, 3, 5, 8))[0]
    out, seen = module.apply({}, q, mutable=[OBSERVED])
    np.testing.assert_array_equal(out, q)
    rows = q.reshape(-1, 8)
    statistics = seen[OBSERVED]["statistics"]
    np.testing.assert_allclose(statistics, [rows.mean(1), rows.std(1)], rtol=1e-4, atol=1e-5)
    path = "decoder/layer_0/cross_attention/alignment"
    parameters = {f"{path}/scale": np.ones(8), f"{path}/bias": np.zeros(8)}
    rows = [OpRecord("decoder/norm", "norm"), OpRecord(path, "norm")]
    made = aligned_parameters(rows, {f"{path}/statistics": np.asarray(statistics)}, parameters)
    assert made.keys() == parameters.keys()
    np.testing.assert_allclose(made[f"{path}/scale"], np.full(8, statistics[1].mean()), rtol=1e-6)
    np.testing.assert_allclose(made[f"{path}/bias"], np.full(8, statistics[0].mean()), rtol=1e-6)
    start = {"params": {name: made[f"{path}/{name}"] for name in ("scale", "bias")}}
    near, far = (
        np.square(DistributionAlignment(ALIGNED).apply(v, q) - q).mean()
        for v in (start, {"params": {"scale": np.ones(8), "bias": np.zeros(8)}})
    )
    assert near < far / 2


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_in_the_decoders_co_attention_alone_and_off_by_default(name):
    config = CONFIGS[name]

    def paths(policy):
        return tiny_models.flat(shapes_of(config, policy)["params"])

    plain = paths(stock_policy("w4a4"))
    aligned = paths(stock_policy("w4a4", align_queries=True))
    width = config.dim // (config.heads if config.family == "detr" else 1)
    more = {
        f"decoder/layer_{i}/cross_attention/alignment/{leaf}": (width,)
        for i in range(config.decoder_layers)
        for leaf in ("scale", "bias")
    }
    assert aligned == plain | more
    assert all(path.endswith(GRID_PARAMETERS) for path in more)
    # A float model has no queries to align, whatever its configuration says.
    assert not QuantConfig("float", align_queries=True).build().align_queries
    assert QuantConfig("w4a4", align_queries=True).build().align_queries


def test_its_gradient_reaches_scale_and_bias():
    module = MultiHeadAttention(DIM, HEADS, ALIGNED, co_attention=True)
    inputs = arrays((2, 5, DIM), (2, 6, DIM), (2, 6, DIM))
    variables = randomized(module.init, *inputs)
    slopes = jax.grad(lambda v: module.apply(v, *inputs)[0].sum())(variables)["params"]
    assert all(np.any(slope) for slope in jax.tree.leaves(slopes["alignment"]))
