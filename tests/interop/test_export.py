"""The way back to transformers: the same parameters there and back, what else a model may be."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util
from foreign import LABELS, config_json, fixture, parity_cases, write_folder
from safetensors import safe_open
from safetensors.numpy import load_file

from aqdetr_jax.checkpoint.model_folder import InputRule, ModelBundle, load_model, save_model
from aqdetr_jax.cli import main
from aqdetr_jax.interop.checkpoints import Checkpoint
from aqdetr_jax.interop.convert import convert, import_checkpoint
from aqdetr_jax.interop.export import export_bundle
from aqdetr_jax.io import read_json
from aqdetr_jax.models import attention, deformable_attention, quantized, residual
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.detector import build_detector
from aqdetr_jax.models.efficientnet_lite import EfficientNetLiteConfig
from aqdetr_jax.models.resnet import resnet_config
from aqdetr_jax.quant import lsq
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.quant.contractions import Conv, Dense
from aqdetr_jax.quant.product import quantized_product

pytestmark = pytest.mark.usefixtures("quick_compile")

RULE = InputRule(((96, 128), (128, 96), (96, 96)), 96, 128)
PREPROCESSING = {
    "size": {"shortest_edge": 96, "longest_edge": 128},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}
FLOAT = QuantConfig()
VARIANTS = [name for name in parity_cases.TINY if not name.endswith("dc5")]


def flat(bundle):
    return traverse_util.flatten_dict(bundle.variables, sep="/")


def same_model(found, want):
    for field in ("config", "quant", "input", "class_names", "category_ids"):
        assert getattr(found, field) == getattr(want, field), field
    a, b = flat(want), flat(found)
    assert a.keys() == b.keys()
    for path, value in a.items():
        assert b[path].dtype == value.dtype
        np.testing.assert_array_equal(b[path], value, err_msg=path)


def random_bundle(config, quant=FLOAT):
    images = jax.ShapeDtypeStruct((1, 96, 128, 3), np.uint8)
    mask = jax.ShapeDtypeStruct((1, 96, 128), bool)
    module = build_detector(config, quant.build())
    variables = tiny.random_like(jax.eval_shape(module.init, jax.random.key(0), images, mask))
    ids = tuple(range(config.num_classes))
    return ModelBundle(config, quant, RULE, LABELS, ids, variables, {"name": "tiny"})


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_there_and_back(name, tmp_path, capsys):
    """transformers' own model, converted, exported: its arrays again, and ours again."""
    source = write_folder(tmp_path / "theirs", name)
    (source / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    convert(source, tmp_path / "ours")
    folder = tmp_path / "back"
    assert (
        main(["export", "--format=huggingface", f"--model={tmp_path / 'ours'}", f"--to={folder}"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "float, as they are" in printed
    assert f"written to {folder} (export_report.json" in printed
    files = {"model.safetensors", "config.json", "preprocessor_config.json", "export_report.json"}
    assert {file.name for file in folder.iterdir()} == files
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # for whom the others are
    assert read_json(folder / "export_report.json")["left_out"] == []

    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file(folder / "model.safetensors")
    want = {}
    for key, value in fixture(name)["state"].items():  # version 5 names in those of version 4
        key = key.replace("model.backbone.", "model.backbone.conv_encoder.")
        key = re.sub(r"mlp\.fc(\d)", r"fc\1", key.replace(".o_proj.", ".out_proj."))
        want[key] = value
    missing = {key for key in want if key not in found}
    assert all(key.endswith("num_batches_tracked") for key in missing), missing
    for key, value in found.items():
        np.testing.assert_array_equal(value, want[key], err_msg=key)

    settings, expected = read_json(folder / "config.json"), config_json(name)
    expected["backbone_config"] = {**settings["backbone_config"], **expected["backbone_config"]}
    if not settings.get("two_stage"):  # the number of proposals says nothing
        expected.pop("two_stage_num_proposals", None)
    assert {key: settings[key] for key in expected} == expected
    own = tmp_path / "again"
    assert main(["convert", str(folder), f"--to={own}"]) == 0
    same_model(load_model(own), load_model(tmp_path / "ours"))
    assert load_model(own).input == RULE
    assert load_model(own).config.pixel_mean == (0.5, 0.4, 0.3)
    assert not [note for note in read_json(own / "load_report.json")["notes"] if "taken" in note]


@pytest.mark.parametrize("name", ["detr_dc5", "deformable_dc5"])
def test_dc5_has_timms_backbone(name):
    """In memory: a ResNet-50 under a tiny transformer."""
    config = dataclasses.replace(
        parity_cases.TINY[name], backbone=resnet_config("resnet50", dc5=True)
    )
    want = random_bundle(config)
    made = export_bundle(want, "ours")
    assert made.settings["backbone_config"] is None
    assert made.settings["backbone"] == "resnet50"
    assert made.settings["use_timm_backbone"]
    assert made.settings["dilation"]
    assert any("timm" in note for note in made.report["notes"])
    prefix = "model.backbone.conv_encoder.model."
    backbone = {key.removeprefix(prefix) for key in made.state if "backbone" in key}
    # torchvision's ResNet-50: 53 convolutions and norms of four vectors each.
    assert len(backbone) == 53 * 5
    assert {"conv1.weight", "bn1.running_var", "layer4.2.conv3.weight"} <= backbone
    assert {"layer4.0.downsample.0.weight", "layer4.0.downsample.1.running_mean"} <= backbone
    again = import_checkpoint(
        Checkpoint(
            "theirs", made.state, dict(made.settings), "config.json", dict(made.preprocessing), {}
        )
    ).bundle
    changes = {"dropout": again.config.dropout, "deformable": again.config.deformable}
    same_model(again, dataclasses.replace(want, config=dataclasses.replace(config, **changes)))
    options = dataclasses.replace(config.deformable, sampling="auto")
    assert again.config.deformable == options


def test_what_else_a_model_may_be(converted):
    """Names for a part of the classes, a learning norm, images as they are, auxiliary queries."""
    bundle = load_model(converted)
    config = dataclasses.replace(
        bundle.config,
        backbone=dataclasses.replace(bundle.config.backbone, norm="batch"),
        dtype="bfloat16",
        num_auxiliary=4,
    )
    params = {**bundle.variables["params"], "auxiliary_queries": np.ones((4, 32), np.float32)}
    other = dataclasses.replace(
        bundle,
        config=config,
        input=InputRule(((64, 64),)),
        class_names=LABELS[:3],
        category_ids=(4, 7, 9),
        variables={**bundle.variables, "params": params},
    )
    made = export_bundle(other, "ours")
    same = export_bundle(bundle, "ours")
    assert made.state.keys() == same.state.keys()
    assert made.settings["id2label"] == {
        **{str(i): label for i, label in enumerate(LABELS[:3])},
        "3": "N/A",
        "4": "N/A",
    }
    assert made.report["category_ids"] == (4, 7, 9)
    assert made.report["left_out"][0]["parameters"] == ["auxiliary_queries"]
    notes = " ".join(made.report["notes"])
    for text in ("'N/A'", "running statistics", "bfloat16", "images keep their size"):
        assert text in notes
    checkpoint = Checkpoint(
        "theirs", made.state, dict(made.settings), "config.json", dict(made.preprocessing), {}
    )
    rule = import_checkpoint(checkpoint).bundle.input
    assert (rule.short_side, rule.max_size) == (None, None)
    unlimited = dataclasses.replace(bundle, input=InputRule(((96, 160), (160, 96)), 96))
    size = export_bundle(unlimited, "ours").preprocessing["size"]
    assert size == {"shortest_edge": 96, "longest_edge": 160}


# --- low bits -------------------------------------------------------------------------------------

STUDENTS = {
    "detr_bottleneck": QuantConfig("w4a4", grid="centred"),
    "deformable_refine": QuantConfig("w3a3-attn8", grid="offset"),
}


def test_queries_that_are_aligned_have_no_place_there():
    quant = QuantConfig("w4a4", align_queries=True)
    student = random_bundle(parity_cases.TINY["detr_bottleneck"], quant)
    for fake in (False, True):
        with pytest.raises(ValueError, match=r"ours: .*quant\.align_queries.*--format=packed or"):
            export_bundle(student, "ours", fake_quantized=fake)


@pytest.mark.parametrize("name", STUDENTS)
def test_fake_quantized_weights(name, tmp_path, monkeypatch, capsys):
    """Integers times steps; with activations left float our quantized forward is that model."""
    quant = STUDENTS[name]
    student = random_bundle(parity_cases.TINY[name], quant)
    save_model(tmp_path / "student", student)
    command = [
        "export",
        "--format=huggingface",
        f"--model={tmp_path / 'student'}",
        f"--to={tmp_path / 'out' / 'theirs'}",
    ]
    assert main(command) == 1
    message = capsys.readouterr().err.splitlines()[0]
    assert f"is quantized (quant.policy={quant.policy!r})" in message
    assert "--fake-quantized" in message
    assert not (tmp_path / "out").exists()
    assert main([*command, "--fake-quantized"]) == 0
    assert "bits dequantized" in capsys.readouterr().out
    convert(tmp_path / "out" / "theirs", tmp_path / "float")
    exported = load_model(tmp_path / "float")
    given, params = flat(student), flat(exported)
    assert params.keys() == {k for k in given if not re.search(r"_(step|offset|shift|scale)$", k)}

    # --- values ---------------------------------------------------------------------------------
    bits = {"detr_bottleneck": 4, "deformable_refine": 3}[name]
    count = 0
    for path, value in params.items():
        if f"{path}_step" not in given:
            if path.removesuffix("bias") + "input_shift" not in given:
                np.testing.assert_array_equal(value, given[path], err_msg=path)
            continue
        count += 1
        lowest = -128 if re.search(r"stem|input_proj", path) else -(2 ** (bits - 1))
        scale = given.get(path.removesuffix("kernel") + "input_scale")
        on_grid = value if scale is None else value * scale[:, None]
        codes = on_grid / given[f"{path}_step"]
        np.testing.assert_allclose(codes, np.rint(codes), rtol=0, atol=1e-4, err_msg=path)
        codes = np.rint(codes)
        assert lowest <= codes.min() < 0 < codes.max() <= -lowest - 1, path
        assert np.abs(value - given[path]).max() > 1e-3, path
    assert count > 30

    # --- the same function --------------------------------------------------------------------
    def weights_only(contraction, a, b, grid, quantizer, arithmetic="fake"):
        weights = isinstance(contraction, Dense | Conv)
        if weights and grid is not None:  # an unsigned grid is the ReLU before it
            a = jnp.where(grid.lower == 0, jnp.maximum(a, 0), a)
        return quantized_product(contraction, a, b, None, quantizer if weights else None)

    for module in (quantized, attention, deformable_attention):
        monkeypatch.setattr(module, "quantized_product", weights_only)
    monkeypatch.setattr(residual, "activation_quantizer", lambda *_: None)
    monkeypatch.setattr(lsq, "round_bias", lambda bias, unit: bias)
    pictures = fixture(name)["input"]
    outputs = [
        jax.jit(bundle.module().apply)(bundle.variables, pictures["images"], pictures["mask"])
        for bundle in (student, exported)
    ]
    for key in ("logits", "boxes"):
        want, found = (np.asarray(getattr(output, key)) for output in outputs)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())
        assert np.ptp(want) > 0.1

    # --- the report ---------------------------------------------------------------------------
    report = read_json(tmp_path / "out" / "theirs" / "export_report.json")
    grids = next(entry for entry in report["left_out"] if "step sizes" in entry["what"])
    assert grids["count"] == len(grids["parameters"]) == len(given) - len(params)
    operations = {(row["operation"], row["kind"]): row for row in report["operations"]}
    dense = operations["encoder/layer_0/feed_forward/linear1", "dense"]
    assert (dense["weight_bits"], dense["activation_bits"]) == (bits, bits)
    assert dense["became"] == {"weight": "dequantized", "activation": "float"}
    sums = operations["backbone/layer1_0/residual", "add"]
    assert (sums["activation_bits"], sums["became"]) == (8, {"activation": "float"})
    mixes = [row for row in report["operations"] if row["kind"].startswith("mix")]
    assert {row["attention_bits"] for row in mixes} == {8 if "attn8" in quant.policy else 4}
    assert {tuple(row["became"].items()) for row in mixes} == {(("attention", "float"),)}
    assert sum("weight" in row["became"] for row in report["operations"]) == count
    assert not [path for path, _ in operations if "class_head" in path]


def test_default_configuration_is_detr_r50():
    """As published: facebook/detr-resnet-50 in transformers' words."""
    from aqdetr_jax.interop.huggingface import config_json as settings_of
    from aqdetr_jax.interop.huggingface import unsupported

    assert not unsupported(DetrConfig())
    lite = DetrConfig(EfficientNetLiteConfig("efficientnet_lite"))
    (reason,) = unsupported(lite)
    assert reason.startswith("model.backbone.kind='efficientnet_lite' (")
    settings = settings_of(DetrConfig(), [str(i) for i in range(91)])
    wanted = {"d_model": 256, "encoder_layers": 6, "encoder_ffn_dim": 2048, "num_queries": 100}
    assert {key: settings[key] for key in wanted} == wanted
    assert settings["backbone_config"]["hidden_sizes"] == [256, 512, 1024, 2048]
    assert settings["backbone_config"]["out_features"] == ["stage4"]
    assert len(settings["id2label"]) == 91
