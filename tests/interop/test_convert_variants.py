"""Every official variant is told from names and shapes: those of our models of the same size."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from aqdetr_jax.checkpoint.model_folder import load_model
from aqdetr_jax.interop import names, recognise, variant
from aqdetr_jax.interop.convert import convert, default_name, model_config
from aqdetr_jax.interop.tables import TABLES
from aqdetr_jax.models.backbone import build_backbone
from aqdetr_jax.models.detector import build_detector, example_input
from aqdetr_jax.models.efficientnet_lite import EfficientNetLiteConfig
from aqdetr_jax.models.resnet import BackboneConfig, ResNet, resnet_config
from aqdetr_jax.training.experiment import load_experiment

pytestmark = pytest.mark.usefixtures("quick_compile")

OFFICIAL = {
    # configuration: (name of the converted model, what shapes cannot show)
    "coco:r50": ("detr_resnet50", {}),
    "coco:r50-dc5": ("detr_resnet50_dc5", {"dilation": True}),
    "coco:r101": ("detr_resnet101", {}),
    "coco_deformable:r50": ("deformable_resnet50", {}),
    "coco_deformable:r50-single": ("deformable_resnet50_single_scale", {}),
    "coco_deformable:r50-dc5": ("deformable_resnet50_dc5_single_scale", {"dilation": True}),
    "coco_deformable:r50-refine": ("deformable_resnet50_refine", {}),
    "coco_deformable:r50-two-stage": ("deformable_resnet50_two_stage", {}),
}
TABLES_OF = {
    "detr": {"huggingface_detr": "", "detr": ""},
    "deformable": {
        "huggingface_deformable": "model.decoder.",
        "deformable_detr": "transformer.decoder.",
    },
}
"""Tables of each family, with the prefix under which heads are listed again."""


def flat_shapes(variables):
    """{path: shape} of the parameters and of the running statistics."""
    return tuple(
        {k: v.shape for k, v in traverse_util.flatten_dict(variables[group], sep="/").items()}
        for group in ("params", "batch_stats")
    )


def empty_state(params, stats, table):
    """Arrays without elements, of as many axes as they should have, under the names of a table."""
    ours = {**params, **{names.STATISTICS + path: shape for path, shape in stats.items()}}
    return {
        names.name_of(path, TABLES[table]): np.empty((0,) * len(shape), np.float32)
        for path, shape in ours.items()
    }


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_variants(name):
    wanted, hidden = OFFICIAL[name]
    model = load_experiment(f"{name},float").model
    model = dataclasses.replace(model, num_classes=91, remat=False, dtype="float32")
    images, mask = example_input((256, 512))  # 680 tokens for 300 proposals
    module = build_detector(model)
    params, stats = flat_shapes(jax.eval_shape(module.init, jax.random.key(0), images, mask))
    seen = variant.seen_facts(params, model.family, "source")
    assert seen["classes"] == 91
    facts, notes = variant.agreed_facts(
        seen, {}, "", model.family, hidden.get("dilation"), "source.pth"
    )
    found = dataclasses.replace(model_config(facts, model.family, "source"), num_classes=91)
    assert found == model
    assert default_name(found, model.family) == wanted
    unseen = 2 - len(hidden) + model.deformable.two_stage
    assert len(notes) == unseen
    refine = model.deformable.box_refine
    for table, decoder in TABLES_OF[model.family].items():
        key = table if refine or model.family == "detr" else table + recognise.SHARED
        state = empty_state(params, stats, key)
        if refine:  # official files list the boxes' heads in the decoder again
            again = [foreign for foreign in state if foreign.startswith("bbox_embed")]
            assert len(again) == 6 * (6 + model.deformable.two_stage)
            state |= {decoder + foreign: state[foreign] for foreign in again}
        assert recognise.recognise(state, "source")[0] == key


@pytest.mark.parametrize(("depth", "block"), [(18, "basic"), (50, "bottleneck")])
def test_backbones(depth, block):
    config = resnet_config(f"resnet{depth}")
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    found = jax.eval_shape(ResNet(config).init, jax.random.key(0), images)
    params, stats = flat_shapes({group: {"backbone": tree} for group, tree in found.items()})
    state = empty_state(params, stats, "torchvision_resnet")
    table, kind = recognise.recognise(state, "source")
    assert (table, kind.family) == ("torchvision_resnet", "backbone")
    facts = variant.seen_facts(params, "backbone", "source")
    assert facts["block"] == block
    assert model_config(facts, "backbone", "source").backbone == config


def test_folders_of_timm(tmp_path):
    """Only those whose ResNet is all that its names say: others pool without parameters."""
    config = BackboneConfig("basic", (2, 2, 2, 2), (2, 4, 4, 6), stem_width=2)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    made = jax.eval_shape(ResNet(config).init, jax.random.key(0), images)
    shapes = flat_shapes({group: {"backbone": tree} for group, tree in made.items()})
    generator = np.random.default_rng(0)
    params, stats = (
        {path: generator.random(shape, np.float32) for path, shape in group.items()}
        for group in shapes
    )
    source = tmp_path / "theirs"
    source.mkdir()
    state = names.untranslate(params, stats, TABLES["torchvision_resnet"])
    save_file(state, source / "model.safetensors")
    said = {"num_classes": 1000, "pretrained_cfg": {"input_size": [3, 224, 224]}}
    for changes, reason in (
        ({}, "says architecture=None; of timm's folders resnet18, resnet34, resnet50"),
        ({"architecture": "resnetaa50"}, "says architecture='resnetaa50'; of timm's folders"),
        ({"architecture": ["resnet18"]}, r"says architecture=\['resnet18'\]"),
        ({"architecture": "resnet34"}, "architecture='resnet34', which has depths="),
        ({"architecture": "resnet18", "model_args": {"aa_layer": "avg"}}, "model_args={'aa_layer"),
    ):
        (source / "config.json").write_text(json.dumps(said | changes))
        with pytest.raises(ValueError, match=reason):
            convert(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    (source / "config.json").write_text(json.dumps(said | {"architecture": "resnet18"}))
    found = convert(source, tmp_path / "out").bundle
    assert found.config.backbone == config
    loaded = traverse_util.flatten_dict(found.variables["params"], sep="/")
    assert set(loaded) == set(params)
    for path, value in params.items():
        np.testing.assert_array_equal(loaded[path], value)


LITE = EfficientNetLiteConfig("efficientnet_lite")


@functools.cache
def lite_in_timms_names():
    """Random arrays of a whole Lite0, classifier included, in the order of torch's modules."""
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    made = jax.eval_shape(build_backbone(LITE).init, jax.random.key(0), images)
    shapes = flat_shapes({group: {"backbone": tree} for group, tree in made.items()})
    rng = np.random.default_rng(0)
    params, stats = (
        {path: rng.random(shape, np.float32) for path, shape in group.items()} for group in shapes
    )
    state = names.untranslate(params, stats, TABLES["timm_efficientnet_lite"])
    state |= {"conv_head.weight": np.zeros((4, 320, 1, 1), np.float32)}
    state |= {f"bn2.{part}": np.zeros(4, np.float32) for part in ("weight", "running_mean")}
    return state | {"classifier.bias": np.zeros(3, np.float32)}, params, stats


