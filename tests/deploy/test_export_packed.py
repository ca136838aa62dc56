"""``aqdetr export --format=packed``: written, judged, loaded; or refused, with nothing left."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tiny

import aqdetr_jax
from aqdetr_jax.checkpoint.checksums import write_manifest
from aqdetr_jax.checkpoint.model_folder import save_model
from aqdetr_jax.cli import main
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.deploy import export
from aqdetr_jax.deploy.bits import Codes
from aqdetr_jax.deploy.parts import Layer
from aqdetr_jax.deploy.programs import write_programs
from aqdetr_jax.quant.config import QuantConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = dataclasses.replace(tiny.FLOAT, quant=QuantConfig(policy="w4a4"))


@pytest.fixture
def command(tmp_path):
    """An export of a low-bit model, ready to run."""
    save_model(tmp_path / "run", tiny.bundle(CONFIG, drawn=False))
    config = tiny.write_config(CONFIG, tmp_path / "tiny.json")
    return [
        "export",
        "--format=packed",
        f"--model={tmp_path / 'run'}",
        f"--to={tmp_path / 'out/model'}",
        f"--config={config}",
        "--images=5",
    ]


def test_an_export_detects_as_its_model_does(command, tmp_path, capsys):
    assert main(command) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "out/model/report.json").read_text())
    assert report["set"]["images"] == 5
    assert report["failures"] == []
    assert report["ap"]["trained"] == report["ap"]["deployed"]
    codes = report["codes"]["trained, deployed"]
    assert codes["codes"] > 1e5
    assert f"{codes['different']} of {codes['codes']} codes differ" in said
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model"]

    trained, packed = (aqdetr_jax.load(tmp_path / name) for name in ("run", "out/model"))
    images = open_dataset(CONFIG.data, train=False)
    found = [
        [model.predict(images[i].image, threshold=0.0) for i in range(2)]
        for model in (trained, packed)
    ]
    for theirs, mine in zip(*found, strict=True):
        np.testing.assert_allclose(mine.scores, theirs.scores, atol=1e-4)
        np.testing.assert_allclose(mine.boxes, theirs.boxes, atol=1e-2)
    assert packed.class_names == trained.class_names
    assert main(["eval", f"--model={tmp_path / 'out/model'}", command[4]]) == 0


def test_what_is_not_the_trained_network_is_refused(command, tmp_path, monkeypatch, capsys):
    whole = export.freeze

    def wrong(bundle):
        network = whole(bundle)
        name = "encoder/layer_0/feed_forward/linear1"
        layer: Layer = network.layers[name]
        codes = Codes(np.roll(layer.kernel.values, 1, axis=1), layer.kernel.bits)
        layers = {**network.layers, name: dataclasses.replace(layer, kernel=codes)}
        return dataclasses.replace(network, layers=layers)

    monkeypatch.setattr(export, "freeze", wrong)
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "not exported" in said
    assert "linear2/input" in said  # where the wrong codes are seen
    assert not (tmp_path / "out").exists()
    assert main([*command, "--force"]) == 0
    report = json.loads((tmp_path / "out/model/report.json").read_text())
    assert report["failures"]


def test_an_export_needs_images_to_be_judged_on(command, tmp_path, capsys):
    assert main([word for word in command if not word.startswith("--config")]) == 1
    assert "--config=configs/NAME.py" in capsys.readouterr().err
    assert main([*command, "--fake-quantized"]) == 1
    assert "--format=huggingface" in capsys.readouterr().err
    assert main([*command, "data.augment.crop_probability=0.5"]) == 1
    assert not (tmp_path / "out").exists()


def test_what_is_no_export_of_its_kind_is_not_replaced(command, tmp_path, capsys):
    """``report.json`` is a name that others use too."""
    (tmp_path / "out/model").mkdir(parents=True)
    for content in ('{"ap": {}}', '{"format": "onnx"}', "[]", "mine"):
        (tmp_path / "out/model/report.json").write_text(content)
        for kind in ("stablehlo", "packed"):
            assert main([command[0], f"--format={kind}", *command[2:]]) == 1
            assert "choose another name" in capsys.readouterr().err
        assert (tmp_path / "out/model/report.json").read_text() == content


@pytest.mark.parametrize("key", ["data.fit=1", "data.eval_short_side=32"])
def test_the_image_rule_is_the_models(key, command, capsys):
    assert main([*command, key]) == 1
    assert f"config.{key.partition('=')[0]} has no effect" in capsys.readouterr().err


def test_a_deployed_model_is_no_source(command, tmp_path, capsys):
    write_manifest(tmp_path / "run/manifest.json", tmp_path / "run", {"format": "aqdetr-packed"})
    (tmp_path / "run/params").rename(tmp_path / "run/elsewhere")
    assert main(command) == 1
    assert "It is an export (aqdetr-packed)" in capsys.readouterr().err


def test_programs_are_made_for_tpus(tmp_path):
    with pytest.raises(ValueError, match="--chip=cpu is no TPU that is known: v4, v5e"):
        write_programs(tmp_path, None, "cpu")


def test_a_program_is_judged_as_well(command, tmp_path):
    """Of a model that was trained in bfloat16, too: deployed is what it is in float32."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(tiny.MODEL, dtype="bfloat16"))
    save_model(tmp_path / "run", tiny.bundle(config, drawn=False))
    command[1] = "--format=stablehlo"
    assert main([*command, "--chip=v5e"]) == 0
    report = json.loads((tmp_path / "out/model/report.json").read_text())
    assert report["failures"] == []
    assert list(report["ap"]) == ["trained, in bfloat16", "trained", "deployed", "StableHLO"]
    assert report["ap"]["StableHLO"] == report["ap"]["deployed"]
    assert main([*command, "--chip=v55"]) == 1
    assert (tmp_path / "out/model/report.json").is_file()  # the earlier one
    assert main([*command, "--batch=2"]) == 1
