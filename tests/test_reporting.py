"""What the report's pictures are made of: the right boxes under the right titles."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from PIL import Image

from aqdetr_jax import reporting
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.evaluation.coco import METRIC_NAMES, results_block
from aqdetr_jax.losses.criterion import LossWeights
from aqdetr_jax.models.config import DeformableConfig
from aqdetr_jax.models.deformable_attention import DeformableMaps
from aqdetr_jax.ops.deformable import attention_map


@pytest.fixture(scope="module")
def dataset():
    return open_dataset(tiny.FLOAT.data, train=False)


def as_results(dataset, shift: float = 0.0) -> list[dict]:
    """The ground truth as a model's detections in COCO's form (x, y, w, h)."""
    return [
        {
            "image_id": row["image_id"],
            "category_id": row["category_id"],
            "bbox": [row["bbox"][0] + shift, *row["bbox"][1:]],
            "score": 0.75,
        }
        for row in dataset.coco_ground_truth()["annotations"]
    ]


def test_detections_equal_to_the_truth_are_drawn_on_it(dataset, monkeypatch):
    drawn = []
    monkeypatch.setattr(reporting, "detection_grid", lambda rows, *_, **__: drawn.extend(rows))
    models = {"teacher": as_results(dataset), "student": as_results(dataset, shift=3.0)}
    reporting.detection_picture(dataset, models, 2)
    assert len(drawn) == 2
    for _, panels in drawn:
        assert [panel[0] for panel in panels] == ["ground truth", "teacher", "student"]
        (_, truth, labels, no_scores), teacher, student = panels
        assert len(truth) > 0
        assert no_scores is None
        np.testing.assert_allclose(teacher[1], truth, atol=1e-3)
        np.testing.assert_allclose(student[1], np.add(truth, [3, 0, 3, 0]), atol=1e-3)
        for _, _, found, scores in (teacher, student):
            np.testing.assert_array_equal(found, labels)
            np.testing.assert_array_equal(scores, 0.75)


def test_attention_maps_stand_under_their_own_titles(dataset, monkeypatch):
    calls = []
    monkeypatch.setattr(
        reporting, "attention_grid", lambda image, *maps, titles, **_: calls.append((maps, titles))
    )
    teacher = tiny.bundle(seed=0)
    student = dataclasses.replace(tiny.bundle(seed=1), info={})
    pictures = reporting.attention_pictures(dataset, teacher, student, 1, ("float", "4-bit"))
    assert len(pictures) == 1
    ((teacher_map, student_map), titles) = calls[0]
    assert titles == ("float", "4-bit")
    with_objects = next(i for i in range(len(dataset)) if len(dataset[i].boxes))
    assert dataset.file_name(with_objects) in pictures[0]["title"]
    image = dataset[with_objects].image[None]
    for bundle, found in ((teacher, teacher_map), (student, student_map)):
        output = bundle.module().apply(bundle.variables, image, np.ones(image.shape[:3], bool))
        wanted = output.encoder_attention[-1].probabilities[0]
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(teacher_map - student_map).max() > 1e-4


# --- deformable attention ---

HEADS, POINTS, SHAPES = 2, 3, ((4, 6), (2, 3))


def output(seed, queries=5, **more):
    """What the pictures read of a deformable model's output, of one image."""
    rng = np.random.default_rng(seed)

    def maps(count):
        locations = rng.uniform(-0.1, 1.1, (1, count, HEADS, 2, POINTS, 2)).astype("f4")
        weights = rng.dirichlet(np.ones(2 * POINTS), (1, HEADS, count)).astype("f4")
        sizes = np.array([(w, h) for h, w in SHAPES], "f4")
        return DeformableMaps(np.log(weights), weights, locations, sizes, np.zeros((1, count, 4)))

    boxes = rng.uniform(0.2, 0.4, (1, 1, queries, 4)).astype("f4")
    values = {
        "encoder_attention": (maps(24 + 6),),
        "decoder_cross_attention": (maps(queries),),
        "logits": rng.normal(size=(1, 1, queries, 3)).astype("f4"),
        "boxes": boxes,
        "proposal_boxes": None,
    }
    return SimpleNamespace(**values | more)


