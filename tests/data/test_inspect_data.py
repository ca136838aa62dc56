"""The inspection report on a folder with every fault in it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from aqdetr_jax.data.coco import CocoFolder
from aqdetr_jax.data.inspect import format_report, inspect_dataset
from aqdetr_jax.data.shapes.dataset import ShapesDataset
from aqdetr_jax.data.voc import VocFolder


@pytest.fixture
def faulty(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()

    def save(name, size=(60, 40), **kwargs):
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(
            folder / name, **kwargs
        )

    save("good.png")
    shutil.copy(folder / "good.png", folder / "copy.png")
    save("other_size.png", (61, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    save("turned.jpg", (40, 60), exif=exif)
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:900])
    names = ["good.png", "copy.png", "other_size.png", "turned.jpg", "cut.png", "gone.png"]
    boxes = [(1, [1, 1, 5, 5]), (1, [1, 1, 5, 5.1]), (1, [2, 2, 50, 36]), (2, [1, 1, 0, 5])]
    content = {
        "images": [
            {"id": i, "file_name": n, "height": 40, "width": 60} for i, n in enumerate(names)
        ],
        "annotations": [
            {"id": k, "image_id": 0, "category_id": c, "bbox": b}
            for k, (c, b) in enumerate(boxes, start=10)
        ]
        + [{"id": 30, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    return CocoFolder(folder, path, split="x")


def test_every_fault_is_found(faulty):
    seen = []
    report = inspect_dataset(
        faulty, num_queries=2, other=faulty, progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(i, 12) for i in range(1, 13)]  # unreadable images are counted too
    json.dumps(report)
    assert (report["images"], report["boxes"], report["crowd_boxes"]) == (6, 3, 1)
    assert report["empty_images"] == 5
    assert report["classes"] == {"cat": 3, "dog": 0}
    assert report["areas"] == {"small": 2, "medium": 1, "large": 0}
    assert report["boxes_per_image"] == {"min": 0, "median": 0.0, "mean": 0.5, "max": 3}
    first = {
        "dropped": "zero_area: good.png, annotation 13: box (1, 1, 1, 6)",
        "over_queries": "good.png: 3 boxes",
        "classes_without_boxes": "dog",
        "twin_boxes": "good.png: boxes [1.0, 1.0, 5.0, 5.0] and [1.0, 1.0, 5.0, 5.1]",
        "size_mismatch": "other_size.png: 61x40 pixels, annotated as 60x40",
        "exif_rotated": "turned.jpg: EXIF orientation 6",
        "duplicates": "copy.png is the same as good.png",
    }
    for key, text in first.items():
        assert report[key] == {"count": 1, "first": [text]}, key
    assert report["unreadable"]["count"] == 2
    assert report["modes"] == {"RGB": 5}
    assert "cut.png" in report["unreadable"]["first"][0]
    assert "gone.png" in report["unreadable"]["first"][1]
    assert report["normalised"]["count"] == report["corners"]["count"] == 0
    # The worst of each kind first, and each image once, with all of its problems.
    problems = dict(report["problem_images"])
    assert list(problems)[:3] == [4, 2, 3]
    assert set(problems) == set(range(6))
    assert problems[5] == ["unreadable images"]
    assert problems[0] == [
        "images with more boxes than queries",
        "doubled boxes (same class, IoU > 0.9)",
        "images shared with the other split",
    ]
    assert report["leakage"]["count"] == 4  # All that can be read, the copy included.
    table = format_report(report)
    assert all(text in table for text in first.values())
    assert "! unreadable images: 2" in table
    assert "... and" not in table


def test_a_file_that_two_entries_name_is_one_unreadable_image(faulty, tmp_path):
    content = json.loads(faulty.annotation_file.read_text())
    content["images"].append({"id": 99, "file_name": "cut.png", "height": 40, "width": 60})
    (tmp_path / "twice.json").write_text(json.dumps(content))
    report = inspect_dataset(CocoFolder(faulty.images_dir, tmp_path / "twice.json"))
    assert report["images"] == 7
    assert report["unreadable"]["count"] == 2


@pytest.mark.parametrize(
    ("box", "key", "line"),
    [
        ([0.1, 0.2, 0.3, 0.4], "normalised", "! boxes that look normalised (within [0, 1]): 2"),
        ([30, 20, 58, 39], "corners", "! boxes that look like corners (x1, y1, x2, y2): 2"),
    ],
)
def test_other_notations_are_named(faulty, tmp_path, box, key, line):
    content = json.loads(faulty.annotation_file.read_text())
    content["annotations"] = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": box} for i in range(2)
    ]
    content["categories"].append({"id": 0, "name": "root"})
    for category in content["categories"][:2]:
        category["supercategory"] = "root"
    (tmp_path / "other.json").write_text(json.dumps(content))
    report = inspect_dataset(
        CocoFolder(faulty.images_dir, tmp_path / "other.json"), check_images=False
    )
    numbers = ", ".join(f"{value:g}" for value in box)
    assert report[key]["first"][0] == f"good.png: box [{numbers}] on 60x40 pixels"
    assert [index for index, _ in report["problem_images"]] == [0, 1]
    table = format_report(report)
    assert line in table
    assert "category 0 ('root') is left out" in table


def test_annotations_alone_need_no_image(faulty):
    shutil.rmtree(faulty.images_dir)
    report = inspect_dataset(faulty, check_images=False)
    assert report["unreadable"]["count"] == 0
    assert "not checked" in format_report(report)


def test_generated_set_is_clean():
    report = inspect_dataset(ShapesDataset("train", num_images=60), num_queries=100)
    table = format_report(report)
    assert table.endswith("no problems found")
    assert "object queries" in table


def test_bccd(bccd_root):
    report = inspect_dataset(VocFolder(bccd_root, "val"), num_queries=25, check_images=False)
    assert report["dropped"]["count"] == 1
    assert report["over_queries"]["first"] == ["BloodImage_00037.jpg: 30 boxes"]
    assert report["twin_boxes"]["count"] >= 1
    assert report["boxes_per_image"]["max"] == 30
