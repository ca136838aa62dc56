"""Residual sums on grids of their own, and the codes that a pass leaves for comparisons."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util
from tiny_models import CONFIGS, DETR, batch, variables_of

from aqdetr_jax.models.detector import build_detector, record_ops
from aqdetr_jax.models.quantized import CODES, OBSERVED
from aqdetr_jax.models.resnet import BasicBlock, Bottleneck
from aqdetr_jax.quant import lsq
from aqdetr_jax.quant.calibrate import site_specs
from aqdetr_jax.quant.policy import Policy, Rule, stock_policy
from aqdetr_jax.quant.record import recording
from aqdetr_jax.quant.spec import QuantSpec

pytestmark = pytest.mark.usefixtures("quick_compile")

SUMS = Policy("sums", (Rule(r"residual$", None, 3, None),))
"""Only the sums are quantized, so that a float block gives what they are of."""

BLOCKS = {
    "basic": (BasicBlock, 4, 1),
    "basic with shortcut": (BasicBlock, 6, 2),
    "bottleneck": (Bottleneck, 16, 1),
    "bottleneck with shortcut": (Bottleneck, 16, 2),
}


def block_of(kind, policy, dtype=jnp.float32):
    block, channels, stride = BLOCKS[kind]
    x = np.random.default_rng(1).normal(size=(2, 4, 6, channels)).astype(np.float32).clip(0)
    return block(4, stride, policy=policy, dtype=dtype), jnp.asarray(x, dtype)


def run(block, variables, x):
    """Output and both operands, as calibration sees them: unquantized, all of them."""
    observer = block.clone(policy=dataclasses.replace(block.policy, arithmetic="observe"))
    out, seen = observer.apply(variables, x, mutable=[OBSERVED])
    return out, {name: np.asarray(v) for name, v in seen[OBSERVED].items()}


@pytest.mark.parametrize("kind", BLOCKS)
def test_both_operands_are_on_their_grids_and_the_sum_is_not(kind):
    block, x = block_of(kind, SUMS)
    variables = tiny.random_variables(block, x)
    steps = {"branch_step": np.float32(0.5), "identity_step": np.float32(0.25)}
    params = {**variables["params"], **steps}
    variables = {**variables, "params": params}
    plain, seen = run(block, variables, x)
    without = {k: v for k, v in params.items() if not k.endswith("_step")}
    floats = block.clone(policy=Policy()).apply({**variables, "params": without}, x)
    np.testing.assert_array_equal(plain, floats)  # calibration sees the float model

    found, captured = jax.jit(lambda v: block.apply(v, x, mutable=[CODES]))(variables)
    operands = {name: seen[name].reshape(found.shape) for name in ("branch", "identity")}
    lowest = -4 if "shortcut" in kind else 0  # a block's input is what a ReLU left
    codes = {
        "branch": np.rint(np.clip(operands["branch"] / 0.5, -4, 3)),
        "identity": np.rint(np.clip(operands["identity"] / 0.25, lowest, lowest + 7)),
    }
    for name, want in codes.items():
        np.testing.assert_array_equal(captured[CODES][name], want)
    total = codes["branch"] * 0.5 + codes["identity"] * 0.25
    np.testing.assert_array_equal(found, np.maximum(total, 0))
    assert np.std(found) > 0.1
    assert len(np.unique(total)) > 8  # more than a grid of three bits: the sum has none


@pytest.mark.parametrize("kind", ["basic", "basic with shortcut"])
def test_gradients_are_those_of_two_quantizers_and_a_sum(kind):
    block, x = block_of(kind, SUMS)
    variables = tiny.random_variables(block, x)
    params = {
        **variables["params"],
        "branch_step": jnp.float32(0.15),
        "identity_step": jnp.float32(0.2),
    }
    out, seen = run(block, {**variables, "params": params}, x)
    cotangent = np.random.default_rng(2).normal(size=out.shape).astype(np.float32)
    lower, upper = (-4.0, 3.0) if "shortcut" in kind else (0.0, 7.0)

    def theirs(branch_step, identity_step):
        branch, identity = (seen[n].reshape(cotangent.shape) for n in ("branch", "identity"))
        g = [1 / np.sqrt(cotangent[0].size * top) for top in (3.0, upper)]
        total = lsq.fake_quantize(jnp.asarray(branch), branch_step, -4.0, 3.0, g[0])
        total += lsq.fake_quantize(jnp.asarray(identity), identity_step, lower, upper, g[1])
        return jnp.sum(jax.nn.relu(total) * cotangent)

    def mine(params):
        return jnp.sum(block.apply({**variables, "params": params}, x) * cotangent)

    found = jax.jit(jax.grad(mine))(params)
    want = jax.grad(theirs, (0, 1))(params["branch_step"], params["identity_step"])
    for name, value in zip(("branch_step", "identity_step"), want, strict=True):
        assert abs(value) > 1e-3
        np.testing.assert_allclose(found[name], value, rtol=1e-4)
    assert np.any(np.asarray(found["conv1"]["kernel"]))


def test_in_bfloat16_the_sum_is_rounded_once():
    block, x = block_of("basic with shortcut", stock_policy("w4a4"), jnp.bfloat16)
    variables = tiny.random_variables(block, x)
    found, captured = jax.jit(lambda v: block.apply(v, x, mutable=[CODES]))(variables)
    assert found.dtype == jnp.bfloat16
    total = sum(
        np.float32(captured[CODES][name]) * variables["params"][f"{name}_step"]
        for name in ("branch", "identity")
    )
    np.testing.assert_array_equal(found, jnp.asarray(total.clip(0), jnp.bfloat16))
    assert np.std(np.float32(found)) > 0.1


@pytest.mark.parametrize(
    ("residual", "options", "bits"), [(8, {}, 8), (4, {}, 4), (8, {"grid": "zero_point"}, 8)]
)
def test_rows_and_sites_of_the_sums(residual, options, bits):
    block, x = block_of("basic with shortcut", stock_policy("w4a4", residual=residual, **options))
    with recording() as rows:
        shapes = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    row = rows[-1]
    assert (row.path, row.kind, row.macs) == ("/residual", "add", 0)
    assert row.note == f"residual sums at {bits} bits"
    assert row.activation == row.other == QuantSpec(bits, signed=True)
    assert site_specs(rows)["/branch"] == site_specs(rows)["/identity"] == row.activation
    assert shapes["branch_step"].shape == shapes["identity_step"].shape == ()
    assert "branch_zero" not in shapes  # symmetric with zero points elsewhere too


@pytest.mark.parametrize("policy", [stock_policy("w4a4", residual=0), Policy()])
def test_float_sums_have_no_sites(policy):
    block, x = block_of("basic", policy)
    with recording() as rows:
        shapes = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    assert not {"branch_step", "identity_step"} & set(shapes)
    assert not {"/branch", "/identity"} & set(site_specs(rows))
    assert "float" in rows[-1].note


# --- the codes of whole models ------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_site_leaves_its_codes(name):
    options = {"grid": "offset", "renormalize": True}
    variables, given = variables_of(name, "w4a4", **options), batch()
    module = build_detector(CONFIGS[name], stock_policy("w4a4", **options))
    captured = jax.eval_shape(lambda v: module.apply(v, *given, mutable=[CODES])[1], variables)
    codes = traverse_util.flatten_dict(captured[CODES], sep="/")
    sites = site_specs(record_ops(module, variables, given[0].shape[1:3]))
    assert codes.keys() == sites.keys()
    assert {value.dtype for value in codes.values()} == {jnp.dtype(jnp.int16)}
    assert CODES not in variables  # no model has them


@pytest.mark.parametrize("name", ["detr", "plain"])
def test_captured_codes_are_those_that_are_multiplied(name):
    """On their grids, and the output is bit by bit that of a pass that nobody watches."""
    variables, given = variables_of(name, "w4a4"), batch()
    module = build_detector(CONFIGS[name], stock_policy("w4a4"))
    alone = jax.jit(module.apply)(variables, *given)
    watched, seen = jax.jit(lambda v: module.apply(v, *given, mutable=[CODES]))(variables)
    np.testing.assert_allclose(watched.logits, alone.logits, atol=1e-5)
    np.testing.assert_allclose(watched.boxes, alone.boxes, atol=1e-5)
    codes = traverse_util.flatten_dict(seen[CODES], sep="/")
    for path, spec in site_specs(record_ops(module, variables, given[0].shape[1:3])).items():
        values = np.asarray(codes[path])
        assert spec.lower <= values.min() <= values.max() <= spec.upper, path
        # The first decoder layer's values are zero: its input is.
        assert values.min() < values.max() or "decoder/layer_0/self_attention" in path, path
    # The attention's mixed values, made again of codes and steps.
    steps = traverse_util.flatten_dict(variables["params"], sep="/")
    site = "encoder/layer_0/self_attention/core"
    names = ("probs", "v" if name == "detr" else "samples")
    probs, v = (codes[f"{site}/{n}"] * steps[f"{site}/{n}_step"] for n in names)
    if name == "detr":
        mixed = np.einsum("bhqk,bhkd->bqhd", probs, v)
    else:
        mixed = np.einsum("bhqp,bhqpd->bqhd", probs, v.reshape(*probs.shape, -1))
    found = watched.encoder_attention[0].output
    np.testing.assert_allclose(mixed.reshape(found.shape), found, rtol=1e-5, atol=1e-5)


def test_both_arithmetics_have_the_same_codes():
    variables, given = variables_of("detr", "w4a4"), batch()
    codes = []
    for arithmetic in ("fake", "integer"):
        module = build_detector(DETR, stock_policy("w4a4", arithmetic=arithmetic))
        codes.append(jax.jit(lambda v, m=module: m.apply(v, *given, mutable=[CODES])[1])(variables))
    different = [np.sum(a != b) for a, b in zip(*map(jax.tree.leaves, codes), strict=True)]
    assert sum(different) == 0
