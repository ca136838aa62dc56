"""One's own folder to a low-bit detector: the plan, and the whole way in miniature."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny
import yaml
from PIL import Image

from aqdetr_jax import finetune as ft
from aqdetr_jax.checkpoint.model_folder import load_model, save_model
from aqdetr_jax.cli import main
from aqdetr_jax.data.open import load_dataset
from aqdetr_jax.training.estimate import Estimate

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = (
    "model.dim=32",
    "model.heads=2",
    "model.ffn=32",
    "model.encoder_layers=1",
    "model.decoder_layers=1",
    "model.backbone.widths=(8, 8, 8)",
    "model.backbone.stem_width=8",
    "train.batch_size=4",
    "train.eval_batch_size=4",
    "train.pictures=1",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The generated set as a YOLO folder, 8 and 4 images of 64 pixels."""
    root = tmp_path_factory.mktemp("yolo")
    for split, name, count in (("train", "train", 8), ("val", "validation", 4)):
        dataset = load_dataset("shapes", split=name, size=64, num_images=count)
        for part in ("images", "labels"):
            (root / part / split).mkdir(parents=True)
        for i, example in enumerate(dataset):
            Image.fromarray(example.image).save(root / "images" / split / f"{i}.png")
            lines = []
            for label, (x1, y1, x2, y2) in zip(example.labels, example.boxes / 64, strict=True):
                box = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
                lines.append(f"{label} {' '.join(map(str, box))}\n")
            (root / "labels" / split / f"{i}.txt").write_text("".join(lines))
    settings = {"train": "images/train", "val": "images/val", "names": list(dataset.class_names)}
    (root / "data.yaml").write_text(yaml.safe_dump(settings))
    return root


@pytest.fixture
def measured(monkeypatch):
    """The names of the stages that are measured, each said to take half a second a step."""
    names = []

    def estimate(config, train_set, eval_set):
        names.append(config.name)
        return Estimate(0.5, config.train.steps, 3.0, 20.0)

    monkeypatch.setattr(ft, "estimate", estimate)
    return names


def test_from_a_folder_to_a_report(folder, tmp_path, capsys, measured):
    workdir = tmp_path / "run"
    command = ["finetune", str(folder), f"--workdir={workdir}", "--effort=0.001"]
    command += [*SMALL, "quant.policy=w3a3"]
    assert main(command) == 0
    said = capsys.readouterr().out
    first = said.index(f"{folder} is a YOLO folder: training on 'train', evaluating on 'val'")
    assert first < said.index("8 images (median 64x64)") < said.index("in all; every stage goes on")
    blocks = json.loads((workdir / "results.json").read_text())
    assert list(blocks) == ["teacher", "calibrated", "student"]
    assert {block["images"] for block in blocks.values()} == {4}
    assert (workdir / "report.html").is_file()
    teacher, student = load_model(workdir / "teacher"), load_model(workdir / "student")
    assert not teacher.quant.quantized
    assert student.quant.policy == "w3a3"
    assert student.input.buckets == ((64, 64),)
    assert student.class_names == teacher.class_names
    assert len(measured) == 3
    # The same command again trains nothing and measures nothing.
    assert main(command) == 0
    again = capsys.readouterr().out
    assert again.count("this run is finished") == 3
    assert len(measured) == 3
    repeated = json.loads((workdir / "results.json").read_text())
    assert repeated["student"]["AP"] == blocks["student"]["AP"]


@pytest.fixture
def plan(folder, tmp_path, measured):
    """``make_plan`` without its measurements."""

    def make(**options):
        return ft.make_plan(str(folder), tmp_path, **options)

    return make


