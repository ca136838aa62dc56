"""Boxes in another notation than their file's: fractions of the image, and corners."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aqdetr_jax.data.coco import CocoFolder, CocoParser
from aqdetr_jax.data.dataset import DatasetError, RecordDataset
from aqdetr_jax.data.notices import say_findings
from aqdetr_jax.data.shapes.dataset import ShapesDataset
from aqdetr_jax.data.suspicious import check_pixel_boxes, corner_boxes, normalised_boxes

WIDTH, HEIGHT = 64, 48


class Annotated(RecordDataset):
    """A set of annotations without images, one box an image."""

    def __init__(self, boxes, size=(WIDTH, HEIGHT)):
        content = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]}
                for i in range(len(boxes))
            ],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 1, "bbox": list(box)}
                for i, box in enumerate(boxes)
            ],
            "categories": [{"id": 1, "name": "cat"}],
        }
        parsed = CocoParser(content, "x.json")
        super().__init__(
            name="coco/x", class_names=("cat",), category_ids=(1,), records=parsed.records()
        )

    def _load_image(self, index):
        raise NotImplementedError


# (x1, y1, x2, y2) of objects as cameras see them: somewhere, a tenth of the image or more.
OBJECTS = st.tuples(
    st.floats(0, 0.85), st.floats(0, 0.85), st.floats(0.1, 0.5), st.floats(0.1, 0.5)
).map(lambda b: (b[0], b[1], min(b[0] + b[2], 1), min(b[1] + b[3], 1)))
SETS = st.lists(OBJECTS, min_size=20, max_size=30)
SCALE = np.array([WIDTH, HEIGHT, WIDTH, HEIGHT])


@settings(max_examples=60, deadline=None)
@given(SETS)
def test_each_notation_is_told(objects):
    corners = np.array(objects)
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    right = Annotated((xywh * SCALE).tolist())
    assert not normalised_boxes(right).offenders
    check_pixel_boxes(right)
    for fractions in (xywh, corners):
        found = normalised_boxes(Annotated(fractions.tolist()))
        assert len(found.offenders) == found.boxes == len(objects)
        with pytest.raises(DatasetError, match=r"coco/x: all \d+ boxes lie within \[0, 1\]"):
            check_pixel_boxes(Annotated(fractions.tolist()))


def test_corners_are_told_from_sizes():
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 0.7, (200, 2))
    size = rng.uniform(0.1, 0.3, (200, 2))
    as_sizes = Annotated((np.concatenate([low, size], 1) * SCALE).tolist())
    assert not corner_boxes(as_sizes).offenders
    wrong = np.concatenate([low, low + size], 1) * SCALE
    found = corner_boxes(Annotated(wrong.tolist()))
    reaches_out = (wrong[:, :2] + wrong[:, 2:] > [WIDTH * 1.02 + 1, HEIGHT * 1.02 + 1]).any(1)
    assert [index for index, _ in found.offenders] == np.flatnonzero(reaches_out).tolist()
    assert found.boxes == 200
    assert found.offenders[0][1].startswith(f"{found.offenders[0][0]}.png: box [")


def test_a_few_boxes_over_the_border_are_none_of_them():
    boxes = [[5, 5, 20, 10]] * 4 + [[10, 10, 60, 45]]
    assert not corner_boxes(Annotated(boxes)).offenders
    assert not corner_boxes(Annotated([])).offenders


def test_small_images_and_single_boxes_are_no_reason_to_refuse():
    check_pixel_boxes(Annotated([[0, 0, 1, 1]], size=(4, 4)))
    mixed = Annotated([[0, 0, 1, 1], [3, 3, 20, 20]])
    check_pixel_boxes(mixed)
    assert [text for _, text in normalised_boxes(mixed).offenders] == [
        "0.png: box [0, 0, 1, 1] on 64x48 pixels"
    ]
    check_pixel_boxes(Annotated([]))
    check_pixel_boxes(ShapesDataset("train", num_images=2))


def test_they_are_said(tmp_path, capsys):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": [30, 20, 59 + i, 40]}
            for i in range(1, 4)
        ]
        + [{"id": 9, "image_id": 1, "category_id": 1, "bbox": [0.1, 0.1, 0.5, 0.5]}],
        "categories": [
            {"id": 0, "name": "all", "supercategory": "none"},
            {"id": 1, "name": "cat", "supercategory": "all"},
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    say_findings(CocoFolder(tmp_path, tmp_path / "a.json", split="some"))
    said = capsys.readouterr()
    lines = (said.out + said.err).splitlines()
    assert len(lines) == 3
    assert "coco/some: category 0 ('all') is left out" in lines[0]
    assert "1 of 4 boxes look normalised" in lines[1]
    assert "3 of 4 boxes look like corners" in lines[2]
    assert "a.png: box [30, 20, 60, 40] on 64x48 pixels" in lines[2]
