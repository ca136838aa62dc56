"""Dense pretraining, from the command to the detector that starts from it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny

from aqdetr_jax.checkpoint.model_folder import load_model
from aqdetr_jax.cli import main
from aqdetr_jax.training.experiment import load_experiment

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_pretrain_feeds_a_detector(tmp_path):
    """The backbone's norms learn, at the rate of the rest, and the detector takes it over."""
    train = dataclasses.replace(tiny.FLOAT.train, steps=2)
    optimizer = dataclasses.replace(
        tiny.FLOAT.optimizer, lr_backbone=0.0, frozen=("backbone/stem",)
    )
    config = dataclasses.replace(tiny.FLOAT, train=train, optimizer=optimizer)
    file = tiny.write_config(config, tmp_path / "float.json")
    folder = tmp_path / "pretrained"
    assert main(["pretrain", f"--config={file}", f"--workdir={folder}"]) == 0
    written = load_experiment(str(folder / "config.json"))
    assert (written.task, written.model.backbone.norm) == ("pretrain", "batch")
    assert (written.optimizer.frozen, written.optimizer.lr_backbone) == ((), config.optimizer.lr)
    learned = load_model(folder).variables["batch_stats"]["backbone"]["stem_norm"]["mean"]
    assert np.abs(learned).max() > 0
    run = tmp_path / "run"
    command = ["train", f"--config={file}", f"--workdir={run}", f"init_from={folder}"]
    assert main([*command, "train.steps=1"]) == 0
    taken = load_model(run).variables["batch_stats"]["backbone"]["stem_norm"]["mean"]
    np.testing.assert_array_equal(taken, learned)