def test_every_override_goes_where_it_belongs(plan, measured, capsys):
    overrides = ("seed=3", "train.batch_size=8", "quant.policy=w2a2", "auxiliary.repeats=2")
    made = plan(family="detr", baseline=True, overrides=overrides)
    stages = made.stages
    assert list(stages) == ["pretrain", "teacher", "student", "baseline"]
    assert {s.seed for s in stages.values()} == {3}
    assert {s.train.batch_size for s in stages.values()} == {8}
    assert {s.model.family for s in stages.values()} == {"detr"}
    assert [s.quant.policy for s in stages.values()] == ["float", "float", "w2a2", "w2a2"]
    assert stages["student"].auxiliary.repeats == 2
    assert stages["baseline"].model.num_auxiliary == 0
    assert not stages["baseline"].distill.weights.active
    # 165 passes over 8 images in batches of 8, and 66 for the students.
    steps = [made.resolved[name].train.steps for name in stages]
    assert steps == [83, 165, 66, 66]
    assert measured == [s.name for s in stages.values()]
    said = capsys.readouterr().out
    assert "165 steps of 8 images at 0.50 s, about 1m26s" in said
    assert f"about {(sum(steps) * 0.5 + 4 * 3) // 60:.0f}m" in said


def test_effort_stretches_every_stage(plan):
    steps = {
        effort: [c.train.steps for c in plan(effort=effort).resolved.values()]
        for effort in (0.5, 1.0)
    }
    assert steps[0.5] == [-(-n // 2) for n in steps[1.0]]
    with pytest.raises(ValueError, match="--effort must be positive"):
        plan(effort=0.0)


@pytest.mark.parametrize("text", ["data.root=x", "init_from=y", "task=pretrain", "name=z"])
def test_what_it_sets_itself_is_refused(plan, text):
    with pytest.raises(ValueError, match=f"finetune sets config.{text.partition('=')[0]} itself"):
        plan(overrides=(text,))


def test_from_a_detector(plan, tmp_path, tiny_teacher):
    """Its sizes are kept, its classes are not, and nothing is pretrained."""
    made = plan(source=str(tiny_teacher), overrides=("optimizer.lr=3e-4",))
    assert list(made.stages) == ["teacher", "student"]
    teacher = made.resolved["teacher"]
    model = load_model(tiny_teacher).config
    kept = ("dim", "heads", "encoder_layers", "decoder_layers", "num_queries", "family", "pre_norm")
    assert {k: getattr(teacher.model, k) for k in kept} == {k: getattr(model, k) for k in kept}
    assert teacher.init_from == str(tiny_teacher)
    assert teacher.model.num_classes == 10
    assert (teacher.optimizer.lr, teacher.optimizer.lr_backbone) == (3e-4, ft.FINE_LR_BACKBONE)
    assert made.stages["student"].init_from == str(tmp_path / "teacher")
    assert made.resolved["student"].model.num_auxiliary == 2 * model.num_queries
    with pytest.raises(ValueError, match=r"--model=deformable does not fit --from=.* a detr model"):
        plan(source=str(tiny_teacher), family="deformable")


def test_from_a_backbone(plan, tmp_path, tiny_teacher):
    bundle = load_model(tiny_teacher)
    params = {"backbone": bundle.variables["params"]["backbone"]}
    variables = {**bundle.variables, "params": params}
    save_model(tmp_path / "backbone", dataclasses.replace(bundle, variables=variables))
    made = plan(source=str(tmp_path / "backbone"))
    assert list(made.stages) == ["teacher", "student"]
    for stage in made.stages.values():
        assert stage.model.backbone == dataclasses.replace(bundle.config.backbone, norm="frozen")
        assert stage.model.family == "deformable"


def test_from_a_quantized_model_is_refused(plan, tmp_path, tiny_teacher):
    bundle = dataclasses.replace(
        load_model(tiny_teacher), quant=tiny.student(tiny_teacher).quant, info={}
    )
    save_model(tmp_path / "low", bundle)
    with pytest.raises(ValueError, match=r"--from=.* is quantized \(w4a4\): give the float model"):
        plan(source=str(tmp_path / "low"))
    with pytest.raises(FileNotFoundError, match="--from"):
        plan(source=str(tmp_path / "nothing"))
