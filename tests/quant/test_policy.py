"""The rule table: what a path gets, and what is said about an unknown name."""

import dataclasses
from typing import get_args

import pytest

from aqdetr_jax.quant.config import QuantConfig, saved_quant
from aqdetr_jax.quant.policy import Grid, Policy, Rule, stock_policy
from aqdetr_jax.quant.spec import QuantSpec


def test_first_match_wins():
    policy = Policy(
        rules=(Rule("q_proj", 8, None, None, "one"), Rule("encoder", 2, 3, 4), Rule(".*", 5, 5, 5))
    )
    assert policy.rule_for("encoder/layer_0/self_attention/q_proj").note == "one"
    assert policy.weight_spec("encoder/layer_0/self_attention/q_proj").bits == 8
    assert policy.activation_spec("encoder/layer_0/q_proj", unsigned=False) is None
    assert policy.weight_spec("encoder/layer_0/linear1").bits == 2
    assert policy.activation_spec("encoder/layer_0/linear1", unsigned=True).bits == 3
    assert policy.attention_spec("encoder/layer_0/core", unsigned=True).bits == 4
    assert policy.weight_spec("decoder/layer_0/linear1").bits == 5


def test_no_rule_means_float():
    policy = Policy(rules=(Rule("encoder", 4, 4, 4),))
    assert policy.rule_for("decoder/x") is None
    assert policy.weight_spec("decoder/x") is None
    assert policy.activation_spec("decoder/x", unsigned=True) is None
    assert policy.attention_spec("decoder/x", unsigned=True) is None
    assert stock_policy("float") == Policy()


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("w8a8", (8, 8, 8)),
        ("w4a4", (4, 4, 4)),
        ("w3a3", (3, 3, 3)),
        ("w2a2", (2, 2, 2)),
        ("w4a4-attn8", (4, 4, 8)),
        ("w2a2-attn8", (2, 2, 8)),
        ("w2a4-attn3", (2, 4, 3)),
    ],
)
def test_stock_names(name, bits):
    policy = stock_policy(name)
    assert policy.name == name
    path = "decoder/layer_3/cross_attention/core"
    assert policy.weight_spec(path) == QuantSpec(bits[0], True, "channel")
    assert policy.activation_spec(path, unsigned=False) == QuantSpec(bits[1], True, "tensor")
    assert policy.activation_spec(path, unsigned=True) == QuantSpec(bits[1], False, "tensor")
    assert policy.attention_spec(path, unsigned=False) == QuantSpec(bits[2], True, "head")
    assert policy.attention_spec(path, unsigned=True) == QuantSpec(bits[2], False, "head")


@pytest.mark.parametrize("path", ["class_head", "box_head/layer_0", "box_head/layer_2"])
def test_heads_stay_float(path):
    policy = stock_policy("w2a2")
    assert policy.weight_spec(path) is None
    assert policy.activation_spec(path, unsigned=True) is None
    assert "float" in policy.rule_for(path).note


@pytest.mark.parametrize("path", ["backbone/stem", "input_proj"])
def test_first_layers_have_eight_bits(path):
    policy = stock_policy("w2a2")
    assert policy.weight_spec(path).bits == 8
    assert policy.activation_spec(path, unsigned=False).bits == 8


def test_residual_sums_have_a_row_of_their_own():
    path = "backbone/layer1_0/residual"
    policy = stock_policy("w2a2", grid="zero_point")
    assert policy.residual_spec(path, unsigned=False) == QuantSpec(8, signed=True)
    assert policy.residual_spec(path, unsigned=True) == QuantSpec(8, signed=False)
    assert stock_policy("w2a2", residual=3).residual_spec(path, unsigned=True).bits == 3
    plain = stock_policy("w2a2", residual=0)
    assert plain.residual_spec(path, unsigned=True) is None
    assert plain.rule_for(path).note == "residual sums stay float"
    assert plain.weight_spec("backbone/layer1_0/conv1").bits == 2
    assert stock_policy("float").residual_spec(path, unsigned=True) is None
    # Rules of the user come first.
    config = QuantConfig("w4a4", (Rule("layer1_0/residual", None, None, None),), residual=6)
    assert config.build().residual_spec(path, unsigned=True) is None
    assert config.build().residual_spec("backbone/layer1_1/residual", unsigned=True).bits == 6


@pytest.mark.parametrize("bits", [1, 9, -1])
@pytest.mark.parametrize("name", ["w4a4", "float"])
def test_residual_bits_that_cannot_be(name, bits):
    with pytest.raises(ValueError, match=rf"residual must be 0 \(float sums\) or .* got {bits}"):
        QuantConfig(name, residual=bits)


def test_options():
    policy = stock_policy("w4a4", attention_granularity="tensor", renormalize=True)
    assert policy.attention_spec("core", unsigned=False).granularity == "tensor"
    assert policy.renormalize
    policy = stock_policy("w4a4", grid="zero_point")
    offset = QuantSpec(4, signed=False, zero_point=True)
    assert policy.activation_spec("x", unsigned=False) == offset
    # Each head is its own product: its own step and zero point.
    assert policy.attention_spec("x", unsigned=False) == QuantSpec(
        4, signed=False, granularity="head", zero_point=True
    )
    # Where values cannot be negative an offset has nothing to add; weights stay symmetric.
    assert not policy.activation_spec("x", unsigned=True).zero_point
    assert not policy.weight_spec("x").zero_point

    policy = stock_policy("w4a4", grid="offset")
    assert policy.activation_spec("x", unsigned=False) == QuantSpec(4, offset=True)
    assert policy.attention_spec("x", unsigned=False) == QuantSpec(
        4, granularity="head", offset=True
    )
    for spec in (
        policy.activation_spec("x", unsigned=True),
        policy.weight_spec("x"),
        policy.residual_spec("backbone/layer1_0/residual", unsigned=False),
    ):
        assert not spec.offset
    assert [stock_policy("w4a4", grid=grid).center for grid in get_args(Grid)] == [False] * 3 + [
        True
    ]


def test_models_saved_with_two_switches_have_their_grid():
    plain = {"policy": "w4a4", "zero_point": False, "center": False, "equalize": 0.5}
    for switches, grid in (
        ({}, "symmetric"),
        ({"center": True}, "centred"),
        ({"zero_point": True}, "zero_point"),
    ):
        read = QuantConfig(**saved_quant(plain | switches))
        assert read == QuantConfig("w4a4", grid=grid, equalize=0.5)
    old = {key: value for key, value in plain.items() if key != "center"}
    assert QuantConfig(**saved_quant(old)) == QuantConfig("w4a4", equalize=0.5)
    new = dataclasses.asdict(QuantConfig("w4a4", grid="offset"))
    assert saved_quant(new) == new
    with pytest.raises(ValueError, match=r"train it again with quant\.grid='centred'"):
        saved_quant(plain | {"zero_point": True, "center": True})


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("w4a44", "w4a4"),
        ("flaot", "float"),
        ("w4a4-att8", "w4a4-attn8"),
        ("W8A8", "w8a8"),
        ("w1a1", ""),
        ("", ""),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(name, near):
    pattern = f"unknown quantization policy {name!r}; did you mean '{near}"
    with pytest.raises(ValueError, match=pattern):
        stock_policy(name)
