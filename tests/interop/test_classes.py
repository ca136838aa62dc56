"""Names for the classes of a checkpoint that has none, and what they are good for."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tiny
from foreign import fixture, torch_file, write_folder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from aqdetr_jax.checkpoint.model_folder import load_model
from aqdetr_jax.cli import main
from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.interop import labels
from aqdetr_jax.interop.convert import convert
from aqdetr_jax.io import read_json

SETS = ("train", "eval")
NAMES = ("red cell", "白血球", "platelet", "debris", "bubble")


def coco(names=NAMES, first: int = 1, **more) -> dict:
    """A COCO annotation file; the categories are not in the order of their ids."""
    categories = [{"id": first + n, "name": name} for n, name in enumerate(names)]
    return {"images": [], "annotations": [], "categories": categories[::-1], **more}


def write(path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.txt", "\n".join(NAMES)),
        ("names", "\ufeff" + "\r\n".join(NAMES) + "\r\n\r\n"),
        ("classes.json", list(NAMES)),
        ("with,comma.json", list(NAMES)),
        ("zero.json", coco(first=0)),
    ],
)
def test_files_of_one_name_for_each_output(tmp_path, name, content):
    assert labels.given(write(tmp_path / name, content), 5) == (NAMES, (0, 1, 2, 3, 4))


def test_names_on_the_command_line():
    assert labels.given(" red cell,白血球 ,platelet,debris,bubble", 5)[0] == NAMES
    assert labels.given("cell", 1) == (("cell",), (0,))
    # Longer than the name of any file may be, with a name that looks like one, and unused outputs.
    many = [f"class {n} of a set with long names.txt" for n in range(100)] + ["N/A", "N/A"]
    assert labels.given(",".join(many), 102)[0] == tuple(many)


def test_cocos_ids_are_numbers_of_outputs(tmp_path):
    """As the official code trains: a head has an output more than the largest id, or many more."""
    file = write(tmp_path / "a.json", coco())
    assert labels.given(file, 6) == (("N/A", *NAMES), tuple(range(6)))
    assert labels.given(file, 91)[0] == ("N/A", *NAMES, *["N/A"] * 85)


def test_cocos_categories_in_order_where_ids_are_too_large(tmp_path):
    """As other libraries train: as many outputs as categories."""
    file = write(tmp_path / "a.json", coco(first=7))
    assert labels.given(file, 5) == (NAMES, (7, 8, 9, 10, 11))


@given(st.lists(st.integers(0, 40), min_size=1, unique=True), st.integers(1, 50))
def test_every_category_has_one_output_or_there_is_an_error(tmp_path_factory, ids, outputs):
    folder = tmp_path_factory.getbasetemp()
    content = coco() | {"categories": [{"id": n, "name": f"name {n}"} for n in ids]}
    file = write(folder / "drawn.json", content)
    if max(ids) >= outputs and len(ids) != outputs:
        with pytest.raises(ValueError, match=f"{len(ids)} names .*has {outputs} outputs"):
            labels.given(file, outputs)
        return
    names, numbers = labels.given(file, outputs)
    assert len(names) == len(numbers) == outputs
    assert [name for name in names if name != "N/A"] == [f"name {n}" for n in sorted(ids)]
    where = {name: number for name, number in zip(names, numbers, strict=True) if name != "N/A"}
    assert where == {f"name {n}": n for n in ids}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a\nb\n", "has 2 names, but the class head has 5 outputs"),
        ("a\n\nc\nd\ne", "line 2: a class's name is empty"),
        ("a\nb\nb\nc\nd", "the name 'b' is there twice"),
        ("", "line 1: a class's name is empty"),
    ],
)
def test_other_lists_are_refused(tmp_path, content, reason):
    with pytest.raises(ValueError, match=reason):
        labels.given(write(tmp_path / "a.txt", content), 5)


def test_other_files_are_refused(tmp_path):
    for content, reason in (
        (["a", 3, "c", "d", "e"], "name 2: a class's name is text, not int"),
        (["a\tb"], "control character"),
        (3, "neither a list of names nor"),
        (coco(first=90), r"has 5 names with ids 90 to 94, but the class head has 6 outputs"),
    ):
        with pytest.raises(ValueError, match=reason):
            labels.given(write(tmp_path / "a.json", content), 6)
    (tmp_path / "latin.txt").write_bytes("böse".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt: is no UTF-8 text"):
        labels.given(str(tmp_path / "latin.txt"), 6)
    for missing in ("nothing.txt", "other/a.json", "some/names", str(tmp_path / "n.names")):
        with pytest.raises(FileNotFoundError, match="no such file"):
            labels.given(missing, 6)


# --- conversion -----------------------------------------------------------------------------------


def test_names_replace_placeholders_and_those_of_the_source(tmp_path):
    source = write_folder(tmp_path / "theirs", "detr_basic")
    given_names = "a,b,c,d,e"
    made = convert(source, tmp_path / "out", classes=given_names)
    assert load_model(tmp_path / "out").class_names == ("a", "b", "c", "d", "e")
    assert not any("names" in note for note in made.notes)
    new = convert(source, tmp_path / "new", classes="a,b", num_classes=2)
    assert new.bundle.class_names == ("a", "b")
    assert "the class head is new, for 2 classes" in new.notes
    with pytest.raises(ValueError, match=r"--classes=a,b has 2 names, but .* has 5 outputs"):
        convert(source, tmp_path / "never", classes="a,b")
    assert not (tmp_path / "never").exists()


@pytest.mark.usefixtures("quick_compile")
def test_own_checkpoint_is_evaluated_on_own_data(tmp_path, capsys):
    """From a file without names, wrapped, to COCO numbers: transformers' own best box is found."""
    recorded = fixture("detr_basic")
    wrapped = {f"module.{name}": array for name, array in recorded["state"].items()}
    (tmp_path / "tuned.pth").write_bytes(torch_file(wrapped, {"nheads": 4, "dilation": False}))
    # The first recorded picture fills its bucket; its truth is the detection with the best score.
    image = recorded["input"]["images"][0]
    height, width = image.shape[:2]
    logits, boxes = (recorded["output"][key][-1, 0].astype(float) for key in ("logits", "boxes"))
    odds = np.exp(logits)
    scores = odds[:, :-1] / odds.sum(-1, keepdims=True)
    query, label = np.unravel_index(scores.argmax(), scores.shape)
    assert scores[query].argmax() == label
    cx, cy, w, h = boxes[query] * [width, height, width, height]
    x1, y1 = max(cx - w / 2, 0), max(cy - h / 2, 0)
    x2, y2 = min(cx + w / 2, width), min(cy + h / 2, height)
    truth = {
        "images": [{"id": 5, "file_name": "a.png", "height": height, "width": width}],
        "annotations": [
            {
                "id": 1,
                "image_id": 5,
                "category_id": int(label) + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
        ],
    }
    (tmp_path / "images").mkdir()
    Image.fromarray(image).save(tmp_path / "images" / "a.png")
    annotations = write(tmp_path / "mine.json", coco(**truth))
    model = str(tmp_path / "model")
    command = ["convert", str(tmp_path / "tuned.pth"), f"--to={model}", f"--classes={annotations}"]
    assert main(command) == 0
    assert "note: taken off the names: 'module.'" in capsys.readouterr().out
    files = {"images": str(tmp_path / "images"), "annotations": annotations}
    data = DataConfig("coco", **{f"{s}_{key}": f for key, f in files.items() for s in SETS})
    file = tiny.write_config(dataclasses.replace(tiny.FLOAT, data=data), tmp_path / "config.json")
    command = ["eval", f"--config={file}", f"data.eval_buckets=(({height},{width}),)"]
    assert main([*command, f"--model={model}", f"--out={tmp_path / 'out'}"]) == 0
    block = read_json(tmp_path / "out" / "results.json")
    assert block["AP"] == pytest.approx(1.0)
    found = read_json(tmp_path / "out" / "detections.json")
    best = max(found, key=lambda detection: detection["score"])
    assert best["category_id"] == label + 1
    assert best["score"] == pytest.approx(scores[query, label], rel=1e-4)
    np.testing.assert_allclose(best["bbox"], truth["annotations"][0]["bbox"], atol=1e-2)

    capsys.readouterr()
    assert main(["convert", str(tmp_path / "tuned.pth"), f"--to={model}"]) == 0
    assert main([*command, f"--model={model}"]) == 1
    assert "no names: aqdetr convert --classes=FILE gives them" in capsys.readouterr().err
