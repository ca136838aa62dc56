"""YOLO folders: normalised boxes, outlines, the places that data.yaml names, and faults."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from aqdetr_jax.data.dataset import DatasetError
from aqdetr_jax.data.yolo import YoloFolder, find_splits

LABELS = "0 0.5 0.5 0.5 0.25\n1 0.1 0.2 0.1 0.2\n"


def write(root, labels=LABELS, yaml="names: [cat, dog]\ntrain: images\n", size=(80, 40)):
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 8, 7)).save(root / "images" / "a.jpg")
    (root / "labels" / "a.txt").write_text(labels)
    if yaml is not None:
        (root / "data.yaml").write_text(yaml)
    return root


def test_boxes_by_hand(tmp_path):
    folder = YoloFolder(write(tmp_path))
    example = folder[0]
    assert example.boxes.tolist() == [[20, 15, 60, 25], [4, 4, 12, 12]]
    assert example.labels.tolist() == [0, 1]
    assert (folder.class_names, folder.category_ids) == (("cat", "dog"), (0, 1))
    truth = folder.coco_ground_truth()
    np.testing.assert_allclose([a["area"] for a in truth["annotations"]], [400, 64])
    assert example.file_name == "images/a.jpg"


def test_an_outline_is_reduced_to_its_box(tmp_path):
    folder = YoloFolder(write(tmp_path, "1 0.25 0.5 0.5 0.25 0.75 0.5 0.5 0.75\n"))
    assert folder[0].boxes.tolist() == [[20, 10, 60, 30]]


def test_key_points_after_the_box_are_left_out(tmp_path):
    yaml = "names: [cat]\ntrain: images\nkpt_shape: [2, 3]\n"
    folder = YoloFolder(write(tmp_path, "0 0.5 0.5 0.5 0.25 0.1 0.1 2 0.9 0.9 2\n", yaml))
    assert folder[0].boxes.tolist() == [[20, 15, 60, 25]]


def test_images_without_labels_have_no_objects(tmp_path):
    write(tmp_path)
    Image.new("RGB", (30, 30)).save(tmp_path / "images" / "b.png")
    Image.new("RGB", (30, 30)).save(tmp_path / "images" / "c.png")
    (tmp_path / "labels" / "c.txt").write_text("\n")
    folder = YoloFolder(tmp_path)
    assert [len(e.boxes) for e in folder] == [2, 0, 0]


def test_shares_are_of_the_upright_image(tmp_path):
    """A phone's portrait picture is stored lying; its labels were drawn on it standing."""
    write(tmp_path, "0 0.5 0.25 1.0 0.5\n")
    picture = Image.new("RGB", (80, 40))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "images" / "a.jpg", exif=exif)
    folder = YoloFolder(tmp_path)
    assert folder.image_size(0) == (80, 40)
    assert folder[0].image.shape == (80, 40, 3)
    assert folder[0].boxes.tolist() == [[0, 0, 40, 40]]


def test_boxes_that_leave_the_image_or_have_no_area(tmp_path):
    labels = "0 0.0 0.5 0.5 0.5\n0 0.5 0.5 0 0.5\n0 1.5 0.5 0.2 0.2\n0 nan 0.5 0.2 0.2\n"
    folder = YoloFolder(write(tmp_path, labels))
    assert folder[0].boxes.tolist() == [[0, 10, 20, 30]]
    assert folder.drops == {"zero_area": 1, "outside": 1, "non_finite": 1}
    assert folder.clipped == 1
    assert folder.drop_examples[0].startswith("zero_area: a.txt, line 2")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("2 0.5 0.5 0.5 0.5", r"a\.txt, line 1: class 2, but classes are 0 to 1"),
        ("-1 0.5 0.5 0.5 0.5", "class -1, but classes"),
        ("0.5 0.5 0.5 0.5 0.5", "class 0.5, but classes"),
        ("0 0.5 0.5 0.5 0.5\n\n0 0.5 0.5 0.5", r"line 3: 4 numbers; an object is"),
        ("0 0.5 0.5 0.5 0.5 0.9", "6 numbers; an object is"),
        ("0 cat 0.5 0.5 0.5", "must be numbers only"),
        ("0 34 20 10 12", "34 is no share of a side"),
    ],
)
def test_faults_name_file_and_line(tmp_path, labels, message):
    with pytest.raises(DatasetError, match=message):
        YoloFolder(write(tmp_path, labels))


