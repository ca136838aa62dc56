"""``aqdetr export --format=onnx``: what ONNX Runtime computes is what was trained."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tiny

import aqdetr_jax
from aqdetr_jax.checkpoint.model_folder import save_model
from aqdetr_jax.cli import main
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.quant.config import QuantConfig

folder = pytest.importorskip("aqdetr_jax.deploy.onnx.folder", reason="the extra onnx is missing")
pytestmark = pytest.mark.usefixtures("quick_compile")


def export(tmp_path, policy, *options):
    config = dataclasses.replace(tiny.FLOAT, quant=QuantConfig(policy=policy))
    save_model(tmp_path / "run", tiny.bundle(config, drawn=False))
    status = main(
        [
            "export",
            "--format=onnx",
            f"--model={tmp_path / 'run'}",
            f"--to={tmp_path / 'out'}",
            f"--config={tiny.write_config(config, tmp_path / 'tiny.json')}",
            "--images=5",
            *options,
        ]
    )
    return status, config


@pytest.mark.parametrize("policy", ["w4a4", "float"])
def test_an_export_detects_as_its_model_does(policy, tmp_path, capsys):
    status, _ = export(tmp_path, policy)
    assert status == 0, capsys.readouterr().err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model_64x64.onnx", "report.json"}
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["failures"] == []
    assert report["ap"].keys() == {"trained", "deployed", "ONNX Runtime"}
    found = report["codes"]["deployed, ONNX Runtime"]
    assert (found["codes"] > 1e5) == (policy != "float")


def test_detections_come_out_of_the_file(tmp_path):
    status, config = export(tmp_path, "w4a4", "--detections", "--batch=2")
    assert status == 0
    detector = folder.OnnxFolder(tmp_path / "out")
    assert (detector.batch, detector.raw) == (2, False)
    example = open_dataset(config.data, train=False)[0]
    height, width = example.image.shape[:2]
    images = np.zeros((2, 64, 64, 3), np.uint8)
    images[:, :height, :width] = example.image
    sizes = np.array([[height, width]] * 2, np.int32)
    scores, labels, boxes = detector.detect(images, sizes)
    np.testing.assert_array_equal(boxes[0], boxes[1])
    mine = aqdetr_jax.load(tmp_path / "run").predict(example.image, threshold=0.0)
    order = np.argsort(-scores[0], kind="stable")
    np.testing.assert_allclose(scores[0][order], mine.scores, atol=1e-3)
    np.testing.assert_array_equal(labels[0][order], mine.labels)
    found = np.clip(boxes[0][order], 0, [width, height] * 2)
    np.testing.assert_allclose(found, mine.boxes, atol=0.1)


def test_options_of_another_format_are_errors(tmp_path, capsys):
    assert (
        main(["export", "--format=packed", "--model=x", "--to=y", "--config=z", "--batch=2"]) == 1
    )
    assert "--format=onnx" in capsys.readouterr().err
    assert main(["export", "--format=huggingface", "--model=x", "--to=y", "--images=5"]) == 1
    assert "--images" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--batch=0"):
        folder.OnnxOptions(batch=0)
