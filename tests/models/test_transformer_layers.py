"""Attention, transformer layers and stacks against NumPy written from the papers' equations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqdetr_jax.models.attention import MASKED, MultiHeadAttention
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.dropout import drawing, row_keys
from aqdetr_jax.models.resnet import BackboneConfig
from aqdetr_jax.models.transformer import Decoder, Encoder
from aqdetr_jax.quant.policy import stock_policy

pytestmark = pytest.mark.usefixtures("quick_compile")

DIM, HEADS, FFN, BATCH, TOKENS, QUERIES = 16, 4, 12, 2, 6, 5
CONFIG = DetrConfig(
    BackboneConfig(),
    dim=DIM,
    heads=HEADS,
    encoder_layers=2,
    decoder_layers=2,
    ffn=FFN,
    dropout=0.5,
)
VALID = np.array([[True] * 6, [True, True, True, False, True, False]])


def randomized(init, *inputs, seed=0):
    """All parameters random: a zero bias or unit scale would hide a swap."""
    variables = jax.eval_shape(init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        if path[-1].key.endswith("_step"):
            size = {"kernel_step": 0.1, "probs_step": 0.04}.get(path[-1].key, 0.3)
            return rng.uniform(0.7 * size, size, leaf.shape).astype(np.float32)
        x = rng.normal(0, 0.3, leaf.shape).astype(np.float32)
        return 1 + x if path[-1].key == "scale" else x

    return jax.tree_util.tree_map_with_path(one, variables)


def arrays(*shapes, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


# --- the equations in NumPy, float64 ---


def np_dense(p, x):
    return x @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"], np.float64)


def np_norm(p, x):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * np.asarray(p["scale"]) + np.asarray(p["bias"])


def np_attention(p, query, key, value, valid=None):
    """One batch entry, head and query at a time."""
    q, k, v = (
        np_dense(p[n], x.astype(np.float64))
        for n, x in (("q_proj", query), ("k_proj", key), ("v_proj", value))
    )
    size = DIM // HEADS
    maps = np.zeros((q.shape[0], HEADS, q.shape[1], k.shape[1]))
    mixed = np.zeros_like(q)
    for b, h, i in np.ndindex(*maps.shape[:3]):
        part = slice(h * size, (h + 1) * size)
        keep = np.ones(k.shape[1], bool) if valid is None else valid[b]
        scores = k[b, keep, part] @ q[b, i, part] / np.sqrt(size)
        weights = np.exp(scores - scores.max())
        maps[b, h, i, keep] = weights / weights.sum()
        mixed[b, i, part] = maps[b, h, i, keep] @ v[b, keep, part]
    return np_dense(p["out_proj"], mixed), maps, mixed


def np_ffn(p, x):
    return np_dense(p["linear2"], np.maximum(np_dense(p["linear1"], x), 0))


def np_residual(p, x, sublayer, norm, pre_norm):
    if pre_norm:
        return x + sublayer(np_norm(p[norm], x))
    return np_norm(p[norm], x + sublayer(x))


def np_encoder(p, x, position, valid, pre_norm):
    for i in range(CONFIG.encoder_layers):
        layer = p[f"layer_{i}"]

        def attend(y, weights=layer["self_attention"]):
            return np_attention(weights, y + position, y + position, y, valid)[0]

        x = np_residual(layer, x, attend, "norm1", pre_norm)
        x = np_residual(
            layer, x, functools.partial(np_ffn, layer["feed_forward"]), "norm2", pre_norm
        )
    return np_norm(p["norm"], x) if pre_norm else x


def np_decoder(p, query, memory, position, valid, pre_norm):
    x, outputs = np.zeros(query.shape), []
    for i in range(CONFIG.decoder_layers):
        layer = p[f"layer_{i}"]

        def attend(y, weights=layer["self_attention"]):
            return np_attention(weights, y + query, y + query, y)[0]

        def look(y, weights=layer["cross_attention"]):
            return np_attention(weights, y + query, memory + position, memory, valid)[0]

        x = np_residual(layer, x, attend, "norm1", pre_norm)
        x = np_residual(layer, x, look, "norm2", pre_norm)
        x = np_residual(
            layer, x, functools.partial(np_ffn, layer["feed_forward"]), "norm3", pre_norm
        )
        outputs.append(np_norm(p["norm"], x))
    return np.stack(outputs)


# --- attention ---


@functools.cache
def attention(policy="float", sets=None):
    """(jitted apply, variables) of one attention module."""
    module = MultiHeadAttention(DIM, HEADS, stock_policy(policy), dropout=0.5)
    x = jnp.zeros((BATCH, TOKENS, DIM))
    variables = randomized(module.init, x, x, x)
    return jax.jit(functools.partial(module.apply, query_sets=sets)), variables


def test_attention_agrees_with_numpy_under_a_mask():
    apply, variables = attention()
    query, key, value = arrays(*[(BATCH, TOKENS, DIM)] * 3)
    out, maps = apply(variables, query, key, value, VALID)
    expected, probabilities, mixed = np_attention(variables["params"], query, key, value, VALID)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(maps.probabilities, probabilities, atol=1e-6)
    np.testing.assert_allclose(maps.output, mixed, atol=1e-5)
    hidden = np.broadcast_to(~VALID[:, None, None], maps.scores.shape)
    np.testing.assert_array_equal(np.asarray(maps.scores)[hidden], np.float32(MASKED))
    np.testing.assert_array_equal(np.asarray(maps.probabilities)[hidden], 0)


def test_an_image_without_valid_keys_stays_finite():
    apply, variables = attention()
    query, key, value = arrays(*[(BATCH, TOKENS, DIM)] * 3)
    out, _ = apply(variables, query, key, value, np.zeros_like(VALID))
    assert np.all(np.isfinite(out))


def test_width_must_divide_into_heads():
    x = jnp.zeros((1, 2, 10))
    with pytest.raises(ValueError, match="width 10 is not divisible by 4 heads"):
        MultiHeadAttention(10, 4).init(jax.random.key(0), x, x, x)


SETS = (2, 2, 2)  # the second and third fold into the batch


@pytest.mark.parametrize("policy", ["float", "w4a4"])
def test_query_sets_are_apart(policy):
    apart, variables = attention(policy, SETS)
    alone, _ = attention(policy)
    query, value = arrays(*[(BATCH, TOKENS, DIM)] * 2, seed=3)
    out, maps = apart(variables, query, query, value)
    for i in range(3):
        part = slice(2 * i, 2 * i + 2)
        single, single_maps = alone(variables, query[:, part], query[:, part], value[:, part])
        np.testing.assert_allclose(out[:, part], single, atol=1e-5)
        if i == 0:
            np.testing.assert_allclose(maps.probabilities, single_maps.probabilities, atol=1e-6)
    for changed in range(3):
        other_q, other_v = query.copy(), value.copy()
        part = slice(2 * changed, 2 * changed + 2)
        other_q[:, part] += 1
        other_v[:, part] -= 1
        after, _ = apart(variables, other_q, other_q, other_v)
        same = np.all(np.asarray(after == out), axis=(0, 2)).reshape(3, 2).all(1)
        np.testing.assert_array_equal(same, np.arange(3) != changed)


def test_query_sets_of_unequal_size():
    apart, variables = attention("float", (1, 2, 3))
    (query,) = arrays((BATCH, TOKENS, DIM), seed=4)
    out, _ = apart(variables, query, query, query)
    for start, stop in ((0, 1), (1, 3), (3, 6)):
        x = query[:, start:stop]
        expected = np_attention(variables["params"], x, x, x)[0]
        np.testing.assert_allclose(out[:, start:stop], expected, atol=1e-5)


def test_query_sets_must_sum_to_the_queries():
    module = MultiHeadAttention(DIM, HEADS)
    x = jnp.zeros((1, TOKENS, DIM))
    with pytest.raises(ValueError, match=r"query sets \(2, 3\) do not sum to 6"):
        module.init(jax.random.key(0), x, x, x, query_sets=(2, 3))


# --- encoder and decoder ---


@functools.cache
def stack(kind, pre_norm, policy="float", sets=(QUERIES,)):
    """(jitted eval, jitted train, variables) of an encoder or a decoder."""
    config = dataclasses.replace(CONFIG, pre_norm=pre_norm)
    tokens = jnp.zeros((BATCH, TOKENS, DIM))
    query = jnp.zeros((BATCH, sum(sets), DIM))
    if kind == "encoder":
        module = Encoder(config, stock_policy(policy))
        inputs = (tokens, tokens, VALID)
        extra: tuple = ()
    else:
        module = Decoder(config, stock_policy(policy))
        inputs = (query, tokens, tokens, VALID)
        extra = (sets,)
    variables = randomized(lambda key, *x: module.init(key, *x, *extra, False), *inputs)
    evaluate = jax.jit(lambda v, *x: module.apply(v, *x, *extra, False))

    @jax.jit
    def train(v, key, *x):
        with drawing(row_keys(key, BATCH)):
            return module.apply(v, *x, *extra, True)

    return evaluate, train, variables


@pytest.mark.parametrize("pre_norm", [False, True])
def test_encoder_agrees_with_numpy(pre_norm):
    evaluate, _, variables = stack("encoder", pre_norm)
    x, position = arrays(*[(BATCH, TOKENS, DIM)] * 2, seed=5)
    out, maps = evaluate(variables, x, position, VALID)
    assert len(maps) == CONFIG.encoder_layers
    expected = np_encoder(variables["params"], x, position, VALID, pre_norm)
    np.testing.assert_allclose(out, expected, atol=3e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_decoder_agrees_with_numpy(pre_norm):
    evaluate, _, variables = stack("decoder", pre_norm)
    query, memory, position = arrays((BATCH, QUERIES, DIM), *[(BATCH, TOKENS, DIM)] * 2, seed=6)
    out, self_maps, cross_maps = evaluate(variables, query, memory, position, VALID)
    expected = np_decoder(variables["params"], query, memory, position, VALID, pre_norm)
    np.testing.assert_allclose(out, expected, atol=3e-5)
    assert self_maps[0].scores.shape == (BATCH, HEADS, QUERIES, QUERIES)
    assert cross_maps[1].scores.shape == (BATCH, HEADS, QUERIES, TOKENS)


def test_dropout_is_on_in_training_only():
    evaluate, train, variables = stack("encoder", False)
    x, position = arrays(*[(BATCH, TOKENS, DIM)] * 2, seed=5)
    plain = evaluate(variables, x, position, VALID)[0]
    one, two = (train(variables, jax.random.key(i), x, position, VALID)[0] for i in (1, 2))
    assert float(jnp.abs(one - plain).max()) > 0.1
    assert float(jnp.abs(one - two).max()) > 0.1


@pytest.mark.parametrize("policy", ["float", "w4a4"])
def test_what_lies_in_padding_changes_nothing(policy):
    keep = VALID[..., None]
    x, position, other = arrays(*[(BATCH, TOKENS, DIM)] * 3, seed=7)
    query = arrays((BATCH, QUERIES, DIM), seed=8)[0]
    evaluate, _, variables = stack("encoder", False, policy)
    before = evaluate(variables, x, position, VALID)[0]
    after = evaluate(variables, np.where(keep, x, 9 * other), position, VALID)[0]
    np.testing.assert_array_equal(np.asarray(before)[VALID], np.asarray(after)[VALID])
    evaluate, _, variables = stack("decoder", False, policy)
    before = evaluate(variables, query, x, position, VALID)[0]
    noisy = np.where(keep, x, 9 * other), np.where(keep, position, other)
    np.testing.assert_array_equal(before, evaluate(variables, query, *noisy, VALID)[0])


def test_tokens_may_be_padded_anywhere():
    # The second image's valid tokens, alone: same memory and same decoder output.
    x, position = arrays(*[(BATCH, TOKENS, DIM)] * 2, seed=9)
    query = arrays((BATCH, QUERIES, DIM), seed=8)[0]
    short = [a[1:, VALID[1]] for a in (x, position)]
    ones = np.ones((1, int(VALID[1].sum())), bool)
    params = stack("encoder", True)[2]["params"]
    out = stack("encoder", True)[0]({"params": params}, x, position, VALID)[0]
    alone = np_encoder(params, *short, ones, True)
    np.testing.assert_allclose(np.asarray(out)[1, VALID[1]], alone[0], atol=3e-5)
    params = stack("decoder", True)[2]["params"]
    out = stack("decoder", True)[0]({"params": params}, query, x, position, VALID)[0]
    alone = np_decoder(params, query[1:], *short, ones, True)
    np.testing.assert_allclose(np.asarray(out)[:, 1:], alone, atol=3e-5)


def test_recomputing_a_layer_changes_no_gradient():
    x, position = arrays(*[(BATCH, TOKENS, DIM)] * 2, seed=10)

    def gradient(remat):
        config = dataclasses.replace(CONFIG, encoder_layers=1, remat=remat)
        module = Encoder(config, stock_policy("w4a4"))
        variables = randomized(lambda key: module.init(key, x, position, VALID, False))

        def loss(variables):
            return jnp.sum(jnp.sin(module.apply(variables, x, position, VALID, False)[0]))

        return jax.jit(jax.grad(loss))(variables)

    plain, again = gradient(False), gradient(True)
    assert jax.tree.structure(plain) == jax.tree.structure(again)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