@given(text=st.text(max_size=60))
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_labels_of_any_text_are_read_or_refused_by_name(tmp_path, text):
    write(tmp_path)
    (tmp_path / "labels" / "a.txt").write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        folder = YoloFolder(tmp_path)
    except DatasetError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert "a.txt" in message
        return
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(folder[0].boxes) + sum(folder.drops.values()) == len(lines)


# --- data.yaml -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "named",
    [
        "images/train",
        "./images/train",
        "../images/train",
        "/home/someone/data/images/train",
        "images\\train",
        "[images/train]",
        "train.txt",
    ],
)
def test_places_as_people_write_them(tmp_path, named):
    """Relative to the file, one up as Roboflow has it, of another machine, a list of files."""
    (tmp_path / "images" / "train").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "train" / "a.png")
    (tmp_path / "train.txt").write_text("./images/train/a.png\n")
    (tmp_path / "data.yaml").write_text(f"train: {named}\nnames: {{0: cat}}\n")
    folder = YoloFolder(tmp_path)
    assert [folder.file_name(i) for i in range(len(folder))] == ["images/train/a.png"]


def test_roboflows_folders(tmp_path):
    """``train/images`` beside ``train/labels``."""
    (tmp_path / "train" / "images").mkdir(parents=True)
    (tmp_path / "train" / "labels").mkdir()
    Image.new("RGB", (10, 10)).save(tmp_path / "train" / "images" / "a.png")
    (tmp_path / "train" / "labels" / "a.txt").write_text("0 0.5 0.5 1 1")
    (tmp_path / "data.yaml").write_text("train: ../train/images\nnc: 1\nnames: ['cat']\n")
    assert YoloFolder(tmp_path)[0].boxes.tolist() == [[0, 0, 10, 10]]


def test_classes_txt_without_yaml(tmp_path):
    write(tmp_path, yaml=None)
    (tmp_path / "classes.txt").write_text("\ufeffcat\r\ndog\r\n\r\n", encoding="utf-8")
    assert list(find_splits(tmp_path)) == ["all"]
    assert YoloFolder(tmp_path, "all").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("names: [cat, cat]\ntrain: images", "classes 0 and 1 are both named 'cat'"),
        ("names: [cat]\nnc: 2\ntrain: images", "nc is 2, but there are 1 names"),
        ("names: {1: cat}\ntrain: images", "keys of names must be 0 to 0"),
        ("names: 3\ntrain: images", "names must be a list"),
        ("names: [cat, dog]\ntrain: gone", r"data\.yaml: train: 'gone' does not exist"),
        ("names: [cat, dog]\ntrain: {a: b}", "must be a path"),
        ("names: [cat\ntrain", r"data\.yaml: not valid YAML"),
        ("- a", "must hold keys"),
    ],
)
def test_faults_of_the_yaml_file(tmp_path, yaml, message):
    with pytest.raises(DatasetError, match=message):
        YoloFolder(write(tmp_path, yaml=yaml))


def test_missing_things_are_named(tmp_path):
    write(tmp_path, yaml=None)
    with pytest.raises(FileNotFoundError, match="nothing names the classes"):
        YoloFolder(tmp_path, "all")
    with pytest.raises(FileNotFoundError, match=r"no split 'train' \(there are: all\)"):
        YoloFolder(tmp_path)
    write(tmp_path, yaml="names: [cat]\ntrain: labels\n")
    with pytest.raises(FileNotFoundError, match="split 'train' has no images"):
        YoloFolder(tmp_path)
    write(tmp_path)
    (tmp_path / "images" / "a.png").write_bytes((tmp_path / "images" / "a.jpg").read_bytes())
    with pytest.raises(DatasetError, match="would have the same label file"):
        YoloFolder(tmp_path)
