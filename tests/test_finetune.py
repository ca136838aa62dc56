"""One's own folder to a low-bit detector: the plan, and the whole way in miniature."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
import yaml
from PIL import Image

from aqdetr_jax import finetune as ft
from aqdetr_jax.checkpoint.model_folder import InputRule, ModelBundle, load_model, save_model
from aqdetr_jax.cli import main
from aqdetr_jax.config_types import ConfigError, from_dataclass
from aqdetr_jax.data.open import load_dataset
from aqdetr_jax.io import write_json_atomic
from aqdetr_jax.models.detector import build_detector, example_input
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.training.estimate import Estimate
from aqdetr_jax.training.experiment import load_experiment
from aqdetr_jax.training.stages import FINE_LR_BACKBONE, make_stages
from aqdetr_jax.training.workdir import WorkdirError

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
    "train.pictures=0",
    "data.fit=64",
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
    command = ["finetune", str(folder), f"--workdir={workdir}", "--effort=0.001", "--model=detr"]
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
        return ft.plan(str(folder), tmp_path, **options)

    return make


def test_every_override_goes_where_it_belongs(plan, measured, capsys):
    overrides = ("seed=3", "train.batch_size=8", "quant.policy=w2a2", "auxiliary.repeats=2")
    stages = plan(family="detr", baseline=True, overrides=overrides)
    assert list(stages) == ["pretrain", "teacher", "student", "baseline"]
    assert {s.seed for s in stages.values()} == {3}
    assert {s.train.batch_size for s in stages.values()} == {8}
    assert {s.model.family for s in stages.values()} == {"detr"}
    assert [s.quant.policy for s in stages.values()] == ["float", "float", "w2a2", "w2a2"]
    assert stages["student"].auxiliary.repeats == 2
    assert stages["baseline"].model.num_auxiliary == 0
    assert not stages["baseline"].distill.weights.active
    # 165 passes over 8 images in batches of 8, and 66 for the students.
    steps = [config.train.steps for config in stages.values()]
    assert steps == [83, 165, 66, 66]
    assert measured == [s.name for s in stages.values()]
    said = capsys.readouterr().out
    assert "165 steps of 8 images at 0.50 s, about 1m26s" in said
    assert f"about {(sum(steps) * 0.5 + 4 * 3) // 60:.0f}m" in said


def test_effort_stretches_every_stage(plan):
    steps = {effort: [c.train.steps for c in plan(effort=effort).values()] for effort in (0.5, 1.0)}
    assert steps[0.5] == [-(-n // 2) for n in steps[1.0]]
    for effort in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="--effort must be positive"):
            plan(effort=effort)
    with pytest.raises(ValueError, match="--effort stretches the recipe: give it, or"):
        plan(effort=0.5, overrides=("train.steps=40",))


def test_given_steps_hold_for_every_stage(plan):
    assert {c.train.steps for c in plan(overrides=("train.steps=40",)).values()} == {40}


def test_the_pretraining_takes_what_is_not_of_the_decoder(plan):
    overrides = ("data.fit=0", "data.buckets=((96,96),)", "model.num_queries=9")
    overrides += ("optimizer.frozen=('backbone/stem',)",)
    stages = plan(overrides=overrides)
    assert {c.data.buckets for c in stages.values()} == {((96, 96),)}
    assert [c.model.num_queries for c in stages.values()][1:] == [9, 9]
    assert stages["pretrain"].optimizer.frozen == ()  # it starts from nothing
    assert stages["teacher"].optimizer.frozen == ("backbone/stem",)


@pytest.mark.parametrize(
    "text", ["data.root=x", "init_from=y", "task=pretrain", "name=z", "loss.l1=2"]
)
def test_what_it_sets_itself_is_refused(plan, text):
    with pytest.raises(ValueError, match=f"finetune sets config.{text.partition('=')[0]} itself"):
        plan(overrides=(text,))


def test_from_a_detector(plan, tmp_path, tiny_teacher):
    """Its sizes are kept, its classes are not, and nothing is pretrained."""
    made = plan(source=str(tiny_teacher), overrides=("optimizer.lr=3e-4",))
    assert list(made) == ["teacher", "student"]
    teacher = made["teacher"]
    model = load_model(tiny_teacher).config
    kept = ("dim", "heads", "encoder_layers", "decoder_layers", "num_queries", "family", "pre_norm")
    assert {k: getattr(teacher.model, k) for k in kept} == {k: getattr(model, k) for k in kept}
    assert teacher.init_from == str(tiny_teacher)
    assert teacher.model.num_classes == 10
    assert (teacher.optimizer.lr, teacher.optimizer.lr_backbone) == (3e-4, FINE_LR_BACKBONE)
    assert made["student"].init_from == str(tmp_path / "teacher")
    assert made["student"].model.num_auxiliary == 2 * model.num_queries
    with pytest.raises(ValueError, match=r"--model=deformable does not fit --from=.* a detr model"):
        plan(source=str(tiny_teacher), family="deformable")
    with pytest.raises(ConfigError, match=r"config.model.num_queries has no effect: --from=.* has"):
        plan(source=str(tiny_teacher), overrides=("model.num_queries=60",))
    assert plan(source=str(tiny_teacher), overrides=("model.num_auxiliary=20",))


def test_a_detector_of_the_official_size(plan, tmp_path):
    """Its stride of 32 takes more pixels, its size smaller batches, its training fewer passes."""
    config = load_experiment("coco_deformable:r50-two-stage,float").model
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    config = dataclasses.replace(config, num_classes=91, dtype="float32", **layers)
    shapes = jax.eval_shape(
        build_detector(config).init, jax.random.key(0), *example_input((512, 512))
    )
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    rule = InputRule(((800, 1344),), 800, 1333)
    names = tuple(f"class {n}" for n in range(91))
    bundle = ModelBundle(config, QuantConfig(), rule, names, tuple(range(91)), variables)
    save_model(tmp_path / "official", bundle)
    stages = make_stages("x", tmp_path, source=str(tmp_path / "official"))
    teacher, student = stages["teacher"], stages["student"]
    assert teacher.data.fit == student.data.fit == 640
    assert teacher.train.batch_size == student.train.batch_size == 4
    assert teacher.train.epochs == 165 * 0.75 * 0.25
    assert student.train.epochs == 66 * 0.75
    assert student.distill.weights.encoder > 0
    assert student.distill.weights.decoder_cross == 0  # proposals do not correspond
    assert "reference_points/" not in student.optimizer.slow


def test_from_a_backbone(plan, tmp_path, tiny_teacher):
    bundle = load_model(tiny_teacher)
    params = {"backbone": bundle.variables["params"]["backbone"]}
    variables = {**bundle.variables, "params": params}
    other = dataclasses.replace(bundle.config, pixel_mean=(0.5, 0.4, 0.3), pixel_std=(0.6,) * 3)
    save_model(
        tmp_path / "backbone", dataclasses.replace(bundle, config=other, variables=variables)
    )
    made = plan(source=str(tmp_path / "backbone"))
    assert list(made) == ["teacher", "student"]
    for stage in made.values():
        assert stage.model.backbone == dataclasses.replace(bundle.config.backbone, norm="frozen")
        assert stage.model.family == "deformable"
        # What the backbone was trained on, it is given.
        assert stage.model.pixel_mean == (0.5, 0.4, 0.3)
        assert stage.model.pixel_std == (0.6, 0.6, 0.6)
    with pytest.raises(ConfigError, match=r"model.backbone.depths has no effect: --from=.* has"):
        plan(source=str(tmp_path / "backbone"), overrides=("model.backbone.depths=(1,1,1)",))
    assert plan(source=str(tmp_path / "backbone"), overrides=("model.num_queries=9",))


def test_a_float_student_is_refused(plan):
    with pytest.raises(ValueError, match=r"a low-bit student: config\.quant\.policy is 'float'"):
        plan(overrides=("quant.policy=float",))


def test_another_student_in_the_same_folder_is_refused_before_anything(
    folder, tmp_path, measured, monkeypatch
):
    workdir = tmp_path / "run"
    first = ft.plan(str(folder), workdir, family="detr")["student"]
    write_json_atomic(workdir / "student" / "model" / "manifest.json", {})  # of a finished run
    write_json_atomic(workdir / "student" / "config.json", from_dataclass(first))
    monkeypatch.setattr(ft, "train", None)
    with pytest.raises(WorkdirError, match=r"quant.policy: 'w4a4' -> 'w2a2'"):
        ft.finetune(str(folder), workdir, family="detr", overrides=("quant.policy=w2a2",))


def test_from_a_quantized_model_is_refused(plan, tmp_path, tiny_teacher):
    bundle = dataclasses.replace(
        load_model(tiny_teacher), quant=tiny.student(tiny_teacher).quant, info={}
    )
    save_model(tmp_path / "low", bundle)
    with pytest.raises(ValueError, match=r"--from=.* is quantized \(w4a4\): give the float model"):
        plan(source=str(tmp_path / "low"))
    with pytest.raises(FileNotFoundError, match="--from"):
        plan(source=str(tmp_path / "nothing"))
