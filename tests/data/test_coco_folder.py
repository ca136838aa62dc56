"""COCO folders: what is accepted, what is dropped, and errors that name the offender."""

import copy
import json
import os
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from aqdetr_jax.data.coco import CocoFolder
from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.dataset import DatasetError, ImageReadError
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.data.pipeline import PipelineConfig, make_train_pipeline

CONTENT = {
    "images": [
        {"id": 7, "file_name": "a.png", "height": 40, "width": 60},
        {"id": 9, "file_name": "b.png", "height": 30, "width": 30},
        {"id": 3, "file_name": "sub/c.png", "height": 40, "width": 60},
    ],
    "annotations": [
        {"id": 0, "image_id": 7, "category_id": 90, "bbox": [5, 6, 10, 12], "area": 77.5},
        {"id": 1, "image_id": 7, "category_id": 2, "bbox": [50, 30, 30, 30], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 20, 20], "iscrowd": 1},
        {"id": 918, "image_id": 3, "category_id": 2, "bbox": [5, 6, 10, 0]},
        {"id": 919, "image_id": 3, "category_id": 2, "bbox": [5, 6, -4, 3]},
        {"id": 920, "image_id": 3, "category_id": 2, "bbox": [70, 6, 4, 3]},
        {"id": 921, "image_id": 3, "category_id": 90, "bbox": [1, 2, 3, 4]},
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 2, "name": "bicycle"}],
}


def write(root, content, raw=None):
    images = root / "images"
    (images / "sub").mkdir(parents=True, exist_ok=True)
    for name, size in (("a.png", (60, 40)), ("b.png", (30, 30)), ("sub/c.png", (60, 40))):
        Image.new("RGB", size, (9, 8, 7)).save(images / name)
    path = root / "instances.json"
    path.write_text(json.dumps(content) if raw is None else raw)
    return images, path


@pytest.fixture
def folder(tmp_path):
    return CocoFolder(*write(tmp_path, CONTENT))


def changed(path, value):
    """CONTENT with one entry replaced; ``path`` is a list of keys."""
    content = copy.deepcopy(CONTENT)
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content


def test_reading(folder):
    assert len(folder) == 3
    assert folder.class_names == ("bicycle", "toothbrush")
    assert folder.category_ids == (2, 90)  # Gaps: labels are contiguous, ids are kept.
    example = folder[0]
    assert example.boxes.tolist() == [[5, 6, 15, 18], [50, 30, 60, 40], [0, 0, 20, 20]]
    assert example.labels.tolist() == [1, 0, 0]
    assert example.iscrowd.tolist() == [False, False, True]
    assert (example.image_id, example.file_name) == (7, "a.png")
    assert example.image.shape == (40, 60, 3)
    assert folder[1].boxes.shape == (0, 4)  # Images without boxes are kept.
    assert folder.image_size(1) == (30, 30)
    assert folder.max_boxes_per_image() == 2
    assert folder.clipped == 1
    batch = next(make_train_pipeline(folder, PipelineConfig(3, ((64, 64),), num_threads=0)))
    assert batch["valid"].sum() == 3


def test_dropped_boxes_are_counted_and_named(folder):
    assert folder.drops == {"zero_area": 1, "negative": 1, "outside": 1}
    assert folder.drop_examples[0] == "zero_area: sub/c.png, annotation 918: box (5, 6, 15, 6)"
    assert folder[2].boxes.tolist() == [[1, 2, 4, 6]]