def test_encoder_pictures_of_deformable_models_are_their_induced_maps(monkeypatch):
    calls = []
    monkeypatch.setattr(
        reporting, "attention_rows", lambda image, *given, **options: calls.append((given, options))
    )
    outputs = [output(0), output(1)]
    reporting._deformable_picture(np.zeros((8, 9, 3)), outputs, (1.0, 0.75), ("a", "b"))
    (((first, second, chosen), options),) = calls
    assert options == {"grid_size": (4, 6), "real": (1.0, 0.75), "titles": ("a", "b")}
    assert len(chosen) > 1
    # No position in the padding: 0.75 of six columns are five.
    assert all(row < 4 and column < 5 for row, column in chosen)
    for found, one in ((first, outputs[0]), (second, outputs[1])):
        (maps,) = one.encoder_attention
        for number, (row, column) in enumerate(chosen):
            token = 6 * row + column
            weights = maps.probabilities[0, :, token].reshape(HEADS, 2, POINTS)
            wanted = sum(
                attention_map(maps.locations[0, token, :, level], weights[:, level], (4, 6))
                for level in range(2)
            )
            np.testing.assert_allclose(
                found[:, number], np.asarray(wanted).reshape(HEADS, 24), atol=1e-6
            )
    # The teacher's most focused position comes first.
    weights = outputs[0].encoder_attention[0].probabilities[0, :, :24]
    entropy = -(weights * np.log(weights)).sum(-1).mean(0).reshape(4, 6)[:, :5]
    assert chosen[0] == np.unravel_index(entropy.argmin(), entropy.shape)


@pytest.mark.parametrize("two_stage", [False, True])
def test_sampling_pictures_show_the_same_query_of_both_models(monkeypatch, two_stage):
    """Of learned queries the same number; of proposals the one with the same box."""
    calls = []
    monkeypatch.setattr(
        reporting, "sampling_grid", lambda image, rows, **options: calls.append((rows, options))
    )
    order = np.array([3, 0, 4, 1, 2])
    student = output(2, proposal_boxes=np.zeros(0) if two_stage else None)
    teacher = output(3, proposal_boxes=student.proposal_boxes)
    if two_stage:
        teacher.boxes = student.boxes[:, :, order] + 0.01
    reporting._sampling_picture(
        np.zeros((4, 4, 3)), [teacher, student], (1.0, 0.5), ("x", "y", "z"), ("a", "b"), count=2
    )
    ((rows, options),) = calls
    best = np.argsort(-student.logits[0, 0].max(-1))[:2]
    for query, (left, right), label in zip(best, rows, options["labels"], strict=True):
        other = int(np.flatnonzero(order == query)[0]) if two_stage else query
        for samples, one, index in ((left, teacher, other), (right, student, query)):
            (maps,) = one.decoder_cross_attention
            # Half of the padded width is image.
            np.testing.assert_allclose(samples.locations, maps.locations[0, index] * [2, 1])
            np.testing.assert_array_equal(
                samples.weights.reshape(HEADS, -1), maps.probabilities[0, :, index]
            )
            np.testing.assert_array_equal(samples.box, one.boxes[0, 0, index])
        assert label.startswith("xyz"[student.logits[0, 0, query].argmax()])


