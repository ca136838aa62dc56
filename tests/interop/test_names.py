"""Name tables, both ways: against other libraries' names written out by rules of their own.

``original_names.json.gz`` holds the names and shapes of the original repositories' full-size state
dicts, from their own code (``experiments/record/original_names.py``).
"""

from __future__ import annotations

import functools
import gzip
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from aqdetr_jax.interop import names
from aqdetr_jax.interop.names import Row
from aqdetr_jax.interop.tables import TABLES, huggingface
from aqdetr_jax.models.detector import build_detector
from experiments.parity import cases as parity_cases
from experiments.parity import store as parity_store

ORIGINAL = json.loads(
    gzip.decompress((parity_cases.FIXTURES / "original_names.json.gz").read_bytes())
)
NUMEL = {
    "detr_r50": 41_631_008,
    "detr_r50_dc5": 41_631_008,
    "detr_r101": 60_675_360,
    "deformable_full": 40_175_905,
    "deformable_full_single_scale": 34_172_833,
    "deformable_full_refine": 40_955_900,
    "deformable_full_two_stage": 41_287_769,
}
"""Of the published models' state dicts, copies of heads counted once: closed form."""

tiny = pytest.mark.parametrize("name", parity_cases.TINY)


@functools.cache
def state(name):
    """transformers' state dict of a tiny model, all of it random."""
    return parity_store.load(parity_cases.FIXTURES / f"{name}.npz")["state"]


def original_table(config):
    if config.family == "detr":
        return TABLES["detr"]
    return TABLES["deformable_detr" + ("" if config.deformable.box_refine else "_shared")]


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        np.testing.assert_array_equal(found[key], value, err_msg=key)


# --- rules of their own: transformers' names in other namings ---------------------------------


def renamed(arrays, rules):
    """Every name after all rules, each a pattern and what takes its place."""
    result = {}
    for name, array in arrays.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        assert name not in result
        result[name] = array
    return result


def torch_resnet_rules(before, after):
    """A ResNet of transformers' in torchvision's names."""
    stages = before + r"encoder\.stages\.(\d+)\.layers\.(\d+)\."

    def stage(match):
        return f"{after}layer{int(match[1]) + 1}.{match[2]}."

    def one_more(match):
        return f"{match[1]}{match[2]}{int(match[3]) + 1}."

    return [
        (before + r"embedder\.embedder\.convolution\.", after + "conv1."),
        (before + r"embedder\.embedder\.normalization\.", after + "bn1."),
        (stages, stage),
        (r"()shortcut\.convolution\.", "downsample.0."),
        (r"()shortcut\.normalization\.", "downsample.1."),
        (r"(layer\d\.\d+\.)layer\.(\d+)\.convolution\.", r"\1conv:\2."),
        (r"(layer\d\.\d+\.)layer\.(\d+)\.normalization\.", r"\1bn:\2."),
        (r"(.*)(conv|bn):(\d+)\.", one_more),
    ]


