"""``aqdetr ptq``: a float model at few bits by calibration alone."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tiny

from aqdetr_jax.checkpoint.model_folder import load_model, model_checksum, save_model
from aqdetr_jax.cli import main
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.training.bundles import calibrated_bundle

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def made(tmp_path_factory, quick_compile):
    """(folder, configuration, its file) after the verb."""
    folder = tmp_path_factory.mktemp("ptq")
    save_model(folder / "teacher", tiny.bundle(drawn=False))
    config = tiny.student(folder / "teacher")
    quant = QuantConfig("w4a4", grid="offset", calibration_batches=1, calibration_method="minmax")
    file = tiny.write_config(dataclasses.replace(config, quant=quant), folder / "tiny.json")
    assert main(["ptq", f"--config={file}", f"--out={folder / 'out'}"]) == 0
    return folder, dataclasses.replace(config, quant=quant), file


def test_the_weights_are_the_float_models_and_the_steps_calibrations(made):
    folder, config, _ = made
    teacher, found = load_model(folder / "teacher"), load_model(folder / "out")
    assert found.quant == config.quant
    theirs, mine = tiny.flat(teacher.variables), tiny.flat(found.variables)
    for path, value in theirs.items():
        np.testing.assert_array_equal(mine[path], value, err_msg=path)
    wanted = tiny.flat(calibrated_bundle(config, teacher).variables)
    assert mine.keys() == wanted.keys() > theirs.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(mine[path], value, err_msg=path)


def test_what_is_kept(made):
    folder, config, _ = made
    out = folder / "out"
    block = json.loads((out / "results.json").read_text())
    assert 0 <= block["AP"] <= 1
    assert block["images"] == config.data.num_eval
    info = load_model(out).info
    assert info["steps"] == 0
    assert info["results"]["AP"] == block["AP"]
    assert info["calibrated_from"]["checksum"] == model_checksum(folder / "teacher")
    report = json.loads((out / "bit_report.json").read_text())
    assert any(row["grids"].endswith("+o") for row in report["rows"])
    kept = json.loads((out / "config.json").read_text())
    assert kept["quant"]["calibration_method"] == "minmax"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr=1"], "config.optimizer.lr has no effect: nothing is trained"),
        (["train.steps=1"], "config.train.steps has no effect: nothing is trained"),
        (["distill.weights.encoder=1"], "config.distill.weights.encoder has no effect"),
        (["quant.policy=float"], "quantizes nothing: --config.quant.policy=w4a4"),
        (["init_from="], "no model to calibrate: --config.init_from=DIR"),
        (["init_from=nowhere"], "config.init_from='nowhere'"),
        (["init_from={folder}/out"], "is quantized (w4a4): give the float model"),
        (["quant.calibration_method=max"], "expected one of 'mse', 'lsq', 'percentile', 'minmax'"),
    ],
)
def test_what_cannot_be_calibrated(made, tmp_path, capsys, overrides, message):
    folder, _, file = made
    given = [text.format(folder=folder) for text in overrides]
    out = tmp_path / "out"
    assert main(["ptq", f"--config={file}", f"--out={out}", *given]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()