@pytest.mark.parametrize(
    "number", ["1e999", "9" * 400, "-" + "9" * 400, "9" * 5000, "-1e39", "9" * 299]
)
@pytest.mark.parametrize("place", range(4))
def test_numbers_that_no_box_can_have_are_dropped(tmp_path, number, place):
    box = ["1", "2", "3", "4"]
    box[place] = number
    raw = json.dumps(CONTENT).replace("[1, 2, 3, 4]", f"[{', '.join(box)}]")
    folder = CocoFolder(*write(tmp_path, None, raw))
    assert folder.drops["non_finite"] == 1
    assert folder.drop_examples[-1].startswith("non_finite: sub/c.png, annotation 921: box (")
    assert len(folder.drop_examples[-1]) < 120
    json.dumps(folder.coco_ground_truth(), allow_nan=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"id": 9, "file_name"', "images[1]: id must be a whole number"),
        ('"height": 30', "image 9: height must be a whole number"),
        ('"id": 918', "annotations[3]: id must be a whole number"),
        ('"category_id": 90, "bbox": [1', "annotation 921: category_id must be a whole number"),
        ('"id": 90, "name"', "categories[0]: id must be a whole number"),
        ('"image_id": 3, "category_id": 90', "annotation 921: image_id must be a whole number"),
        ('"iscrowd": 1', "annotation 2: iscrowd must be 0 or 1"),
    ],
)
@pytest.mark.parametrize("digits", [400, 5000])
def test_long_numbers_elsewhere_are_named(tmp_path, text, message, digits):
    key, _, rest = text.partition(": ")
    number = re.match(r"\d+", rest).group()
    long = f"{key}: {'9' * digits}{rest.removeprefix(number)}"
    raw = json.dumps(CONTENT)
    assert raw.count(text) == 1
    with pytest.raises(DatasetError, match=re.escape(message)) as caught:
        CocoFolder(*write(tmp_path, None, raw.replace(text, long)))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("area", ["0", "-3", "0.0", "null", '"5"', "true", "1e999", "9" * 400])
def test_an_area_that_is_none_is_that_of_the_box(tmp_path, area):
    raw = json.dumps(CONTENT).replace("77.5", area)
    folder = CocoFolder(*write(tmp_path, None, raw))
    assert folder.coco_ground_truth()["annotations"][0]["area"] == 10 * 12
    assert "4 annotations have no area above 0 (first: annotation 0)" in folder.notes[-1]


def test_what_is_made_up_for_is_said_and_counted(tmp_path):
    content = copy.deepcopy(CONTENT)
    zero, areas = CocoFolder(*write(tmp_path, content)).notes
    assert zero.startswith("annotation id 0 gets another number")
    assert areas.startswith("3 annotations have no area above 0 (first: annotation 1)")
    content["annotations"][0].pop("area")  # of a file without any, nothing is lost
    content["annotations"][0]["id"] = 1000
    assert CocoFolder(*write(tmp_path, content)).notes == ()


def roboflow(names, parent="cells", **root):
    """Categories as Roboflow's exports have them."""
    first = {"id": 0, "name": parent, "supercategory": "none"} | root
    return [first] + [
        {"id": i, "name": name, "supercategory": parent} for i, name in enumerate(names, 1)
    ]


def with_categories(categories):
    content = copy.deepcopy(CONTENT)
    content["categories"] = categories
    for annotation in content["annotations"]:
        annotation["category_id"] = 1 if annotation["category_id"] == 90 else 2
    return content


@pytest.mark.parametrize("parent", ["cells", "bicycle"])
def test_the_root_category_of_roboflow_is_left_out(tmp_path, parent):
    content = with_categories(roboflow(["toothbrush", "bicycle"], parent))
    folder = CocoFolder(*write(tmp_path, content))
    assert (folder.class_names, folder.category_ids) == (("toothbrush", "bicycle"), (1, 2))
    assert folder[0].labels.tolist() == [0, 1, 1]
    assert f"category 0 ('{parent}') is left out" in folder.notes[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["annotations"][0].update(category_id=0),  # It is on a box.
        lambda c: c["categories"][2].update(supercategory="other"),  # Not the parent of all.
        lambda c: c["categories"][0].update(supercategory="cells"),  # A class of its own group.
        lambda c: c["categories"][0].update(id=5),
    ],
)
def test_other_categories_without_boxes_stay(tmp_path, change):
    content = with_categories(roboflow(["toothbrush", "bicycle"]))
    change(content)
    folder = CocoFolder(*write(tmp_path, content))
    assert set(folder.class_names) == {"cells", "toothbrush", "bicycle"}
    assert not any("category" in note for note in folder.notes)


def test_a_name_twice_is_an_error_where_there_is_no_root(tmp_path):
    content = with_categories(roboflow(["toothbrush", "bicycle"], "bicycle"))
    content["annotations"][0]["category_id"] = 0
    with pytest.raises(DatasetError, match="categories 0 and 2 have the same name, 'bicycle'"):
        CocoFolder(*write(tmp_path, content))


def test_class_names_are_lines_of_text(tmp_path):
    content = changed(["categories", 0, "name"], "\ufeff tooth brush\r\n")
    folder = CocoFolder(*write(tmp_path, content))
    assert folder.class_names == ("bicycle", "tooth brush")
    assert folder.coco_ground_truth()["categories"][1]["name"] == "tooth brush"


