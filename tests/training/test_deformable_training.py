"""Deformable DETR through the whole training: teacher, calibration, 4-bit student, evaluation."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tiny

import aqdetr_jax
from aqdetr_jax.checkpoint.model_folder import save_model
from aqdetr_jax.losses.criterion import LossWeights
from aqdetr_jax.losses.distillation import DistillationWeights
from aqdetr_jax.models.config import DeformableConfig
from aqdetr_jax.training import assemble, loop
from aqdetr_jax.training.config import DistillConfig
from aqdetr_jax.training.experiment import load_experiment

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


@pytest.mark.parametrize(
    ("variant", "levels", "refine", "two_stage"),
    [
        ("r50", 4, False, False),
        ("r50-single", 1, False, False),
        ("r50-dc5", 1, False, False),
        ("r50-refine", 4, True, False),
        ("r50-two-stage", 4, True, True),
    ],
)
def test_official_settings(variant, levels, refine, two_stage):
    """Defaults of main.py of fundamentalvision/Deformable-DETR, and its published batch of 32."""
    config = load_experiment(f"coco_deformable:{variant},float")
    model, optimizer = config.model, config.optimizer
    sizes = (model.num_queries, model.ffn, model.dim, model.heads, model.dropout)
    assert sizes == (300, 1024, 256, 8, 0.1)
    assert (model.encoder_layers, model.decoder_layers, model.num_auxiliary) == (6, 6, 0)
    wanted = DeformableConfig(levels=levels, points=4, box_refine=refine, two_stage=two_stage)
    assert model.deformable == wanted
    assert model.backbone.output_stride == (16 if "dc5" in variant else 32)
    loss = config.loss
    assert (loss.kind, loss.cls, loss.l1, loss.giou) == ("focal", 2.0, 5.0, 2.0)
    assert (loss.focal_alpha, loss.focal_gamma) == (0.25, 2.0)
    assert (optimizer.lr, optimizer.lr_backbone, optimizer.slow_factor) == (2e-4, 2e-5, 0.1)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (1e-4, 0.1)
    assert (optimizer.schedule, optimizer.drop_at) == ("step", (40 / 50,))
    assert (config.train.epochs, optimizer.reference_batch) == (50.0, 32)
    slow = {"sampling_offsets/"} | (set() if two_stage else {"reference_points/"})
    assert set(optimizer.slow) == slow
    low = load_experiment(f"coco_deformable:{variant},w4a4", ("init_from=float",))
    assert (low.model.num_auxiliary, low.auxiliary.repeats) == (1500, 6)  # H-DETR's
    same = dataclasses.replace(low.model, num_auxiliary=0)
    assert same == model
    assert low.loss == loss
    assert low.distill.weights.encoder > 0


@pytest.mark.parametrize("name", ["shapes_teacher:deformable", "bccd:deformable-teacher"])
def test_class_terms_weigh_as_in_the_original(name):
    assert load_experiment(name).loss == LossWeights(cls=2.0, kind="focal")


@pytest.mark.parametrize("two_stage", [False, True])
def test_teacher_and_student(tmp_path, two_stage):
    options = {"box_refine": two_stage, "two_stage": two_stage}
    steps = dataclasses.replace(tiny.FLOAT.train, steps=2, pictures=1)
    # Not as initialised: offsets and weights that see no query leave nothing to distil.
    save_model(tmp_path / "teacher", tiny.bundle(deformable(tiny.FLOAT, **options), drawn=False))
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


def test_pretraining_starts_the_detector(tmp_path, capsys, monkeypatch):
    config = deformable(tiny.FLOAT)
    steps = dataclasses.replace(config.train, steps=1)
    dense = loop.train(
        dataclasses.replace(config, task="pretrain", train=steps), tmp_path / "dense"
    )
    config = dataclasses.replace(config, init_from=str(tmp_path / "dense"), train=steps)

    class FoundError(Exception):
        pass

    def never(*_):
        raise FoundError

    monkeypatch.setattr(assemble, "make_train_step", never)  # what a detector's step does is above
    with pytest.raises(FoundError):
        loop.train(config, tmp_path / "detector")
    shared = ("backbone", "encoder", "input_proj", "input_norm", "level_embed")
    count = sum(path.startswith(shared) for path in tiny.flat(dense.bundle.variables))
    assert f"parameters: {count} loaded" in capsys.readouterr().out
    assert count > 40
