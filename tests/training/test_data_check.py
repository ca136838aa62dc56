"""What of its data stops a run, and that the run and the inspection say the same."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import tiny
from PIL import Image

from aqdetr_jax.data.coco import CocoFolder
from aqdetr_jax.data.dataset import DatasetError
from aqdetr_jax.data.inspect import inspect_dataset
from aqdetr_jax.data.yolo import YoloFolder
from aqdetr_jax.training.data_check import check_data, reasons_to_stop


def make(root, split, *, boxes=((8, 8, 20, 20),), names=("a", "b"), images=2):
    """A COCO folder of grey images, the first with boxes."""
    root.mkdir(exist_ok=True)
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 32, "height": 32} for i in range(images)
        ],
        "annotations": [
            {"id": k, "image_id": 0, "category_id": 1, "bbox": list(box)}
            for k, box in enumerate(boxes)
            if images
        ],
        "categories": [{"id": i, "name": n} for i, n in enumerate(names, 1)],
    }
    for i in range(images):
        Image.fromarray(np.full((32, 32, 3), 40 * i, np.uint8)).save(root / f"{i}.png")
    (root / f"{split}.json").write_text(json.dumps(content))
    return CocoFolder(root, root / f"{split}.json", split=split)


def experiment(num_classes=0, **data):
    model = dataclasses.replace(tiny.MODEL, num_classes=num_classes)
    config = dataclasses.replace(tiny.FLOAT, model=model)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


@pytest.mark.parametrize(
    ("train", "evaluation", "config", "reasons"),
    [
        ({}, {}, {}, []),
        ({"images": 0}, {}, {}, ["coco/train: the dataset has no images"]),
        ({}, {"images": 0}, {}, ["coco/val: the dataset has no images"]),
        ({"boxes": [(1, 1, 9, 9)] * 13}, {}, {}, ["coco/train: .* --config.data.max_boxes=13"]),
        ({"boxes": [(1, 1, 9, 9)] * 13}, {}, {"max_boxes": 13}, []),
        ({"boxes": [(1, 1, 9, 9)] * 13}, {}, {"allow_truncation": True}, []),
        ({}, {"boxes": [(1, 1, 9, 9)] * 13}, {}, []),
        ({}, {"names": ("a", "c")}, {}, ["coco/train has 2 classes .* differ"]),
        ({"boxes": [(1, 1, 9, 9)] * 13}, {}, {"max_boxes": 0}, []),
        ({"images": 0}, {}, {"fit": 64}, ["coco/train: the dataset has no images"]),
        ({}, {}, {"num_classes": 1, "max_boxes": 0}, ["config.model.num_classes is 1"]),
        ({}, {}, {"num_classes": 1}, ["has 2 classes, but config.model.num_classes is 1"]),
        ({}, {"boxes": ()}, {}, []),  # nothing to find is no obstacle
        ({"boxes": ()}, {}, {}, [r"coco/train: not one box .* 2 images; looked in .*train\.json$"]),
        ({"boxes": ()}, {}, {"max_boxes": 0, "fit": 64}, ["coco/train: not one box"]),
        (
            {"boxes": [(1, 1, 0, 9), (1, 1, 9, -9)]},
            {},
            {},
            [r"not one box .*; left out: 1 zero_area, 1 negative \(first: zero_area: 0\.png"],
        ),
        ({"boxes": [(0.1, 0.1, 0.2, 0.3)]}, {}, {}, ["coco/train: all 1 boxes lie within"]),
        (
            {"boxes": [(0.1, 0.1, 0.2, 0.3)] * 13},
            {"names": ("a",), "boxes": [(0, 0, 0.2, 0.3)]},
            {},
            ["max_boxes=13", "differ", "coco/train: all 13 boxes", "coco/val: all 1 boxes"],
        ),
    ],
)
def test_reasons(tmp_path, train, evaluation, config, reasons):
    sets = make(tmp_path / "t", "train", **train), make(tmp_path / "e", "val", **evaluation)
    config = experiment(**config)
    found = reasons_to_stop(config, *sets)
    assert len(found) == len(reasons)
    for reason, pattern in zip(found, reasons, strict=True):
        assert re.search(pattern, reason)
    if not reasons:
        resolved = check_data(config, *sets)
        assert resolved.model.num_classes == 2
        return
    with pytest.raises(ValueError, match=reasons[0]):
        check_data(config, *sets)


def test_images_that_cannot_be_read(tmp_path):
    sets = make(tmp_path / "t", "train"), make(tmp_path / "e", "val")
    (tmp_path / "t" / "1.png").write_bytes(b"no image")
    Image.new("RGB", (33, 32)).save(tmp_path / "e" / "0.png")
    reports = [inspect_dataset(dataset) for dataset in sets]
    unreadable, size = reasons_to_stop(experiment(), *sets, reports)
    assert unreadable.startswith("coco/train: unreadable images: 1 (first: ")
    assert "1.png" in unreadable
    assert size.startswith("coco/val: images of another size: 1 (first: 0.png: 33x32 pixels")
    assert "--config.data.on_error=skip" in size
    assert reasons_to_stop(experiment(on_error="skip"), *sets, reports) == []
    (tmp_path / "t" / "0.png").unlink()
    reports = [inspect_dataset(dataset) for dataset in sets]
    assert reasons_to_stop(experiment(on_error="skip"), *sets, reports) == [
        "coco/train: none of its images can be used"
    ]


def yolo(root, labels):
    """A YOLO folder of two images, with their labels in a folder of some name."""
    (root / "images").mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (32, 32)).save(root / "images" / f"{name}.png")
        (root / labels).mkdir(exist_ok=True)
        (root / labels / f"{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text("train: images\nval: images\nnames: [cat]\n")
    return YoloFolder(root)


def test_labels_that_lie_elsewhere(tmp_path):
    """Nobody trains on pictures without a single box by mistake: most often they lie elsewhere."""
    found, lost = yolo(tmp_path / "y", "labels"), yolo(tmp_path / "z", "annotations")
    assert reasons_to_stop(experiment(), found, lost) == []
    wanted = tmp_path / "z" / "labels" / "a.txt"
    assert reasons_to_stop(experiment(), lost, found) == [
        f"yolo/train: not one box to train on in 2 images; looked in {wanted}, which does not exist"
    ]


def test_crowds_are_no_boxes_to_train_on(tmp_path):
    make(tmp_path / "t", "train")
    file = tmp_path / "t" / "train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["iscrowd"] = 1
    file.write_text(json.dumps(content))
    dataset = CocoFolder(tmp_path / "t", file)
    with pytest.raises(DatasetError, match=r"not one box .*; 1 are crowds or difficult"):
        check_data(experiment(), dataset, dataset)


def test_judged_on_what_was_trained_is_said_once(tmp_path, capsys):
    first, second = yolo(tmp_path / "y", "labels"), YoloFolder(tmp_path / "y", "val")
    for _ in range(2):
        check_data(experiment(), first, second)
    said = capsys.readouterr().out
    assert said.count("trained and judged on the same images: 2 of the 2 of yolo/val are in") == 1
    sets = make(tmp_path / "t", "train"), make(tmp_path / "e", "val")  # the same names elsewhere
    check_data(experiment(), *sets)
    assert "judged" not in capsys.readouterr().out
