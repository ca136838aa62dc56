"""What a folder is, told from its files: every layout by ``data.root`` alone, doubt is an error."""

import json

import pytest
from PIL import Image

from aqdetr_jax.data.coco_writer import write_coco_folder
from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.dataset import DatasetError
from aqdetr_jax.data.layout import Layout, choose_splits, find_layout
from aqdetr_jax.data.open import find_places, load_dataset, open_dataset
from aqdetr_jax.data.tfds_builder import prepare

BOX = {"id": 1, "image_id": 1, "category_id": 4, "bbox": [10, 5, 20, 10]}


def image(path, size=(60, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 8, 7)).save(path)


def coco_file(path, file_name="a.jpg", boxes=(BOX,)):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": 1, "file_name": file_name, "width": 60, "height": 40}]
    categories = [{"id": 4, "name": "cat"}]
    path.write_text(
        json.dumps({"images": images, "annotations": list(boxes), "categories": categories})
    )


def coco(root, splits=("train2017", "val2017"), images=""):
    for split in splits:
        image(root / images / split / "a.jpg")
        coco_file(root / "annotations" / f"instances_{split}.json")


def roboflow(root):
    for split in ("train", "valid", "test"):
        image(root / split / "a.jpg")
        coco_file(root / split / "_annotations.coco.json")


def voc(root, lists=("train", "val", "cat_train")):
    image(root / "JPEGImages" / "a.jpg")
    xml = (
        "<annotation><size><width>60</width><height>40</height></size><object><name>cat</name>"
        "<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>15</ymax></bndbox></object>"
        "</annotation>"
    )
    (root / "Annotations").mkdir(parents=True)
    (root / "Annotations" / "a.xml").write_text(xml)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for name in lists:
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("a\n")


def yolo(root):
    for split in ("train", "val"):
        image(root / "images" / split / "a.jpg")
        (root / "labels" / split).mkdir(parents=True)
        (root / "labels" / split / "a.txt").write_text(f"0 {20 / 60} 0.25 {20 / 60} 0.25\n")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat]\n")


def auto(root, **keys):
    return DataConfig(kind="auto", root=str(root), **keys)


@pytest.mark.parametrize(
    ("write", "inside", "splits"),
    [
        (coco, "", ("train2017", "val2017")),
        (lambda root: coco(root, images="images"), "", ("train2017", "val2017")),
        (roboflow, "", ("train", "valid")),
        (voc, "", ("train", "val")),
        (voc, "VOC2007", ("train", "val")),
        (voc, "VOCdevkit/VOC2007", ("train", "val")),
        (yolo, "", ("train", "val")),
    ],
)
def test_the_same_set_in_every_layout(tmp_path, capsys, write, inside, splits):
    """One image with one box, hand-written in each format, is read as the same example."""
    write(tmp_path / inside if inside else tmp_path)
    data = auto(tmp_path)
    assert tuple(place.split for place in find_places(data)) == splits
    for train in (True, False):
        dataset = open_dataset(data, train=train)
        assert len(dataset) == 1
        example = dataset[0]
        assert example.boxes.round(4).tolist() == [[10, 5, 30, 15]]
        assert dataset.class_names == ("cat",)
        assert example.labels.tolist() == [0]
        assert example.image.shape == (40, 60, 3)
        assert example.file_name.endswith("a.jpg")
    said = capsys.readouterr().out
    assert said.count(f"training on {splits[0]!r}, evaluating on {splits[1]!r}") == 1


def test_a_prepared_folder_is_told(tmp_path):
    sets = {
        name: load_dataset("shapes", split=name, size=64, num_images=2)
        for name in ("train", "validation")
    }
    prepare(sets, tmp_path)
    places = find_places(auto(tmp_path))
    assert [(p.kind, p.split) for p in places] == [("tfds", "train"), ("tfds", "validation")]
    assert len(open_dataset(auto(tmp_path), train=False)) == 2


def test_what_the_program_writes_is_told(tmp_path):
    for name in ("train", "validation"):
        write_coco_folder(load_dataset("shapes", split=name, size=64, num_images=2), tmp_path)
    assert [p.split for p in find_places(auto(tmp_path))] == ["train", "validation"]


def test_two_readings_are_both_named(tmp_path):
    coco(tmp_path)
    yolo(tmp_path)
    message = r"as COCO's own layout \(train2017, val2017\), and as a YOLO folder \(train, val\).*"
    with pytest.raises(DatasetError, match=message + r"--config\.data\.kind=coco or yolo"):
        find_places(auto(tmp_path))
    for kind, split in (("coco", "train2017"), ("yolo", "train")):
        assert find_places(DataConfig(kind=kind, root=str(tmp_path)))[0].split == split


