"""Exported ONNX files beside the deployed network in JAX, and files that are none."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

import onnx

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import tiny_models

from aqdetr_jax.checkpoint.model_folder import InputRule, ModelBundle
from aqdetr_jax.deploy.compare import Comparison, NetworkComparer
from aqdetr_jax.deploy.export import deployed_bundle
from aqdetr_jax.deploy.onnx import model as files
from aqdetr_jax.deploy.onnx.model import (
    FACTS,
    OnnxModelError,
    codes_of,
    onnx_model,
    read_onnx,
    save_onnx,
    with_codes,
)
from aqdetr_jax.deploy.onnx.runner import OnnxDetector, kind_of, operators, optimized, unfused
from aqdetr_jax.quant.config import QuantConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

BATCH = 2


QDETR = {"grid": "offset", "align_queries": True}
"""Options of the policy that is called "qdetr" here, of w4a4."""


@functools.cache
def deployed(name, policy="float"):
    policy, more = ("w4a4", QDETR) if policy == "qdetr" else (policy, {})
    config = dataclasses.replace(tiny_models.CONFIGS[name], num_auxiliary=0, auxiliary_groups=1)
    variables = tiny_models.variables_of(name, policy, **more)
    return deployed_bundle(
        ModelBundle(
            config,
            QuantConfig(policy=policy, **more),
            InputRule((tiny_models.BUCKET,)),
            ("a", "b", "c"),
            (1, 2, 3),
            variables,
        )
    )


@functools.cache
def written(name, policy="float", **options):
    return onnx_model(deployed(name, policy), batch=BATCH, **options)


@pytest.fixture
def file(tmp_path):
    def save(model):
        save_onnx(tmp_path / "model.onnx", model)
        return tmp_path / "model.onnx"

    return save


def images_and_sizes():
    images, mask = tiny_models.batch()
    return images, mask, np.stack([mask[:, :, 0].sum(1), mask[:, 0].sum(1)], -1)


def raw(detector):
    """Class scores and boxes."""
    images, _, sizes = images_and_sizes()
    found = detector.run(images, sizes)
    return found["logits"], found["boxes"]


@functools.cache
def comparer(name, policy):
    return NetworkComparer(deployed(name, policy).variables)


def compared(name, policy, detector):
    images, mask, sizes = images_and_sizes()
    outputs, codes = raw(detector), detector.codes(images, sizes)
    comparison = Comparison()
    comparer(name, policy).add(comparison, images, mask, codes, outputs)
    return comparison


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_codes_are_those_of_the_deployed_network(name, file):
    """All of them: in so few, values on the border between two codes are rare."""
    model = written(name, "w4a4")
    onnx.checker.check_model(model, full_check=True)
    comparison = compared(name, "w4a4", OnnxDetector(file(model), threads=1))
    assert comparison.codes > 50_000
    assert comparison.different <= 1
    assert comparison.logits < 1e-4
    assert comparison.boxes < 1e-4


@pytest.mark.parametrize(
    ("name", "policy"),
    [("detr", "w8a8"), ("detr", "float"), ("detr", "qdetr"), ("plain", "qdetr")],
)
def test_other_grids(name, policy, file):
    comparison = compared(name, policy, OnnxDetector(file(written(name, policy)), threads=1))
    assert comparison.different <= 1
    assert comparison.logits < 1e-4
    assert comparison.boxes < 1e-4


@pytest.mark.parametrize("name", ["detr", "plain"])
def test_signed_bytes_carry_the_same_codes(name, file):
    images, _, sizes = images_and_sizes()
    unsigned = OnnxDetector(file(written(name, "w4a4")), 1).codes(images, sizes)
    model = written(name, "w4a4", activations="int8")
    signed = OnnxDetector(file(model), 1).codes(images, sizes)
    assert unsigned.keys() == signed.keys()
    different = sum(np.sum(unsigned[site] != signed[site]) for site in unsigned)
    assert different <= 5
    kinds = {value.type.tensor_type.elem_type for value in with_codes(model).graph.output}
    assert kinds == {onnx.TensorProto.INT8, onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_every_integer_layer_is_computed_with_integers(name):
    """By name, after the runtime's own optimisations: one that falls out is a float layer."""
    model = optimized(written(name, "w4a4"))
    integer = ("com.microsoft:QLinearConv", "com.microsoft:QGemm")
    fused = [node.name for node in model.graph.node if kind_of(node) in integer]
    layers = [layer for layer in deployed(name, "w4a4").variables.layers.values() if layer.integer]
    assert len(layers) > 20
    assert not [
        layer.name for layer in layers if not any(made.startswith(layer.name) for made in fused)
    ]
    assert not unfused(model)
    kinds = operators(model)
    assert kinds["com.microsoft:QLinearAdd"] > 0
    assert kinds["com.microsoft:MatMulIntegerToFloat"] > 0
    assert "Conv" not in kinds
    assert not any(kind.endswith(":MatMulNBits") for kind in kinds)


