"""DETR: sizes, auxiliary queries, padding, batches, low bits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import traverse_util
from tiny_models import DETR as CONFIG

from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.detr import Detr
from aqdetr_jax.models.dropout import drawing, row_keys
from aqdetr_jax.models.heads import normalize_images
from aqdetr_jax.models.quantized import OBSERVED
from aqdetr_jax.models.resnet import resnet_config
from aqdetr_jax.quant.policy import Policy, stock_policy
from aqdetr_jax.training.config import OptimizerConfig
from aqdetr_jax.training.optimizer import count_trainable

pytestmark = pytest.mark.usefixtures("quick_compile")

STRIDE = 4
SIZES = ((16, 12), (12, 16))
BUCKET = (32, 32)
variables_of = functools.partial(tiny_models.variables_of, "detr")
model = functools.partial(tiny_models.model, "detr")


def padded(bucket, fill=0):
    return tiny_models.batch(fill, bucket, SIZES)


def assert_outputs_equal(a, b, exact=True, atol=1e-5):
    for name in ("logits", "boxes"):
        x, y = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
        if exact:
            np.testing.assert_array_equal(x, y, err_msg=name)
        else:
            np.testing.assert_allclose(x, y, atol=atol, err_msg=name)


# --- sizes ---


@functools.cache
def standard(name, dc5):
    module = Detr(DetrConfig(resnet_config(name, dc5=dc5)))
    image = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.uint8)
    mask = jax.ShapeDtypeStruct((1, 64, 96), bool)
    output, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), image, mask)
    return variables, output


@pytest.mark.parametrize(
    ("name", "dc5", "learnable", "trainable", "with_norms", "state"),
    [
        ("resnet50", False, 41_524_768, 41_302_368, 41_577_888, 41_631_008),
        ("resnet50", True, 41_524_768, 41_302_368, 41_577_888, 41_631_008),
        ("resnet101", False, 60_464_672, 60_242_272, 60_570_016, 60_675_360),
        ("resnet101", True, 60_464_672, 60_242_272, 60_570_016, 60_675_360),
    ],
)
def test_parameter_counts(name, dc5, learnable, trainable, with_norms, state):
    variables, _ = standard(name, dc5)
    params = variables["params"]
    early = OptimizerConfig(frozen=(r"backbone/(stem|layer1_)",))
    assert count_trainable(params, OptimizerConfig(), frozen_norms=True) == learnable
    assert count_trainable(params, early, frozen_norms=True) == trainable
    assert count_trainable(params, OptimizerConfig(), frozen_norms=False) == with_norms
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == state


def test_output_shapes():
    _, output = standard("resnet50", False)
    assert output.logits.shape == (6, 1, 100, 92)
    assert output.boxes.shape == (6, 1, 100, 4)
    assert output.auxiliary_logits is None
    assert output.memory.shape == (1, 2 * 3, 256)
    assert output.memory_valid.shape == (1, 2 * 3)
    assert output.decoder_features.shape == (6, 1, 100, 256)
    assert len(output.encoder_attention) == len(output.decoder_cross_attention) == 6
    assert output.encoder_attention[0].scores.shape == (1, 8, 6, 6)
    assert standard("resnet50", True)[1].memory.shape == (1, 4 * 6, 256)


def test_a_quantized_model_only_adds_step_sizes():
    def shapes(policy):
        module = Detr(CONFIG, policy)
        tree = jax.eval_shape(module.init, jax.random.key(0), *padded(BUCKET))
        return traverse_util.flatten_dict(tree, sep="/")

    plain, low = shapes(Policy()), shapes(stock_policy("w4a4"))
    assert {path: s.shape for path, s in low.items() if path in plain} == {
        path: s.shape for path, s in plain.items()
    }
    assert all(path.endswith("_step") for path in low if path not in plain)
    # Centring adds two vectors to every dense layer whose input can be negative.
    centred = shapes(stock_policy("w4a4", grid="centred"))
    assert {path: s.shape for path, s in centred.items() if path in low} == {
        path: s.shape for path, s in low.items()
    }
    more = {path.removeprefix("params/") for path in centred if path not in low}
    layers = {path.rsplit("/", 1)[0] for path in more}
    assert more == {f"{layer}/input_{name}" for layer in layers for name in ("shift", "scale")}
    dense = {p.rsplit("/", 1)[0] for p in low if p.endswith("input_step")}
    dense = {p.removeprefix("params/") for p in dense if "backbone" not in p}
    assert layers == {p for p in dense if not p.endswith("linear2") and p != "input_proj"}


def test_groups_must_be_equal():
    with pytest.raises(ValueError, match="6 auxiliary queries do not split into 4 equal groups"):
        dataclasses.replace(CONFIG, auxiliary_groups=4)
    assert CONFIG.query_sets == (5, 3, 3)
    assert dataclasses.replace(CONFIG, num_auxiliary=0).query_sets == (5,)


# --- auxiliary queries ---


def test_auxiliary_queries_do_not_touch_the_object_queries():
    policy = "w4a4"  # the float attention's query sets have their own test
    variables, batch = variables_of(policy), padded(BUCKET)
    alone = model(policy)(variables, *batch)
    together = model(policy, auxiliary=True)(variables, *batch)
    assert together.auxiliary_logits.shape == (2, 2, 6, 4)
    assert together.auxiliary_boxes.shape == (2, 2, 6, 4)
    assert_outputs_equal(together, alone, exact=False)
    np.testing.assert_allclose(
        together.decoder_self_attention[1].probabilities,
        alone.decoder_self_attention[1].probabilities,
        atol=1e-5,
    )
    # And the auxiliary ones do run: they depend on their own embedding, group by group.
    params = variables["params"]
    other = params["auxiliary_queries"].copy()
    other[3:] = np.random.default_rng(2).normal(size=other[3:].shape)
    changed = model(policy, auxiliary=True)(
        {**variables, "params": {**params, "auxiliary_queries": other}}, *batch
    )
    assert_outputs_equal(changed, together)
    same = np.asarray(changed.auxiliary_logits == together.auxiliary_logits).all((0, 1, 3))
    np.testing.assert_array_equal(same, [True] * 3 + [False] * 3)


def test_inference_does_not_read_the_auxiliary_parameter():
    variables, batch = variables_of(), padded(BUCKET)
    without = {k: v for k, v in variables["params"].items() if k != "auxiliary_queries"}
    deleted = model()({**variables, "params": without}, *batch)
    assert_outputs_equal(deleted, model()(variables, *batch))

    module = Detr(CONFIG)
    flat, _ = jax.tree_util.tree_flatten_with_path(variables)
    names = [path[-1].key for path, _ in flat]
    for auxiliary in (False, True):
        closed = jax.make_jaxpr(functools.partial(module.apply, auxiliary=auxiliary))(
            variables, *batch
        )
        variable = closed.jaxpr.invars[names.index("auxiliary_queries")]
        read = any(variable is v for eqn in closed.jaxpr.eqns for v in eqn.invars)
        assert read == auxiliary


def test_auxiliary_queries_must_exist():
    module = Detr(dataclasses.replace(CONFIG, num_auxiliary=0))
    with pytest.raises(ValueError, match="num_auxiliary=0"):
        jax.eval_shape(lambda v: module.apply(v, *padded(BUCKET), auxiliary=True), variables_of())


# --- padding and batches ---


def assert_few_differ(a, b, policy, atol):
    """Equal but for rounding, which on a low-bit grid may carry a value over an edge."""
    if policy == "float":
        assert_outputs_equal(a, b, exact=False, atol=atol)
        return
    for name in ("logits", "boxes"):
        x, y = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
        assert np.mean(np.abs(x - y) > atol) < 0.1, name
        assert np.mean(np.abs(x - y)) < 0.01 * np.std(x), name


@pytest.mark.parametrize("policy", ["float", "w4a4"])
def test_pixels_in_the_padding_are_not_seen(policy):
    variables, run = variables_of(policy), model(policy)
    images, mask = padded(BUCKET)
    noise = np.random.default_rng(1).integers(0, 256, images.shape).astype(np.uint8)
    noisy = np.where(mask[..., None], images, noise)
    assert_outputs_equal(run(variables, images, mask), run(variables, noisy, mask))


@pytest.mark.parametrize("policy", ["float", "w4a4"])
def test_a_larger_bucket_changes_nothing(policy):
    # Cells of the image see at most 11 pixels beyond its edge, so both paddings hold all of that:
    # zeros up to the network's border, as in DETR, then masked in every attention.
    variables = variables_of(policy)
    small = model(policy)(variables, *padded(BUCKET))
    large = model(policy)(variables, *padded((40, 36)))
    assert_few_differ(small, large, policy, atol=1e-4)
    sums = [np.asarray(out.memory_valid).sum(1) for out in (small, large)]
    for total in sums:
        np.testing.assert_array_equal(total, [h * w // STRIDE**2 for h, w in SIZES])


@pytest.mark.parametrize("policy", ["float", "w4a4"])
def test_a_batch_is_its_images(policy):
    variables, (images, mask) = variables_of(policy), padded(BUCKET)
    both = model(policy)(variables, images, mask)
    for i in range(2):
        one = model(policy)(variables, images[i : i + 1], mask[i : i + 1])
        mine = both._replace(logits=both.logits[:, i : i + 1], boxes=both.boxes[:, i : i + 1])
        assert_few_differ(mine, one, policy, atol=1e-5)


def test_images_are_normalised_once():
    images, mask = padded(BUCKET, fill=200)
    x = np.asarray(normalize_images(jnp.asarray(images), jnp.asarray(mask), CONFIG))
    expected = (images / 255 - np.array(CONFIG.pixel_mean)) / np.array(CONFIG.pixel_std)
    np.testing.assert_allclose(x[mask], expected[mask], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(x[~mask], 0)
    np.testing.assert_array_equal(normalize_images(x, mask, CONFIG), x)


# --- low bits ---


def test_calibration_sees_the_float_model():
    observer = Detr(CONFIG, stock_policy("w4a4", arithmetic="observe"))
    variables, batch = variables_of("w4a4"), padded(BUCKET)
    out, seen = jax.jit(lambda v: observer.apply(v, *batch, mutable=[OBSERVED]))(variables)
    # The float model's parameters are the quantized one's without the step sizes.
    assert_outputs_equal(out, model()(variables, *batch), exact=False)
    seen = traverse_util.flatten_dict(seen[OBSERVED], sep="/")
    probabilities = np.asarray(out.encoder_attention[0].probabilities)
    sample = np.asarray(seen["encoder/layer_0/self_attention/core/probs"])
    assert sample.shape[0] == CONFIG.heads
    for head in range(CONFIG.heads):
        values = probabilities[:, head].ravel()
        # A head's sample holds that head's values, never another head's.
        assert sample[head].max() == values.max()
        assert sample[head].min() == values.min()
        assert np.isin(sample[head], values).all()
    for site in ("q", "k", "v"):
        sample = np.asarray(seen[f"encoder/layer_0/self_attention/core/{site}"])
        assert sample[0].max() != sample[1].max()
        assert sample[0].min() != sample[1].min()
    assert seen["input_proj/input"].ndim == 1
    assert seen["input_proj/input"].min() >= 0


def test_recomputing_layers_fits_training():
    # Traced only; the numbers are checked on one layer in test_transformer_layers.
    variables, batch = variables_of("w4a4"), padded(BUCKET)
    module = Detr(dataclasses.replace(CONFIG, remat=True), stock_policy("w4a4"))

    def loss(params, key):
        with drawing(row_keys(key, len(batch[0]))):
            out = module.apply({**variables, "params": params}, *batch, train=True, auxiliary=True)
        return jnp.sum(out.logits) + jnp.sum(out.auxiliary_boxes)

    gradients = jax.eval_shape(jax.grad(loss), variables["params"], jax.random.key(0))
    assert jax.tree.map(np.shape, gradients) == jax.tree.map(np.shape, variables["params"])