def test_two_sets_of_one_kind_are_both_named(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        voc(tmp_path / "VOCdevkit" / year)
    message = r"in VOCdevkit/VOC2007 .* in VOCdevkit/VOC2012 .*data\.root to one of the two"
    with pytest.raises(DatasetError, match=message):
        find_places(auto(tmp_path))
    assert find_places(auto(tmp_path / "VOCdevkit" / "VOC2012"))[0].kind == "voc"


@pytest.mark.parametrize("kind", ["auto", "coco", "voc", "yolo", "tfds"])
def test_a_folder_of_no_kind_says_what_is_wanted(tmp_path, kind):
    image(tmp_path / "pictures" / "a.jpg")
    with pytest.raises(FileNotFoundError, match=r"holds pictures/, which is no layout of .*wanted"):
        find_places(DataConfig(kind=kind, root=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"config\.data\.root='.*gone' does not exist"):
        find_places(DataConfig(kind=kind, root=str(tmp_path / "gone")))
    with pytest.raises(FileNotFoundError, match="is a file, not a folder"):
        find_places(DataConfig(kind=kind, root=str(tmp_path / "pictures" / "a.jpg")))


# --- splits --------------------------------------------------------------------------------------


def layout(tmp_path, *names):
    return Layout("voc", "a Pascal VOC folder", tmp_path, {name: {} for name in names})


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("train", "val", "trainval", "test"), ("train", "val")),
        (("trainval", "test"), ("trainval", "test")),
        (("train", "test"), ("train", "test")),
        (("train2017", "val2017", "test2017"), ("train2017", "val2017")),
        (("train", "valid", "test"), ("train", "valid")),
        (("training", "validation"), ("training", "validation")),
        (("Train", "Val", "Test"), ("Train", "Val")),
        (("TrainVal", "TEST"), ("TrainVal", "TEST")),
    ],
)
def test_splits_are_told_by_their_names(tmp_path, names, wanted):
    assert choose_splits(layout(tmp_path, *names)) == wanted
    assert choose_splits(layout(tmp_path, *reversed(names))) == wanted


def test_what_is_trained_on_is_not_judged_on(tmp_path):
    everything = layout(tmp_path, "train", "val", "trainval", "test")
    assert choose_splits(everything, "trainval") == ("trainval", "test")  # it holds val
    both = r"'trainval' holds the images of 'val'.*train_split=trainval .*eval_split=val"
    for asked in ("", "val"):
        with pytest.raises(DatasetError, match=both):
            choose_splits(layout(tmp_path, "trainval", "val"), evaluation=asked)
    with pytest.raises(DatasetError, match=r"'trainval' holds the images of 'train'"):
        choose_splits(everything, evaluation="train")
    assert choose_splits(everything, "trainval", "train") == ("trainval", "train")  # as asked


def test_a_split_that_is_not_needed_may_stay_open(tmp_path):
    assert choose_splits(layout(tmp_path, "val"), needed="eval") == ("", "val")
    assert choose_splits(layout(tmp_path, "train"), needed="train") == ("train", "")
    two = layout(tmp_path, "train2014", "train2017", "val2017")
    assert choose_splits(two, needed="eval") == ("", "val2017")
    assert choose_splits(layout(tmp_path, "train", "val", "dev"), needed="train") == ("train", "")
    # A file that somebody names may hold any images: "trainval" is not taken beside it.
    assert choose_splits(layout(tmp_path, "train", "trainval"), evaluation=None) == ("train", "")
    with pytest.raises(DatasetError, match=r"set --config\.data\.train_split=trainval"):
        choose_splits(layout(tmp_path, "trainval"), evaluation=None)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("train2014", "train2017", "val2017"),
            r"train2014 or train2017\? Set --config.data.train",
        ),
        (("train", "val", "valid"), r"val or valid\? Set --config.data.eval_split"),
        (("train",), "has train alone: .*train_split=train --config.data.eval_split=train"),
        (("left", "right"), "has left, right, and their names do not tell .*data.train_split=left"),
        ((), "has no splits"),
    ],
)
def test_doubt_about_splits_names_the_key(tmp_path, names, message):
    with pytest.raises(DatasetError, match=message):
        choose_splits(layout(tmp_path, *names))


