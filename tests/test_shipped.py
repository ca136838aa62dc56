"""What the package ships: the float teachers, and the configurations that are built on them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from sized import Sized

import aqdetr_jax
from aqdetr_jax.checkpoint.model_folder import PACKAGED, load_model
from aqdetr_jax.cli import main
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.data.shapes.dataset import ShapesDataset
from aqdetr_jax.evaluation.models import evaluate_bundle
from aqdetr_jax.models.detector import example_input
from aqdetr_jax.quant.spec import GRID_PARAMETERS
from aqdetr_jax.quickstart import TEACHERS
from aqdetr_jax.training import setup, sizing
from aqdetr_jax.training.experiment import load_experiment

SMALL = ("data.num_train=16", "data.num_eval=48", "train.eval_batch_size=24")
"""A few images of the same set: an image does not depend on how many are drawn."""


@pytest.mark.parametrize(("family", "least"), [("detr", 0.65), ("deformable", 0.65)])
def test_teacher_detects(family, least):
    """AP50 on 48 images; on all 1200 it is 0.79 and 0.83. A damaged file gives next to nothing."""
    name = str(TEACHERS[family])
    folder = Path(aqdetr_jax.__file__).parent / "assets" / name.removeprefix(PACKAGED)
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 5e6
    teacher = load_model(name)
    assert not teacher.quant.quantized
    assert teacher.class_names == ShapesDataset("validation", num_images=1).class_names
    block, _ = evaluate_bundle(
        teacher, load_experiment("shapes_quickstart", SMALL).data, "teacher", batch_size=8
    )
    assert block["images"] == 48
    assert block["AP50"] > least


@pytest.mark.parametrize(("family", "threshold"), [("detr", 0.5), ("deformable", 0.3)])
def test_teacher_predicts_through_the_package(family, threshold):
    """Focal scores are lower than softmax's."""
    example = ShapesDataset("validation", num_images=8)[3]
    detector = aqdetr_jax.load(str(TEACHERS[family]))
    found = detector.predict(example.image, threshold=threshold)
    assert len(found) > 0
    assert set(found.names) <= set(detector.class_names)


@pytest.mark.parametrize(
    "name",
    [
        "shapes_quickstart",
        "shapes_quickstart:baseline",
        "shapes_w4a4:lsq",
        "shapes_w4a4:auxiliary",
        "shapes_w4a4:distill",
        "shapes_w4a4:aqdetr",
        "shapes_quickstart:deformable-aqdetr",
    ],
)
def test_student_is_the_teachers_model(name):
    """Every parameter of the student but step sizes and auxiliary queries is in the teacher."""
    config = load_experiment(name, SMALL)
    teacher = load_model(config.init_from)
    distilled = setup.load_teacher(config)
    assert (distilled is not None) == config.distill.weights.active
    config = sizing.with_data(config, open_dataset(config.data, train=True))
    module = setup.build_module(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *example_input(config.data.buckets[0]))
    mine = {
        path: leaf.shape
        for path, leaf in tiny.flat(shapes).items()
        if not path.endswith(GRID_PARAMETERS) and path != "auxiliary_queries"
    }
    assert mine == {path: np.shape(leaf) for path, leaf in tiny.flat(teacher.variables).items()}
    assert ("auxiliary_queries" in tiny.flat(shapes)) == ("aqdetr" in config.name or "aux" in name)
    assert config.quant.quantized


@pytest.mark.parametrize(
    "text",
    [
        "shapes_teacher",
        "shapes_pretrain",
        "shapes_w4a4:lsq",
        "shapes_quickstart:baseline",
        "shapes_pretrain:deformable",
        "shapes_teacher:deformable",
        "shapes_quickstart:deformable-aqdetr",
        "configs/coco_deformable.py:r50-refine,w4a4 init_from=teacher",
        "configs/coco_deformable.py:r50-single,float",
        "configs/bccd.py:teacher",
        "configs/bccd.py:deformable-aqdetr",
        "configs/bccd.py:deformable-lite-teacher",
        "configs/deeppcb.py:lite-teacher",
        "configs/deeppcb.py:deformable-lsq",
        "configs/coco.py:r50,float",
        "configs/coco.py:r101-dc5,w4a4-attn8 init_from=teacher",
    ],
)
def test_shipped_configurations_resolve(text, tmp_path, capsys):
    """What is printed is a whole experiment whose model can be built."""
    name, *overrides = text.split()
    assert main(["config", f"--config={name}", *overrides]) == 0
    (tmp_path / "printed.json").write_text(capsys.readouterr().out)
    config = load_experiment(str(tmp_path / "printed.json"))
    config = sizing.with_devices(config, jax.devices()[0])
    model = dataclasses.replace(config.model, num_classes=config.model.num_classes or 3)
    module = setup.build_module(dataclasses.replace(config, model=model))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *example_input((64, 64)))
    assert any(path.startswith("backbone/") for path in tiny.flat(shapes))


@pytest.mark.parametrize("family", ["detr", "deformable"])
@pytest.mark.parametrize("kind", ["pretrain", "teacher", "aqdetr", "lsq"])
def test_the_configuration_for_any_folder(family, kind):
    """Whole once the data are known, with a model that can be built."""
    dataset = Sized([(480, 640)] * 40, side=100.0, boxes=12)
    config = sizing.with_data(load_experiment(f"custom:{family}-{kind}"), dataset)
    module = setup.build_module(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *example_input(config.data.buckets[0]))
    assert any(path.startswith("backbone/") for path in tiny.flat(shapes))
    assert config.data.max_boxes == 12
    assert config.model.num_queries == 30
    # 82.5 passes over 40 images in batches of 16; a step of Deformable DETR takes longer.
    passes = {"pretrain": 82.5, "teacher": 165.0}.get(kind, 66.0)
    short = 0.75 if family == "deformable" and kind != "pretrain" else 1.0
    assert config.train.steps == math.ceil(passes * short * 40 / 16)
