"""What the package ships: the float teachers, and the configurations that are built on them."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import aqdetr_jax
from aqdetr_jax.checkpoint.model_folder import PACKAGED, load_model
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