def test_codes_are_on_their_grids(file):
    images, _, sizes = images_and_sizes()
    detector = OnnxDetector(file(written("plain", "w4a4")), threads=1)
    codes = detector.codes(images, sizes)
    assert codes.keys() == {site["site"] for site in detector.facts["sites"]}
    for site in detector.facts["sites"]:
        found = codes[site["site"]]
        lower = np.min(site["lower"])
        assert lower <= found.min()
        assert found.max() < lower + 2 ** site["bits"]


@pytest.mark.parametrize("name", ["detr", "plain"])
def test_detections_out_of_the_file(name, file):
    images, _, sizes = images_and_sizes()
    found = OnnxDetector(file(written(name, outputs="detections")), 1).run(images, sizes)
    logits, boxes = raw(OnnxDetector(file(written(name)), 1))
    if name == "detr":
        chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        chances = chances[..., :3]
        np.testing.assert_allclose(found["scores"], chances.max(-1), rtol=1e-5)
        np.testing.assert_array_equal(found["labels"], chances.argmax(-1))
    else:
        flat = (1 / (1 + np.exp(-logits))).reshape(BATCH, -1)
        order = np.argsort(-flat, axis=1, kind="stable")[:, :100]
        np.testing.assert_allclose(found["scores"], np.take_along_axis(flat, order, 1), rtol=1e-5)
        np.testing.assert_array_equal(found["labels"], order % logits.shape[-1])
        boxes = np.take_along_axis(boxes, order[..., None] // logits.shape[-1], axis=1)
    pixels = np.concatenate(
        [boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1
    )
    scale = np.tile(sizes[:, ::-1], 2)[:, None]
    np.testing.assert_allclose(found["boxes"], pixels * scale, rtol=1e-4, atol=1e-4)


def test_what_a_file_says_of_itself(file):
    _, facts = read_onnx(file(written("detr", "w4a4")))
    assert facts["class_names"] == ["a", "b", "c"]
    assert facts["input"] == {"buckets": [list(tiny_models.BUCKET)]} | facts["input"]
    assert facts["model"]["pixel_mean"]
    assert len(facts["sites"]) == len({site["site"] for site in facts["sites"]})


# --- files that cannot be used --------------------------------------------------------------------


def test_bad_files(tmp_path, file):
    path = file(written("detr"))
    whole = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="no such file"):
        OnnxDetector(tmp_path / "other.onnx")
    for content in (whole[: len(whole) // 2], b"no model", b""):
        path.write_bytes(content)
        with pytest.raises(OnnxModelError, match=r"model\.onnx"):
            OnnxDetector(path)


def test_a_flipped_byte_is_found(file):
    """Wherever it is: in a name, a weight, the facts or the checksum itself."""
    path = file(written("detr", "w4a4"))
    whole = path.read_bytes()
    for place in (*np.random.default_rng(0).integers(0, len(whole), 40), len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(OnnxModelError, match=r"model\.onnx"):
            read_onnx(path)
    path.write_bytes(whole)
    read_onnx(path)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (None, "not written by aqdetr export"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        (json.dumps({"format": files.FORMAT, "version": 99}), "of version 99"),
        (json.dumps({"format": "x", "version": files.VERSION}), "of 'x'"),
    ],
)
def test_files_of_others(facts, said, file):
    model = onnx.ModelProto()
    model.CopyFrom(written("detr"))
    del model.metadata_props[:]
    if facts is not None:
        onnx.helper.set_model_props(model, {FACTS: facts})
    with pytest.raises(OnnxModelError, match=said):
        OnnxDetector(file(model))


def test_a_graph_that_the_runtime_refuses(file):
    model = onnx.ModelProto()
    model.CopyFrom(written("detr"))
    del model.graph.initializer[0]
    with pytest.raises(OnnxModelError, match="ONNX Runtime cannot open it"):
        OnnxDetector(file(model))


def test_images_of_another_size(file):
    detector = OnnxDetector(file(written("detr")))
    with pytest.raises(ValueError, match=r"takes images \[2, 24, 32, 3\], got \[1, 24, 32, 3\]"):
        detector.run(np.zeros((1, 24, 32, 3), np.uint8), np.array([[24, 32]]))


def test_codes_are_arranged_as_the_vocabulary_has_them():
    facts = {
        "sites": [
            dict(site="m", layout="map", shape=[1, 2, 3, 4], zero=1, tensors=["a"]),
            dict(site="s", layout="samples", shape=[1, 2, 5, 4, 3], zero=0, tensors=["b", "c"]),
        ]
    }
    a = np.arange(24, dtype=np.uint8).reshape(1, 4, 2, 3)
    samples = np.arange(120, dtype=np.uint8).reshape(1, 2, 5, 4, 3)
    levels = [
        samples[:, :, :, 2 * i : 2 * i + 2].transpose(0, 1, 4, 3, 2).reshape(1, 2, 6, 5)
        for i in range(2)
    ]
    found = codes_of(facts, {"a": a, "b": levels[0], "c": levels[1]})
    np.testing.assert_array_equal(found["m"], a.transpose(0, 2, 3, 1).astype(int) - 1)
    np.testing.assert_array_equal(found["s"], samples)