def packed(arrays):
    """q, k and v of an attention in one array, as torch keeps them."""
    result = {}
    for name, array in arrays.items():
        if "q_proj" in name:
            parts = [arrays[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            result[re.sub(r"q_proj\.(\w+)", r"in_proj_\1", name)] = np.concatenate(parts)
        elif not re.search(r"\.[kv]_proj\.", name):
            result[name] = array
    return result


def in_original_names(name):
    rules = [
        *torch_resnet_rules(r"model\.backbone\.model\.", "backbone.0.body."),
        (r"o_proj\.", "out_proj."),
        (r"mlp\.fc(\d)\.", r"linear\1."),
        (r"^model\.(encoder|decoder)\.", r"transformer.\1."),
        (r"query_position_embeddings\.", "query_embed."),
    ]
    if parity_cases.TINY[name].family == "detr":
        rules += [
            (r"input_projection\.", "input_proj."),
            (r"class_labels_classifier\.", "class_embed."),
            (r"bbox_predictor\.", "bbox_embed."),
            (r"decoder\.layernorm\.", "decoder.norm."),
            (r"self_attn_layer_norm\.", "norm1."),
            (r"encoder_attn_layer_norm\.", "norm2."),
            (r"encoder_attn\.", "multihead_attn."),
        ]
    else:
        rules += [
            # In the decoder the cross-attention's norm is the first, though it comes second.
            (r"decoder(.*)encoder_attn_layer_norm\.", r"decoder\1norm1."),
            (r"decoder(.*)self_attn_layer_norm\.", r"decoder\1norm2."),
            (r"encoder(.*)self_attn_layer_norm\.", r"encoder\1norm1."),
            (r"encoder_attn\.", "cross_attn."),
            (r"^model\.(level_embed|reference_points|enc_output|pos_trans)", r"transformer.\1"),
        ]
    rules += [
        (r"encoder(.*)final_layer_norm\.", r"encoder\1norm2."),
        (r"decoder(.*)final_layer_norm\.", r"decoder\1norm3."),
        (r"^model\.", ""),
    ]
    return renamed(packed(state(name)), rules)


def in_version_4_names(name):
    rules = [
        (r"model\.backbone\.", "model.backbone.conv_encoder."),
        (r"\.o_proj\.", ".out_proj."),
        (r"mlp\.fc", "fc"),
    ]
    return renamed(state(name), rules)


@tiny
def test_original_names_give_the_same_parameters(name):
    config = parity_cases.TINY[name]
    found = names.translate(in_original_names(name), original_table(config))
    wanted = names.translate(state(name), parity_cases.table_of(config))
    assert_same(found[0], wanted[0])
    assert_same(found[1], wanted[1])


@pytest.mark.parametrize("name", ["detr_basic", "detr_bottleneck", "deformable_two_stage"])
def test_spellings_of_transformers_give_the_same_parameters(name):
    rows = parity_cases.table_of(parity_cases.TINY[name])
    wanted = names.translate(state(name), rows)
    old = in_version_4_names(name)
    prefix = "model.backbone.conv_encoder.model."
    timm = renamed(old, torch_resnet_rules(re.escape(prefix), prefix))
    assert prefix + "layer1.0.conv1.weight" in timm
    for spelling in (old, timm):
        assert not spelling.keys() <= state(name).keys()
        found = names.translate(spelling, rows)
        assert_same(found[0], wanted[0])
        assert_same(found[1], wanted[1])
    # The old names are those that are written; timm's backbone on demand.
    assert names.untranslate(*wanted, rows).keys() <= old.keys()
    chosen = names.untranslate(*wanted, (*huggingface.TIMM_BACKBONE, *rows))
    assert chosen.keys() <= timm.keys()
    assert prefix + "layer1.0.conv1.weight" in chosen


@pytest.mark.parametrize("key", ["torchvision_resnet", "timm_resnet"])
@pytest.mark.parametrize("name", ["detr_basic", "detr_bottleneck"])
def test_resnet(name, key):
    rules = torch_resnet_rules(r"^model\.backbone\.model\.", "")
    backbone = {k: v for k, v in state(name).items() if "backbone" in k}
    given = renamed(backbone, rules)
    extra = {
        "fc.weight": np.zeros((10, 3), np.float32),
        "fc.bias": np.zeros(10, np.float32),
        "layer1.0.bn1.num_batches_tracked": np.array(7),
    }
    found = names.translate({**given, **extra}, TABLES[key])
    wanted = names.translate(backbone, TABLES["huggingface_detr"])
    assert_same(found[0], wanted[0])
    assert_same(found[1], wanted[1])
    assert_same(names.untranslate(*found, TABLES[key]), given)


# --- the way back -----------------------------------------------------------------------------


@tiny
@pytest.mark.parametrize("naming", ["transformers", "original"])
def test_round_trip_is_bit_equal(name, naming):
    config = parity_cases.TINY[name]
    if naming == "original":
        given, rows = in_original_names(name), original_table(config)
    else:
        given, rows = state(name), parity_cases.table_of(config)
    ours = names.translate(given, rows)
    assert_same(names.untranslate(*ours, rows, given), given)
    once = names.untranslate(*ours, rows)
    again = names.translate(once, rows)
    assert_same(again[0], ours[0])
    assert_same(again[1], ours[1])
    parts = 3 * sum("in_proj" in key for key in once) - sum("in_proj" in key for key in once)
    assert len(once) + parts == len(ours[0]) + len(ours[1])


@functools.cache
def full_shapes(name):
    """(parameters, statistics) of a full-size model: path -> shape; nothing is allocated."""
    images, mask = jnp.zeros((1, 64, 64, 3), jnp.uint8), jnp.ones((1, 64, 64), bool)
    module = build_detector(parity_cases.FULL[name])
    # Two stages choose 300 of the tokens; that many there are in a larger image.
    if parity_cases.FULL[name].deformable.two_stage:
        images, mask = jnp.zeros((1, 192, 192, 3), jnp.uint8), jnp.ones((1, 192, 192), bool)
    tree = jax.eval_shape(module.init, jax.random.key(0), images, mask)
    return tuple(
        {k: v.shape for k, v in traverse_util.flatten_dict(tree[group], sep="/").items()}
        for group in ("params", "batch_stats")
    )


def filled(shapes, make):
    return tuple({path: make(path, shape) for path, shape in part.items()} for part in shapes)


@pytest.mark.parametrize("name", NUMEL)
def test_full_size_names_and_shapes_are_the_originals(name):
    rows = original_table(parity_cases.FULL[name])
    ours = filled(full_shapes(name), lambda _, shape: np.broadcast_to(np.int8(0), shape))
    written = names.untranslate(*ours, rows, ORIGINAL[name])
    assert {k: list(v.shape) for k, v in written.items()} == ORIGINAL[name]
    once = names.untranslate(*ours, rows)
    assert once.keys() <= ORIGINAL[name].keys()
    assert sum(v.size for v in once.values()) == NUMEL[name]


@pytest.mark.parametrize("name", ["detr_r101", "deformable_full", "deformable_full_two_stage"])
@pytest.mark.parametrize("naming", ["transformers", "original"])
def test_round_trip_of_full_size_names(name, naming):
    """Small random arrays under all names of a full-size model, no two axes alike."""

    def make(path, shape):
        size = [min(n, 2 + axis) for axis, n in enumerate(shape)]
        return parity_cases.generator(path).normal(size=size).astype(np.float32)

    config = parity_cases.FULL[name]
    rows = original_table(config) if naming == "original" else parity_cases.table_of(config)
    ours = filled(full_shapes(name), make)
    theirs = names.untranslate(*ours, rows)
    again = names.translate(theirs, rows)
    assert_same(again[0], ours[0])
    assert_same(again[1], ours[1])
    assert_same(names.untranslate(*again, rows, reversed(theirs)), theirs)


# --- the mechanism ----------------------------------------------------------------------------

ROWS = (
    Row("a.{n}.weight", "a_{n+1}/kernel", "dense"),
    Row("b.{n}.weight", "a_{n+1}/kernel", "dense"),
    Row("in_proj", ("q", "k", "v"), "dense"),
    Row("head.{n}", "head"),
    Row("count", ""),
)


def test_packed_parts_are_in_order_and_in_our_layout():
    array = np.arange(12).reshape(6, 2)
    params, stats = names.translate({"in_proj": array}, ROWS)
    assert not stats
    np.testing.assert_array_equal(params["q"], [[0, 2], [1, 3]])
    np.testing.assert_array_equal(params["k"], [[4, 6], [5, 7]])
    np.testing.assert_array_equal(params["v"], [[8, 10], [9, 11]])
    assert_same(names.untranslate(params, {}, ROWS), {"in_proj": array})


def test_numbers_of_names_and_paths():
    assert names.find("a.9.weight", ROWS) == (("a_10/kernel",), "dense")
    assert names.name_of("a_10/kernel", ROWS) == "a.9.weight"
    assert names.name_of("head", ROWS) == "head.0"
    assert names.find("count", ROWS) == ((), "same")
    for name in ("a.09.weight", "a.-1.weight", "aX9.weight", "a.9.weights", "xa.9.weight"):
        with pytest.raises(ValueError, match=re.escape(repr(name))):
            names.find(name, ROWS)
    with pytest.raises(ValueError, match="our a_0/kernel: leave out"):
        names.name_of("a_0/kernel", ROWS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"c.0.weight": np.zeros(2)}, "no parameter of ours is known for 'c.0.weight'"),
        ({"in_proj": np.zeros((4, 2))}, r"in_proj of shape \(4, 2\) does not split into 3"),
        ({"in_proj": np.zeros(())}, r"in_proj of shape \(\) does not split into 3"),
        (
            {"a.0.weight": np.zeros((1, 1)), "b.0.weight": np.ones((1, 1))},
            "b.0.weight and a.0.weight are both a_1/kernel, with unlike values",
        ),
    ],
)
def test_what_cannot_be_read_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        names.translate(given, ROWS)


def test_what_cannot_be_written_is_named():
    params = {"q": np.zeros((1, 2)), "k": np.zeros((1, 2)), "head": np.zeros(1)}
    with pytest.raises(ValueError, match="in_proj cannot be written: there is no parameter v"):
        names.untranslate(params, {}, ROWS)
    with pytest.raises(ValueError, match="none of the names to write is that of k"):
        names.untranslate(params, {}, ROWS, ["head.0"])
    with pytest.raises(ValueError, match="the table has no name for our auxiliary_queries"):
        names.untranslate({"auxiliary_queries": np.zeros(1)}, {}, ROWS)


def test_names_to_write_may_hold_copies_and_what_is_dropped():
    head = np.array([math.pi])
    state = names.untranslate({"head": head}, {}, ROWS, ["head.0", "count", "head.5"])
    assert_same(state, {"head.0": head, "head.5": head})