def test_a_byte_order_mark_is_skipped(tmp_path):
    raw = "\ufeff" + json.dumps(CONTENT)
    assert len(CocoFolder(*write(tmp_path, None, raw))) == 3


def test_ground_truth_scores_one_against_itself(folder, capsys):
    """Oracle: pycocotools, fed with the ground truth's own boxes."""
    truth = folder.coco_ground_truth()
    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3, 4]
    assert truth["annotations"][0]["area"] == 77.5  # As annotated, not width times height.
    assert truth["annotations"][1]["bbox"] == [50, 30, 30, 30]  # Unclipped, as annotated.
    assert truth["annotations"][1]["area"] == 900
    assert [a["iscrowd"] for a in truth["annotations"]] == [0, 0, 1, 0]
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    results = coco.loadRes(
        [
            {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9}
            for a in truth["annotations"]
            if not a["iscrowd"]
        ]
    )
    scorer = COCOeval(coco, results, "bbox")
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    assert scorer.stats[0] == pytest.approx(1.0)


def test_fingerprint_follows_the_annotations(tmp_path, folder):
    again = CocoFolder(folder.images_dir, folder.annotation_file)
    assert again.fingerprint == folder.fingerprint
    moved = changed(["annotations", 0, "bbox"], [5, 6, 10, 13])
    assert CocoFolder(*write(tmp_path, moved)).fingerprint != folder.fingerprint