@pytest.mark.usefixtures("quick_compile")
def test_deformable_models_have_both_pictures_in_the_report(dataset, tmp_path):
    model = dataclasses.replace(
        tiny.MODEL,
        family="deformable",
        decoder_layers=1,
        deformable=DeformableConfig(
            levels=2, stages=2, points=2, norm_groups=8, box_refine=True, two_stage=True
        ),
    )
    config = dataclasses.replace(tiny.FLOAT, model=model, loss=LossWeights(cls=2.0, kind="focal"))
    bundle = tiny.bundle(config)
    bundle = dataclasses.replace(bundle, variables=tiny.random_like(bundle.variables))
    path = reporting.write_run_report(
        tmp_path,
        title="both",
        summary=[],
        blocks={},
        curves={},
        detections={},
        dataset=dataset,
        pictures=1,
        teacher=bundle,
        student=bundle,
    )
    text = path.read_text()
    assert "encoder self-attention, " in text
    assert "decoder sampling points, " in text
    for number in range(2):
        with Image.open(tmp_path / "pictures" / f"attention_{number}.png") as picture:
            assert np.ptp(np.asarray(picture)) > 100


# --- a report never fails a run ------------------------------------------------------------------


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken(*arguments, **options):
    raise RuntimeError("Pillow or matplotlib\nhas a bad day")


@pytest.fixture
def write(dataset, tmp_path):
    """Writes the report of one run with every part that needs no second model."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": s, "loss": 1.0 / s}) + "\n" for s in (1, 2, 3)))
    numbers = dict.fromkeys(METRIC_NAMES, 0.5)
    block = results_block(
        numbers | {"per_class": {}}, images=6, config="x", seed=0, commit="c", seconds=1.0
    )
    bits = tmp_path / "bits.json"
    bits.write_text(json.dumps({"rows": []}))
    return lambda: reporting.write_run_report(
        tmp_path,
        title="run",
        summary=["all of it"],
        blocks={"student": block},
        curves={"run": metrics},
        detections={"student": as_results(dataset)},
        dataset=dataset,
        pictures=1,
        bits=bits,
    )


def test_nothing_is_said_of_a_report_that_works(write, tmp_path, capsys):
    assert write() == tmp_path / "report.html"
    assert capsys.readouterr().err == ""
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {"curves.png", "detections.png"}


@pytest.mark.parametrize("fault", [full, broken])
@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("reporting.detection_grid", "the picture of detections"),
        ("reporting.save_png", "the picture of detections"),
        ("reporting.training_curves", "the picture of the training curves"),
        ("reporting.save_figure", "the picture of the training curves"),
        ("reporting.read_json", "the table of bits"),
    ],
)
def test_a_part_that_fails_is_one_line_and_a_note(write, monkeypatch, capsys, fault, part, what):
    monkeypatch.setattr(f"aqdetr_jax.{part}", fault)
    path = write()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"aqdetr: {what} could not be made (")
    reason = os.strerror(errno.ENOSPC) if fault is full else "has a bad day"
    assert reason in line
    assert f"{what} could not be made" in path.read_text()


@pytest.mark.parametrize("fault", [full, broken])
@pytest.mark.parametrize(
    "part", ["reporting.write_report", "io.tempfile.mkstemp", "viz.report.render_report"]
)
def test_a_report_that_fails_is_a_line(write, tmp_path, monkeypatch, capsys, fault, part):
    with monkeypatch.context() as patch:
        patch.setattr(f"aqdetr_jax.{part}", fault)
        assert write() is None
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("aqdetr: the report could not be made (")
    assert not (tmp_path / "report.html").exists()
    if "tempfile" in part:  # nothing at all can be written: a line each, and nothing half-written
        assert len(lines) == 3
        assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "bits.json", "pictures"}
        assert not any((tmp_path / "pictures").iterdir())


def test_ctrl_c_stops_a_report(write, monkeypatch):
    def pressed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(reporting, "detection_grid", pressed)
    with pytest.raises(KeyboardInterrupt):
        write()


def test_names_that_no_font_can_draw_are_in_the_report(dataset, write, monkeypatch, capsys):
    monkeypatch.setattr("aqdetr_jax.viz.fonts._system_fonts", lambda: ())
    names = ("\u732b", "a\nb", *dataset.class_names[2:])
    monkeypatch.setattr(dataset, "class_names", names)
    text = write().read_text()
    assert "in pictures they are numbers: class 0 = \u732b, class 1 = a\nb" in text
    assert capsys.readouterr().err == ""