def in_pytorchs_names(state):
    """Blocks counted through the network; names of a block's parts by what they do."""
    blocks = [(0, 0), *((s, b) for s, n in enumerate((0, 2, 2, 3, 3, 4, 1)) for b in range(n))]
    parts = {"conv_pw": "_expand_conv", "conv_dw": "_depthwise_conv", "conv_pwl": "_project_conv"}
    parts |= {"bn1": "_bn0", "bn2": "_bn1", "bn3": "_bn2"}
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    ends = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
    found = {}
    for name, array in state.items():
        pieces = name.split(".")
        if pieces[0] == "blocks":
            block = blocks.index((int(pieces[1]), int(pieces[2])))
            part = (parts if block else first)[pieces[3]]
            found[f"_blocks.{block}.{part}.{pieces[4]}"] = array
        else:
            found[f"{ends.get(pieces[0], '_fc')}.{pieces[1]}"] = array
    return found


@pytest.mark.parametrize("naming", ["timm", "pytorch"])
def test_efficientnet_lite(naming, tmp_path):
    state, params, stats = lite_in_timms_names()
    if naming == "pytorch":
        state = in_pytorchs_names(state)
    save_file(state, tmp_path / "lite.safetensors")
    made = convert(tmp_path / "lite.safetensors", tmp_path / "out")
    bundle = load_model(tmp_path / "out")
    assert bundle.config.backbone == LITE
    assert bundle.info["name"] == "efficientnet_lite0"
    # Of bytes (x - 127) / 128, which goes where the model goes.
    np.testing.assert_allclose(np.multiply(bundle.config.pixel_mean, 255), 127)
    np.testing.assert_allclose(np.multiply(bundle.config.pixel_std, 255), 128)
    found = traverse_util.flatten_dict(bundle.variables["params"], sep="/")
    assert found.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(found[path], value)
    for path, value in traverse_util.flatten_dict(bundle.variables["batch_stats"], sep="/").items():
        # Theirs add 1e-3 to a variance, ours 1e-5.
        shift = 1e-3 - 1e-5 if path.endswith("/var") else 0
        np.testing.assert_allclose(value, stats[path] + shift, rtol=1e-6)
    assert len(made.report.dropped) == 4


def test_an_efficientnet_lite_that_is_none(tmp_path):
    state, _, _ = lite_in_timms_names()
    cut = {name: array for name, array in state.items() if not name.startswith("blocks.5.3")}
    save_file(cut, tmp_path / "lite.safetensors")
    message = r"depths=\(1, 2, 2, 3, 3, 3, 1\) and widths=.*, which none has of efficientnet_lite0"
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "lite.safetensors", tmp_path / "out")
    source = tmp_path / "folder"
    source.mkdir()
    save_file(state, source / "model.safetensors")
    for architecture, reason in (
        ("tf_efficientnet_lite1", "depths=.*architecture='tf_efficientnet_lite1'"),
        ("resnet18", r"depths=\(1, 2, 2, 3, 3, 4, 1\), but its config.json .*resnet18"),
        ("efficientnet_lite0", "architecture='efficientnet_lite0'; of timm's folders .*tf_effic"),
    ):
        (source / "config.json").write_text(json.dumps({"architecture": architecture}))
        with pytest.raises(ValueError, match=reason):
            convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (source / "config.json").write_text(json.dumps({"architecture": "tf_efficientnet_lite0"}))
    assert convert(source, tmp_path / "out").bundle.config.backbone == LITE
