"""Deformable DETR through the whole training: teacher, calibration, 4-bit student, evaluation."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tiny

import aqdetr_jax
from aqdetr_jax.losses.criterion import LossWeights
from aqdetr_jax.losses.distillation import DistillationWeights
from aqdetr_jax.models.config import DeformableConfig
from aqdetr_jax.training import loop
from aqdetr_jax.training.config import DistillConfig
from aqdetr_jax.training.model_io import save_model

pytestmark = pytest.mark.usefixtures("quick_compile")


def deformable(config, **options):
    """The tiny experiment with the other family of models."""
    model = dataclasses.replace(
        config.model,
        family="deformable",
        deformable=DeformableConfig(levels=3, stages=2, points=2, norm_groups=8, **options),
    )
    optimizer = dataclasses.replace(config.optimizer, slow=("sampling_offsets/",))
    loss = LossWeights(cls=2.0, kind="focal")
    return dataclasses.replace(config, model=model, loss=loss, optimizer=optimizer)


@pytest.mark.parametrize("two_stage", [False, True])
def test_teacher_and_student(tmp_path, two_stage):
    options = {"box_refine": two_stage, "two_stage": two_stage}
    steps = dataclasses.replace(tiny.FLOAT.train, steps=2, pictures=1)
    teacher = tiny.bundle(deformable(tiny.FLOAT, **options))
    # Not as initialised: offsets and weights that see no query leave nothing to distil.
    teacher = dataclasses.replace(teacher, variables=tiny.random_like(teacher.variables))
    save_model(tmp_path / "teacher", teacher)
    student = deformable(tiny.student(tmp_path / "teacher"))
    if two_stage:
        with pytest.raises(ValueError, match="teacher's queries are its own proposals"):
            deformable(student, **options)
        student = dataclasses.replace(
            student, distill=DistillConfig(weights=DistillationWeights(encoder=1.0))
        )
    student = dataclasses.replace(deformable(student, **options), train=steps)
    block = loop.train(student, tmp_path / "student").block
    assert 0 <= block["AP"] <= 1
    lines = (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    wanted = {"loss_distill_encoder", "auxiliary_queries/loss_giou", "aux_layers/loss_ce"}
    wanted |= {"proposals/loss_ce"} if two_stage else {"loss_distill_decoder_cross"}
    assert wanted <= set(rows[0])
    assert all(np.isfinite(v) for row in rows for v in row.values())
    assert rows[0]["loss_distill_encoder"] > 0
    report = json.loads((tmp_path / "student" / "bit_report.json").read_text())
    assert {"mix_samples", "sampling"} <= {row["kind"] for row in report["rows"]}
    detector = aqdetr_jax.load(tmp_path / "student")
    found = detector.predict(np.zeros((60, 64, 3), np.uint8), threshold=0.0)
    assert len(found.scores) > 0


def test_pretraining_starts_the_detector(tmp_path, capsys):
    config = deformable(tiny.FLOAT)
    steps = dataclasses.replace(config.train, steps=1)
    dense = loop.train(
        dataclasses.replace(config, task="pretrain", train=steps), tmp_path / "dense"
    )
    config = dataclasses.replace(config, init_from=str(tmp_path / "dense"), train=steps)
    loop.train(config, tmp_path / "detector")
    shared = ("backbone", "encoder", "input_proj", "input_norm", "level_embed")
    count = sum(path.startswith(shared) for path in tiny.flat(dense.bundle.variables))
    assert f"parameters: {count} loaded" in capsys.readouterr().out
    assert count > 40
