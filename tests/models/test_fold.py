"""Folded batch norms: what torch computed unfolded, and integer sums of low-bit convolutions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from foreign import fixture, parity_cases

from aqdetr_jax.interop import names
from aqdetr_jax.models.fold import ONE, convolution_of, fold_batch_norms, sum_affine
from aqdetr_jax.models.heads import normalize_images
from aqdetr_jax.models.layers import BatchNorm, norm_affine
from aqdetr_jax.models.quantized import QConv
from aqdetr_jax.models.resnet import ResNet
from aqdetr_jax.quant import lsq
from aqdetr_jax.quant.contractions import Conv
from aqdetr_jax.quant.policy import stock_policy

pytestmark = pytest.mark.usefixtures("quick_compile")


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


@pytest.mark.parametrize("name", ["detr_bottleneck", "detr_basic", "detr_dc5"])
def test_a_folded_backbone_is_what_torch_computes_unfolded(name):
    """Random statistics and factors in every norm, bottleneck and basic blocks, dilation."""
    config, recorded = parity_cases.TINY[name], fixture(name)
    params, stats = names.translate(recorded["state"], parity_cases.table_of(config))
    variables = {
        group: traverse_util.unflatten_dict(part, sep="/")["backbone"]
        for group, part in (("params", params), ("batch_stats", stats))
    }
    folded = fold_batch_norms(variables)
    before, after = flat(variables["params"]), flat(folded["params"])
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
    kernels = [path for path in before if path.endswith("/kernel")]
    norms = [path.removesuffix("/mean") for path in flat(folded["batch_stats"]) if "mean" in path]
    assert len(norms) == len(kernels) > 12  # a norm after each convolution, each folded
    for kernel in kernels:
        factor = np.asarray(after[kernel]) / before[kernel]
        assert np.ptp(factor, axis=(0, 1, 2)).max() < 1e-5  # of the output channel alone
        assert np.abs(factor - 1).max() > 0.1
    for norm in norms:
        one = folded["params"], folded["batch_stats"]
        for part in norm.split("/"):
            one = one[0][part], one[1][part]
        assert one[0].keys() | one[1].keys() == {"scale", "bias", "mean", "var"}
        factor, bias = norm_affine(one[0]["scale"], one[0]["bias"], one[1]["mean"], one[1]["var"])
        np.testing.assert_array_equal(factor, 1)
        np.testing.assert_array_equal(bias, one[0]["bias"])
    given = recorded["input"]
    images = normalize_images(given["images"], given["mask"], config)
    found = jax.jit(ResNet(config.backbone).apply)(folded, images)
    for stage, value in enumerate(found, 1):
        want = recorded["output"][f"backbone_{stage}"]
        np.testing.assert_allclose(value, want, rtol=0, atol=1e-5)


def test_one_channel_by_hand():
    """2 x, normed to 3 (2 x - 1) / sqrt(4) + 5 = 3 x + 3.5."""
    variables = {
        "params": {
            "stem": {"kernel": np.full((1, 1, 1, 1), 2, np.float32)},
            "stem_norm": {"scale": np.float32([3]), "bias": np.float32([5])},
        },
        "batch_stats": {"stem_norm": {"mean": np.float32([1]), "var": np.float32([4 - 1e-5])}},
    }
    folded = fold_batch_norms(variables)
    np.testing.assert_allclose(folded["params"]["stem"]["kernel"].ravel(), [3], rtol=1e-6)
    np.testing.assert_allclose(folded["params"]["stem_norm"]["bias"], [3.5], rtol=1e-6)
    np.testing.assert_array_equal(folded["batch_stats"]["stem_norm"]["var"], [ONE])
    np.testing.assert_array_equal(variables["params"]["stem"]["kernel"].ravel(), [2])


def test_integer_sums_of_a_low_bit_convolution():
    """Factors of both signs: the sums times a scale, plus a bias, are what the layers compute."""
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(size=(2, 6, 5, 3)), 0).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 3, 4)).astype(np.float32)
    steps = rng.uniform(0.2, 0.4, 4).astype(np.float32)
    norm = {"scale": np.float32([1.5, -0.7, 0.3, -2]), "bias": rng.normal(size=4).astype("f4")}
    stats = {"mean": rng.normal(size=4).astype("f4"), "var": np.float32([0.5, 1, 2, 3])}
    layer = QConv(4, (3, 3), stock_policy("w4a4"))
    params = {"kernel": kernel, "kernel_step": steps, "input_step": np.float32(0.1)}
    y, units = layer.apply({"params": params}, x, method="with_steps")
    want = BatchNorm().apply({"params": norm, "batch_stats": stats}, y, units)
    a = lsq.codes(jnp.asarray(x), jnp.float32(0.1), 0, 15).astype(int)
    b = lsq.codes(jnp.asarray(kernel), jnp.asarray(steps), -8, 7).astype(int)
    sums = Conv(padding=((1, 1), (1, 1))).integers(a, b)
    scale, bias = sum_affine(params["input_step"], steps, norm, stats)
    assert (scale < 0).sum() == 2
    np.testing.assert_allclose(scale * sums + bias, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(bias / scale, np.rint(bias / scale), rtol=1e-6)
    variables = {
        "params": {"conv1": params, "norm1": norm},
        "batch_stats": {"norm1": stats},
    }
    with pytest.raises(ValueError, match=r"conv1/kernel is quantized: .* \(sum_affine\)"):
        fold_batch_norms(variables)


def test_names():
    assert convolution_of("backbone/layer1_0/norm2") == "backbone/layer1_0/conv2"
    assert convolution_of("layer1_0/shortcut_norm") == "layer1_0/shortcut"
    assert convolution_of("stem_norm") == "stem"
    with pytest.raises(ValueError, match="encoder/norm is no batch norm of a backbone"):
        convolution_of("encoder/norm")
