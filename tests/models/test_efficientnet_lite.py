"""EfficientNet-Lite against timm's: every stage and gradient; its sizes; bits of its operations.

The fixture is written by ``experiments/record/efficientnet_lite.py``. With ``AQDETR_PARITY=live``
(``make test-parity``) timm's results are computed anew.
"""

import dataclasses
import functools
import importlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import traverse_util

from aqdetr_jax.config_types import ConfigError, from_dataclass, to_dataclass
from aqdetr_jax.interop import names
from aqdetr_jax.interop.backbones import with_our_eps
from aqdetr_jax.interop.tables import TABLES
from aqdetr_jax.models.backbone import build_backbone
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.detector import (
    build_detector,
    level_strides,
    memory_valid,
    record_first_ops,
)
from aqdetr_jax.models.efficientnet_lite import NORM_EPS, VARIANTS, EfficientNetLiteConfig
from aqdetr_jax.models.fold import fold_batch_norms
from aqdetr_jax.models.resnet import BackboneConfig
from aqdetr_jax.quant.policy import stock_policy
from aqdetr_jax.quant.record import recording
from aqdetr_jax.training.experiment import load_experiment
from experiments.parity import cases, lite_cases, store


@functools.cache
def theirs():
    if os.environ.get("AQDETR_PARITY") == "live":
        return importlib.import_module("experiments.parity.lite").compute()
    return store.load(cases.FIXTURES / lite_cases.FIXTURE)


@functools.cache
def converted():
    """Module, variables and image."""
    state = {name: np.asarray(array, np.float32) for name, array in theirs()["state"].items()}
    params, stats = names.translate(state, TABLES["timm_efficientnet_lite"])
    variables = {
        group: traverse_util.unflatten_dict(flat, sep="/")["backbone"]
        for group, flat in (("params", params), ("batch_stats", with_our_eps(stats, NORM_EPS)))
    }
    module = build_backbone(EfficientNetLiteConfig("efficientnet_lite", *lite_cases.SIZES))
    image = jnp.asarray(cases.generator("image").normal(size=lite_cases.IMAGE), jnp.float32)
    return module, variables, image


@functools.cache
def ours():
    """Stages, total and gradients of their parameters."""
    module, variables, image = converted()
    params, stats = variables["params"], variables["batch_stats"]

    @jax.jit
    def run(params):
        stages = module.apply({"params": params, "batch_stats": stats}, image)
        stages = {f"stage_{i + 1}": x for i, x in enumerate(stages)}
        total = sum(
            jnp.sum(x * cases.generator(name).normal(size=x.shape)) for name, x in stages.items()
        )
        return total, stages

    (total, stages), found = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    kernels = {
        f"backbone/{path}": np.asarray(x, np.float64)
        for path, x in traverse_util.flatten_dict(found, sep="/").items()
        if path.endswith("/kernel")
    }
    written = names.untranslate(kernels, {}, TABLES["timm_efficientnet_lite"])
    return stages, total, written


def test_every_stage_is_timms():
    stages, total, _ = ours()
    want = theirs()["output"]
    assert stages.keys() == want.keys()
    assert [x.shape[1:3] for x in want.values()] == [(23, 32), (12, 16), (6, 8), (3, 4), (2, 2)]
    for name, x in want.items():
        scale = np.abs(x).max()
        assert scale > 1
        np.testing.assert_allclose(stages[name], x, rtol=0, atol=1e-5 * scale, err_msg=name)
    assert theirs()["loss"]["sixes"] > 100  # ReLU6 cut something off
    np.testing.assert_allclose(total, theirs()["loss"]["total"], rtol=1e-4)


def test_every_gradient_is_timms():
    """Norm, and product with a fixed random direction, of the gradient of every convolution."""
    _, _, own = ours()
    want = {name: x for name, x in theirs()["gradient"].items() if name in own}
    assert own.keys() == want.keys()
    assert len(own) == 1 + 2 + 9 * 3
    for name, (norm, product) in want.items():
        x = own[name]
        found = np.linalg.norm(x), np.sum(cases.direction(name, x.shape) * x)
        np.testing.assert_allclose(found, (norm, product), rtol=0, atol=1e-4 * norm, err_msg=name)


def test_folded_norms_change_nothing():
    module, variables, image = converted()
    stages = jax.jit(module.apply)(fold_batch_norms(variables), image)
    for mine, want in zip(stages, theirs()["output"].values(), strict=True):
        np.testing.assert_allclose(mine, want, rtol=0, atol=1e-5 * np.abs(want).max())


HEAD = 1280
CLASSIFIER = HEAD * 1000 + 1000

