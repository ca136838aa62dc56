"""What the messages about a folder say to do is carried out, until both sets open."""

import dataclasses
import re
import shlex

import pytest
from test_layout import BOX, auto, coco, coco_file, image, roboflow, voc, yolo

from aqdetr_jax.data.dataset import DatasetError
from aqdetr_jax.data.open import find_places, open_dataset


def two_voc(root):
    for year in ("VOC2007", "VOC2012"):
        voc(root / year)


def voc_in_voc(root):
    voc(root)
    voc(root / "VOC2012")


def two_kinds(root):
    coco(root)
    yolo(root)


def two_folders(root):
    coco(root)
    coco(root, images="images")


def two_files(root):
    coco(root)
    for split in ("train2017", "val2017"):
        coco_file(root / "annotations" / f"{split}.json")


def yolo_of_train_alone(root):
    """Roboflow's export of a set that was not split: the file still names three."""
    image(root / "train" / "images" / "a.jpg")
    (root / "train" / "labels").mkdir()
    (root / "train" / "labels" / "a.txt").write_text("0 0.5 0.5 0.5 0.5")
    named = "".join(f"{k}: ../{k}/images\n" for k in ("train", "val", "test"))
    (root / "data.yaml").write_text(f"{named}names: [cat]\n")


@pytest.mark.parametrize(
    ("write", "keys"),
    [
        (two_kinds, {}),
        (two_voc, {}),
        (voc_in_voc, {}),
        (two_folders, {}),
        (two_files, {}),
        (lambda root: coco(root, ("train2014", "train2017", "val2017")), {}),
        (lambda root: voc(root, ("left", "right")), {}),
        (lambda root: voc(root, ("trainval", "val")), {}),
        (lambda root: voc(root, ("trainval", "val")), {"eval_split": "val"}),
        (lambda root: voc(root, ("trainval", "train")), {"eval_split": "train"}),
        (lambda root: voc(root, ("train",)), {"eval_split": "train"}),
        (lambda root: voc(root, ("train", "val")), {"eval_split": "train"}),
        (lambda root: coco(root, ("train",)), {}),
        (yolo_of_train_alone, {}),
        (yolo_of_train_alone, {"eval_split": "test"}),
        (coco, {"train_annotations": "few.json"}),
    ],
)
def test_what_a_message_says_to_do_helps(tmp_path, monkeypatch, write, keys):
    """Each option that it names is given, alternatives one by one, until the sets open."""
    root = tmp_path / "my set"
    root.mkdir()
    write(root)
    coco_file(root / "few.json")
    coco_file(tmp_path / "here" / "few.json", boxes=(BOX, {**BOX, "id": 2}))
    monkeypatch.chdir(tmp_path / "here")
    assert carry_out(auto(root, **keys)) > 0


def carry_out(data, seen=()):
    """Opens both sets as messages say; the number of ways that were tried."""
    try:
        assert all(len(open_dataset(data, train=train)) for train in (True, False))
        return 0 if not seen else 1
    except (DatasetError, FileNotFoundError) as error:
        message = str(error)
    assert message not in seen, "the remedy does not help"
    flag = re.compile(r"--config\.data\.\w+=(?:'[^']*'|[^\s',]+)+")
    found = [shlex.split(" ".join(flag.findall(part))) for part in message.split(" or ")]
    found = [dict(f.removeprefix("--config.data.").split("=", 1) for f in fs) for fs in found if fs]
    assert found, message
    return sum(carry_out(dataclasses.replace(data, **f), (*seen, message)) for f in found)


def test_two_layouts_of_coco_are_settled_by_files(tmp_path):
    coco(tmp_path, ("train", "valid"))
    roboflow(tmp_path)
    with pytest.raises(DatasetError, match=r"COCO's own .* and Roboflow's .*: name the files, by"):
        find_places(auto(tmp_path))
    files = {}
    for which, split in (("train", "train"), ("eval", "valid")):
        files[f"{which}_images"] = split
        files[f"{which}_annotations"] = f"{split}/_annotations.coco.json"
    assert len(open_dataset(auto(tmp_path, **files), train=True)) == 1


def test_a_doubt_about_what_is_not_used_is_none(tmp_path):
    coco(tmp_path)
    coco(tmp_path, ("test",))
    coco(tmp_path, ("test",), images="images")
    coco_file(tmp_path / "annotations" / "test.json")
    assert len(open_dataset(auto(tmp_path), train=False)) == 1
    with pytest.raises(DatasetError, match="for split 'test'"):
        open_dataset(auto(tmp_path, eval_split="test"), train=False)