def test_string_image_ids(tmp_path):
    content = copy.deepcopy(CONTENT)
    for image in content["images"]:
        image["id"] = f"img-{image['id']}"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"img-{annotation['image_id']}"
    assert CocoFolder(*write(tmp_path, content))[0].image_id == "img-7"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["images", 1, "id"], 7, r"image 7: the id is there twice"),
        (["images", 1, "id"], None, r"images\[1\]: id must be a whole number .* or text, got None"),
        (["images", 1, "id"], 1.5, r"images\[1\]: id must be a whole number .* or text, got 1.5"),
        (["images", 1, "height"], "30", r"image 9: height must be a whole number .*, got '30'"),
        (["images", 1, "width"], 0, r"image 9: width must be 1 to 2147483647 pixels, got 0"),
        (["images", 1, "file_name"], "/etc/passwd", "image 9: .*outside the image folder"),
        (["images", 1, "file_name"], "../b.png", "outside the image folder"),
        (["images", 1, "file_name"], "sub/../../b.png", "outside the image folder"),
        (["images", 1, "file_name"], "C:\\b.png", "outside the image folder"),
        (["images", 1, "file_name"], "..\\b.png", "outside the image folder"),
        (["images", 1, "file_name"], "", "non-empty string"),
        (["images", 1, "file_name"], None, "non-empty string"),
        (["annotations", 1, "id"], 0, "annotation id 0 is there twice"),
        (["annotations", 1, "id"], "1", r"annotations\[1\]: id must be a whole number"),
        (["annotations", 1, "image_id"], 8, "annotation 1 names image id 8, which is not"),
        (["annotations", 1, "image_id"], "7", "numbers and strings are mixed"),
        (["annotations", 1, "category_id"], 3, "annotation 1 has category id 3, which is not"),
        (["annotations", 1, "category_id"], "2", "annotation 1: category_id must be a whole"),
        (["annotations", 1, "bbox"], [1, 2, 3], r"annotation 1: bbox must be \[x, y, width"),
        (["annotations", 1, "bbox"], ["1", 2, 3, 4], "annotation 1: bbox must be"),
        (["images", 1, "height"], 2**31, "height must be 1 to 2147483647 pixels"),
        (["images", 1, "id"], 2**63, "id must be a whole number of up to 64 bits or text"),
        (["annotations", 1, "id"], -(2**63) - 1, "id must be a whole number of up to 64 bits"),
        (["annotations", 1, "iscrowd"], 2, "annotation 1: iscrowd must be 0 or 1"),
        (["categories", 1, "id"], 90, "category id 90 is there twice"),
        (["categories", 1, "name"], "toothbrush", "categories 90 and 2 have the same name"),
        (["categories", 1, "name"], " toothbrush\n", "90 and 2 have the same name, 'toothbrush'"),
        (["categories", 1, "name"], "", "category 2: a class's name is empty"),
        (["categories", 1, "name"], "a\nb", "category 2: .* has a line break"),
        (["categories", 1, "name"], 5, "category 2: a class's name is text"),
        (["categories"], [], "no categories"),
        (["categories"], None, "needs a list 'categories'"),
        (["annotations", 2], 5, r"annotations\[2\] must be an object"),
    ],
)
def test_errors_name_the_offender(tmp_path, path, value, message):
    with pytest.raises(DatasetError, match=message) as caught:
        CocoFolder(*write(tmp_path, changed(path, value)))
    assert "instances.json" in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "top level must be an object"),
        ('{"images": NaN}', r"\(NaN is no JSON number: images\)"),
        (
            '{"a": NaN, "images": [{"id": 4, "width": 3}, {"id": "b", "width": [1, Infinity]}]}',
            r"\(NaN is no JSON number: a\)",
        ),
        ('[{"id": "b", "width": [1, -Infinity]}]', r"\(-Infinity .*: \[0\]\.width\[1\], id 'b'\)"),
        ('{"images": NaN', r"\(NaN is no JSON number\)"),
        ('{"images": NaN, "b": ' + "[" * 900 + "]" * 900 + "}", "NaN is no JSON number"),
        ('{"images": [-Infinity]}', "-Infinity is no JSON number"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_json(tmp_path, raw, message):
    with pytest.raises(DatasetError, match=message):
        CocoFolder(*write(tmp_path, None, raw))


def test_missing_annotations_of_a_root_name_those_that_are_there(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_test.json").write_text("{}")
    reason = r"instances_val\.json does not exist \(annotated splits there: test; config"
    with pytest.raises(FileNotFoundError, match=reason):
        CocoFolder(root=tmp_path, split="val")


def test_missing_paths(tmp_path):
    images, path = write(tmp_path, CONTENT)
    with pytest.raises(FileNotFoundError, match=r"gone\.json does not exist"):
        CocoFolder(images, tmp_path / "gone.json")
    with pytest.raises(FileNotFoundError, match=r"image folder .*gone does not exist"):
        CocoFolder(tmp_path / "gone", path)
    with pytest.raises(DatasetError, match="root and split"):
        CocoFolder()
    with pytest.raises(DatasetError, match=r"give root and split .*config\.data\.root.* not both"):
        CocoFolder(images, path, root=tmp_path)


def test_image_faults_are_named_when_read(tmp_path):
    folder = CocoFolder(*write(tmp_path, CONTENT))
    (folder.images_dir / "a.png").unlink()
    with pytest.raises(ImageReadError, match=r"a\.png: no such image file"):
        folder[0]
    Image.new("RGB", (31, 30)).save(folder.images_dir / "b.png")
    with pytest.raises(ImageReadError, match=r"b\.png is 31x30 pixels but annotated as 30x30"):
        folder[1]
    small = CocoFolder(folder.images_dir, folder.annotation_file, max_pixels=1000)
    with pytest.raises(ImageReadError, match=r"c\.png: 60x40 pixels are over the budget"):
        small[2]


@pytest.mark.skipif(os.name == "nt", reason="making links needs rights there")
def test_links_may_not_leave_the_folder(tmp_path):
    folder = CocoFolder(*write(tmp_path, CONTENT))
    outside = tmp_path / "secret.png"
    Image.new("RGB", (60, 40)).save(outside)
    (folder.images_dir / "a.png").unlink()
    (folder.images_dir / "a.png").symlink_to(outside)
    with pytest.raises(ImageReadError, match=r"a\.png: a link leads outside .*follow_links=true"):
        folder[0]
    follow = CocoFolder(folder.images_dir, folder.annotation_file, follow_links=True)
    assert follow[0].image.max() == 0
    assert follow.fingerprint == folder.fingerprint
    data = DataConfig(
        kind="coco",
        train_images=str(folder.images_dir),
        train_annotations=str(folder.annotation_file),
        eval_images=str(folder.images_dir),
        eval_annotations=str(folder.annotation_file),
        follow_links=True,
    )
    assert open_dataset(data, train=True)[0].image.max() == 0
    (folder.images_dir / "a.png").unlink()
    (folder.images_dir / "a.png").symlink_to(folder.images_dir / "sub" / "c.png")
    assert np.array_equal(folder[0].image, folder[2].image)