# Parameters, multiply-adds of all convolutions and the classifier at a size, channels: timm's.
OFFICIAL = {
    "efficientnet_lite0": (4_652_008, 385_187_552, 224, (16, 24, 40, 112, 320)),
    "efficientnet_lite1": (5_416_680, 600_185_232, 240, (16, 24, 40, 112, 320)),
    "efficientnet_lite2": (6_092_072, 859_736_272, 260, (16, 24, 48, 120, 352)),
    "efficientnet_lite3": (8_197_096, 1_383_321_872, 280, (24, 32, 48, 136, 384)),
    "efficientnet_lite4": (13_006_568, 2_553_034_336, 300, (24, 32, 56, 160, 448)),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_sizes_of_the_official_ones(name):
    parameters, products, side, channels = OFFICIAL[name]
    config = EfficientNetLiteConfig("efficientnet_lite", *VARIANTS[name])
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    module = build_backbone(config)
    with recording() as rows:
        made, variables = jax.eval_shape(
            lambda key, x: module.init_with_output(key, x), jax.random.key(0), image
        )
    assert config.stage_strides == (2, 4, 8, 16, 32)
    assert config.output_channels == channels[-1]
    assert tuple(x.shape[-1] for x in made) == channels
    assert [x.shape[1] for x in made] == [-(-side // s) for s in config.stage_strides]
    own = sum(x.size for x in jax.tree.leaves(variables["params"]))
    assert own + channels[-1] * HEAD + 2 * HEAD + CLASSIFIER == parameters
    macs = sum(row.macs for row in rows) + made[-1].shape[1] ** 2 * channels[-1] * HEAD
    assert macs + HEAD * 1000 == products


def test_fewer_stages_are_the_first_ones():
    whole = EfficientNetLiteConfig("efficientnet_lite")
    config = dataclasses.replace(whole, stages=4)
    assert config.blocks == whole.blocks[: len(config.blocks)]
    assert config.stage_strides == (2, 4, 8, 16)
    assert (config.output_stride, config.output_channels) == (16, 112)
    with pytest.raises(ValueError, match="stages must be 1 to 5, got 6"):
        dataclasses.replace(whole, stages=6)


def test_levels_of_a_detector():
    config = tiny_models.LITE
    assert level_strides(config) == [16, 32]
    mask = jnp.ones((1, 45, 64), bool)
    images = jax.ShapeDtypeStruct((1, 45, 64, 3), jnp.uint8)
    module = build_detector(config)
    found = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x, mask)[0], images)
    assert found.memory.shape[1] == memory_valid(config, mask).shape[1] == 3 * 4 + 2 * 2


@pytest.mark.parametrize("family", ["detr", "deformable"])
def test_bits_of_its_operations(family):
    config = dataclasses.replace(tiny_models.LITE, family=family)
    config = dataclasses.replace(config, num_auxiliary=0, auxiliary_groups=1)
    rows, shapes = record_first_ops(build_detector(config, stock_policy("w4a3")), (32, 64))
    bits = {
        row.path: tuple(s and s.describe() for s in (row.weight, row.activation, row.other))
        for row in rows
    }
    assert bits["backbone/stem"] == ("s8/channel", "s8", None)
    # The first block has a ReLU6's output for its input, the others sums with a sign.
    assert bits["backbone/layer1_0/depthwise"] == ("s4/channel", "u3", None)
    assert bits["backbone/layer2_0/expand"] == ("s4/channel", "s3", None)
    assert bits["backbone/layer2_0/depthwise"] == ("s4/channel", "u3", None)
    assert bits["backbone/layer2_0/project"] == ("s4/channel", "u3", None)
    assert bits["backbone/layer4_1/residual"] == (None, "s8", "s8")
    projections = [value for path, value in bits.items() if path.startswith("input_proj")]
    assert projections == [("s8/channel", "s8", None)] * (1 if family == "detr" else 2)
    residual = {path.split("/")[1] for path in bits if path.endswith("/residual")}
    # One of a layer's blocks adds its input where it is not the first, or of the same shape.
    assert residual == {"layer4_1", "layer5_1", "layer6_1"}
    kernel = shapes["params"]["backbone"]["layer3_0"]["depthwise"]
    assert kernel["kernel"].shape == (5, 5, 1, 48)
    assert kernel["kernel_step"].shape == (48,)


def test_overrides_of_a_configuration_with_one():
    """The command line knows the keys of the backbone that the file has."""
    lite = load_experiment("bccd:deformable-lite-teacher", ("model.backbone.width=1.1",))
    assert lite.model.backbone == EfficientNetLiteConfig("efficientnet_lite", width=1.1)
    with pytest.raises(ConfigError, match=r"backbone has no key 'depths'; did you mean 'depth'"):
        load_experiment("bccd:deformable-lite-teacher", ("model.backbone.depths=(1,)",))
    with pytest.raises(ConfigError, match=r"backbone has no key 'width'; did you mean 'widths'"):
        load_experiment("bccd:deformable-teacher", ("model.backbone.width=1.1",))


def test_a_configuration_tells_it_from_a_resnet():
    lite = {"backbone": {"kind": "efficientnet_lite", "width": 0.5}}
    found = to_dataclass(DetrConfig, lite)
    assert found.backbone == EfficientNetLiteConfig("efficientnet_lite", width=0.5)
    assert to_dataclass(DetrConfig, from_dataclass(found)) == found
    assert to_dataclass(DetrConfig, {"backbone": {"depths": (1, 1, 1, 1)}}).backbone == (
        BackboneConfig(depths=(1, 1, 1, 1))
    )
    for wrong, message in (
        ({"kind": "efficientnet"}, r"backbone.kind: expected one of 'efficientnet_lite'"),
        ({"kind": "efficientnet_lite", "depths": (1,)}, "backbone has no key 'depths'"),
        ({"width": 2.0}, "backbone has no key 'width'; did you mean 'widths'"),
        ({"kind": "efficientnet_lite", "width": 0.0}, "must be positive, got 0.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            to_dataclass(DetrConfig, {"backbone": wrong})
