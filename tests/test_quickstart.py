"""The quickstart in miniature: the same code on the tiny experiment."""

from __future__ import annotations

import dataclasses
import errno
import json
from fnmatch import fnmatchcase

import pytest
import tiny

from aqdetr_jax import quickstart as qs
from aqdetr_jax.checkpoint.model_folder import load_model
from aqdetr_jax.compress import verdict
from aqdetr_jax.config_types import from_dataclass
from aqdetr_jax.evaluation.coco import validate_results_block
from aqdetr_jax.evaluation.models import evaluate_bundle
from aqdetr_jax.training.config_tools import flatten_config
from aqdetr_jax.training.effects import idle

pytestmark = pytest.mark.usefixtures("quick_compile")


def overrides(config) -> tuple[str, ...]:
    """Every value of a configuration that has an effect as a command-line override."""
    flat = flatten_config(from_dataclass(config))
    patterns = [pattern for pattern, _ in idle(config)]
    return tuple(
        f"{key}={tuple(value) if isinstance(value, list) else value}"
        for key, value in flat.items()
        if key not in ("init_from", "name")
        and not any(fnmatchcase(key, pattern) for pattern in patterns)
    )


def test_quickstart(tiny_teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(qs.TEACHERS, "detr", tiny_teacher)
    config = tiny.student(tiny_teacher)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    blocks = qs.quickstart(tmp_path, baseline=True, overrides=overrides(config))
    assert list(blocks) == ["teacher", "calibrated", "student", "baseline"]
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored == blocks
    for name, block in stored.items():
        validate_results_block(block)
        assert block["images"] == 6, name
    assert "so the w4a4 student cannot be judged" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    for text in ("teacher", "calibrated", "student", "baseline"):
        assert text in page
    assert (tmp_path / "pictures" / "detections.png").is_file()
    assert (tmp_path / "pictures" / "attention_0.png").is_file()
    student = load_model(tmp_path / "student")
    assert student.quant.policy == "w4a4"
    assert student.config.num_auxiliary == 0

    # The same command again goes through without training, to the same numbers; that the report
    # cannot be written is a line, and that the student cannot be timed another.
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("aqdetr_jax.reporting.write_report", full)
    monkeypatch.setattr("aqdetr_jax.compress.speed_of", full)
    again = qs.quickstart(tmp_path, overrides=overrides(config))
    said = capsys.readouterr()
    assert "this run is finished" in said.out
    assert "so the w4a4 student cannot be judged" in said.out
    assert "results.json" in said.out.splitlines()[-1]
    assert "the report could not be made (OSError: [Errno 28] No space" in said.err
    assert "the comparison of speed could not be made" in said.err
    assert f"as integers: {tmp_path / 'packed'}" in said.out
    assert json.loads((tmp_path / "results.json").read_text()) == again
    for name in ("teacher", "calibrated", "student"):
        assert again[name]["AP"] == blocks[name]["AP"]


def test_teacher_from_scratch(tmp_path, monkeypatch):
    """Pretraining, then the float teacher from it."""
    short = dataclasses.replace(tiny.FLOAT.train, steps=2)
    learning = dataclasses.replace(
        tiny.MODEL, backbone=dataclasses.replace(tiny.BACKBONE, norm="batch")
    )
    experiments = {
        "shapes_pretrain:detr": dataclasses.replace(
            tiny.FLOAT, name="pretrain", task="pretrain", model=learning, train=short
        ),
        "shapes_teacher:detr": dataclasses.replace(tiny.FLOAT, name="teacher", train=short),
    }
    monkeypatch.setattr(
        qs,
        "load_experiment",
        lambda name, overrides=(), **fields: dataclasses.replace(experiments[name], **fields),
    )
    folder = qs.train_teacher(tmp_path)
    pretrained, teacher = load_model(tmp_path / "pretrain"), load_model(folder)
    assert set(pretrained.variables["params"]) == {"backbone", "encoder", "input_proj"}
    assert not teacher.quant.quantized
    # The running statistics of the learning norms are frozen into the teacher.
    assert tiny.digest(teacher.variables["batch_stats"]) == tiny.digest(
        pretrained.variables["batch_stats"]
    )
    assert (tmp_path / "teacher" / "results.json").is_file()


def test_unknown_model(tmp_path):
    with pytest.raises(ValueError, match="unknown model 'yolo'"):
        qs.quickstart(tmp_path, model="yolo")


def test_model_of_other_classes_is_not_evaluated(tiny_teacher):
    bundle = dataclasses.replace(load_model(tiny_teacher), class_names=("cat", "dog"))
    with pytest.raises(ValueError, match=r"has 10 classes .* 2 classes \(cat, dog\)"):
        evaluate_bundle(bundle, tiny.FLOAT.data, "wrong", batch_size=8)


def test_the_verdict():
    def judged(teacher, student):
        return verdict({"teacher": {"AP": teacher}, "student": {"AP": student}}, "w4a4")

    assert judged(0.5, 0.49) == "the w4a4 student keeps 98.0% of the teacher's AP"
    assert "finds next to nothing (AP 0.004)" in judged(0.004, 0.008)