def test_a_wrong_split_lists_those_there_are(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no split 'vall' .*eval_split.*train, val"):
        choose_splits(layout(tmp_path, "train", "val"), evaluation="vall")


def test_a_folder_that_changed_is_looked_at_again(tmp_path, capsys):
    coco(tmp_path)
    assert find_places(auto(tmp_path))[1].split == "val2017"
    (tmp_path / "annotations" / "instances_val2017.json").unlink()
    coco(tmp_path, splits=("test2017",))
    assert find_places(auto(tmp_path))[1].split == "test2017"
    said = capsys.readouterr().out
    assert said.count("evaluating on 'val2017'") == said.count("evaluating on 'test2017'") == 1


def test_hidden_files_are_no_splits(tmp_path):
    """As macOS leaves them beside others."""
    voc(tmp_path, lists=("train", "val", "._train", "._val"))
    assert list(find_layout(tmp_path).splits) == ["val", "train"]
    roboflow(tmp_path / "export")
    coco_file(tmp_path / "export" / ".backup" / "_annotations.coco.json")
    assert list(find_layout(tmp_path / "export").splits) == ["test", "train", "valid"]


# --- files named one by one ----------------------------------------------------------------------


def test_annotations_beside_the_folder_are_used(tmp_path):
    coco(tmp_path)
    more = {"id": 2, "image_id": 1, "category_id": 4, "bbox": [1, 1, 5, 5]}
    coco_file(tmp_path / "annotations" / "more.json", boxes=(BOX, more))
    for given in ("annotations/more.json", str(tmp_path / "annotations" / "more.json")):
        data = auto(tmp_path, train_annotations=given)
        assert len(open_dataset(data, train=True)[0].boxes) == 2
        assert len(open_dataset(data, train=False)[0].boxes) == 1
    image(tmp_path / "elsewhere" / "a.jpg")
    other = auto(tmp_path, eval_images="elsewhere")
    assert "elsewhere" in str(open_dataset(other, train=False).image_path(0))
    with pytest.raises(
        FileNotFoundError, match=r"train_annotations='gone.json' does not exist, ne"
    ):
        find_places(auto(tmp_path, train_annotations="gone.json"))


def test_files_for_one_purpose_and_the_folder_for_the_other(tmp_path, capsys):
    coco(tmp_path, ("val",))
    image(tmp_path / "mine" / "a.jpg")
    coco_file(tmp_path / "mine.json", boxes=(BOX, {**BOX, "id": 2}))
    files = {"images": "mine", "annotations": "mine.json"}
    data = auto(tmp_path, **{f"train_{key}": value for key, value in files.items()})
    assert [len(open_dataset(data, train=t)[0].boxes) for t in (True, False)] == [2, 1]
    assert f"{tmp_path} is COCO's own layout: evaluating on 'val'" in capsys.readouterr().out
    assert len(open_dataset(auto(tmp_path), train=False)) == 1  # who only evaluates needs no more
    coco(tmp_path / "other", ("train",))
    absolute = {f"eval_{key}": str(tmp_path / value) for key, value in files.items()}
    data = auto(tmp_path / "other", **absolute)
    assert [len(open_dataset(data, train=t)[0].boxes) for t in (True, False)] == [1, 2]


def test_a_name_that_is_here_and_in_the_folder(tmp_path, monkeypatch):
    """Two different files are an error, one file seen from both is not."""
    root = tmp_path / "set"
    coco(root)
    for place in (root, tmp_path):
        coco_file(place / "annotations" / "few.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=r"is both here and in set, and not the same") as error:
        find_places(auto("set", train_annotations="annotations/few.json"))
    for place in (root, tmp_path):
        assert f"--config.data.train_annotations={place}/annotations/few.json" in str(error.value)
    monkeypatch.chdir(root)
    data = auto(root, train_annotations="annotations/few.json")
    assert len(open_dataset(data, train=True)) == 1


def test_files_of_coco_beside_another_kind_are_refused(tmp_path):
    yolo(tmp_path)
    coco_file(tmp_path / "few.json")
    with pytest.raises(DatasetError, match=r"train_annotations has no effect: .* is a YOLO folder"):
        find_places(auto(tmp_path, train_annotations="few.json"))
    with pytest.raises(DatasetError, match=r"eval_images has no effect with data.kind='yolo'"):
        find_places(DataConfig(kind="yolo", root=str(tmp_path), eval_images="images"))


def test_all_files_named_need_no_layout(tmp_path):
    image(tmp_path / "pictures" / "a.jpg")
    coco_file(tmp_path / "mine.json")
    files = {f"{which}_{key}": value for which in ("train", "eval") for key, value in FILES.items()}
    assert len(open_dataset(auto(tmp_path, **files), train=True)) == 1
    absolute = {key: str(tmp_path / value) for key, value in files.items()}
    assert len(open_dataset(DataConfig(kind="coco", **absolute), train=False)) == 1
    # Who only evaluates names only that.
    only = {key: value for key, value in absolute.items() if key.startswith("eval")}
    assert len(open_dataset(DataConfig(kind="coco", **only), train=False)) == 1
    with pytest.raises(DatasetError, match=r"config.data.train_images is empty"):
        open_dataset(DataConfig(kind="coco", **only), train=True)
    with pytest.raises(DatasetError, match=r"config.data.root=.* has no effect"):
        find_places(auto(tmp_path, **absolute))


FILES = {"images": "pictures", "annotations": "mine.json"}


def test_one_image_folder_for_all_splits(tmp_path):
    image(tmp_path / "images" / "a.jpg")
    for split in ("train", "val"):
        coco_file(tmp_path / "annotations" / f"{split}.json")
    coco_file(tmp_path / "annotations" / "captions_train.json")
    assert list(find_layout(tmp_path).splits) == ["train", "val"]
