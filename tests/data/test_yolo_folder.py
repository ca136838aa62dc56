"""YOLO folders: normalised boxes, outlines, the places that data.yaml names, and faults."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from aqdetr_jax.data import yolo
from aqdetr_jax.data.dataset import DatasetError, ImageReadError
from aqdetr_jax.data.yolo import YoloFolder
from aqdetr_jax.data.yolo_files import find_splits

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
    assert folder.notes == (
        "1 of 3 images have no label file and count as without objects (first: images/b.png, for "
        f"which {tmp_path}/labels/b.txt was looked for)",
    )


def test_labels_are_looked_for_inside_the_folder(tmp_path):
    """What the folder itself lies in may be called images; its own last such part counts."""
    root = tmp_path / "images" / "set"
    (root / "pictures").mkdir(parents=True)
    Image.new("RGB", (10, 10)).save(root / "pictures" / "a.png")
    (root / "pictures" / "a.txt").write_text("0 0.5 0.5 1 1")
    (root / "data.yaml").write_text("train: pictures\nnames: [cat]\n")
    folder = YoloFolder(root)
    assert folder[0].boxes.tolist() == [[0, 0, 10, 10]]
    assert (folder.source, folder.notes) == (str(root / "pictures" / "a.txt"), ())
    assert yolo.label_file("images/images/x/a.jpg") == "images/labels/x/a.txt"
    assert yolo.label_file("images.jpg") == "images.txt"


def test_an_image_that_cannot_be_read_is_an_error_when_it_is(tmp_path):
    """Its boxes stay known; until then it counts as of the size that most have."""
    write(tmp_path)
    Image.new("RGB", (30, 30)).save(tmp_path / "images" / "b.png")
    Image.new("RGB", (80, 40)).save(tmp_path / "images" / "c.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    (tmp_path / "images" / "link.png").symlink_to("/dev/null")
    for name in ("b", "c", "bad", "link"):
        (tmp_path / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "images" / "._a.jpg").write_bytes(b"resource fork")
    (tmp_path / "images" / ".cache").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / ".cache" / "a.png")
    folder = YoloFolder(tmp_path)
    names = [folder.file_name(i) for i in range(len(folder))]
    assert names == [f"images/{name}" for name in ("a.jpg", "b.png", "bad.png", "c.png")]
    assert folder[0].boxes.tolist() == [[20, 15, 60, 25], [4, 4, 12, 12]]
    assert folder.image_size(2) == (40, 80)
    assert folder.records[2].boxes.tolist() == [[20, 10, 60, 30]]
    with pytest.raises(ImageReadError, match=r"bad\.png"):
        _ = folder[2]
    assert "1 of 4 images cannot be read" in folder.notes[0]
    for name in ("a.jpg", "b.png", "c.png"):
        (tmp_path / "images" / name).unlink()
    with pytest.raises(ImageReadError, match=r"none of the 1 images can be read: .*bad\.png"):
        YoloFolder(tmp_path)


def test_a_header_is_read_once_until_the_file_changes(tmp_path, monkeypatch):
    write(tmp_path)
    read = []
    header = yolo.read_header
    monkeypatch.setattr(yolo, "read_header", lambda path: read.append(path) or header(path))
    assert YoloFolder(tmp_path).image_size(0) == YoloFolder(tmp_path).image_size(0) == (40, 80)
    assert len(read) == 1
    Image.new("RGB", (300, 200)).save(tmp_path / "images" / "a.jpg")
    assert YoloFolder(tmp_path).image_size(0) == (200, 300)
    assert len(read) == 2


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
        "C:\\data\\images\\train",
        "train.txt",
        "there.txt",
        "windows.txt",
        "up.txt",
        "here.txt",
    ],
)
def test_places_as_people_write_them(tmp_path, named):
    """Relative to the file, one up as Roboflow has it, of another machine, a list of files."""
    (tmp_path / "images" / "train").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "train" / "a.png")
    lists = {
        "train": "./images/train/a.png",
        "there": "/home/someone/data/images/train/a.png",
        "windows": "D:\\data\\images\\train\\a.png",
        "up": "../images/train/a.png",
        "here": str(tmp_path / "images" / "train" / "a.png"),
    }
    for name, line in lists.items():
        (tmp_path / f"{name}.txt").write_text(f"{line}\n\n")
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


@pytest.mark.parametrize("key", ["val", "valid", "validation"])
def test_only_the_split_that_is_used_must_be_there(tmp_path, key):
    """Roboflow names a test split that a set without one does not have."""
    for split in ("train", "valid"):
        (tmp_path / split / "images").mkdir(parents=True)
        Image.new("RGB", (10, 10)).save(tmp_path / split / "images" / "a.png")
    (tmp_path / "data.yaml").write_text(
        f"train: ../train/images\n{key}: ../valid/images\ntest: ../test/images\nnames: ['cat']\n"
    )
    assert list(find_splits(tmp_path)) == ["train", "val", "test"]
    assert YoloFolder(tmp_path, "val").file_name(0) == "valid/images/a.png"
    there = r"test: '\.\./test/images' does not exist in .*take what is there: 'train', 'val'"
    with pytest.raises(DatasetError, match=there):
        YoloFolder(tmp_path, "test")


def test_path_of_the_yaml_file(tmp_path, monkeypatch):
    """Here, of another machine, or relative, seen through a relative root."""
    write(tmp_path / "set" / "sub")
    monkeypatch.chdir(tmp_path)
    for path in ("sub", str(tmp_path / "set" / "sub"), "/home/someone/set"):
        train = "images" if "sub" in path else "sub/images"
        (tmp_path / "set" / "data.yaml").write_text(
            f"path: {path}\ntrain: {train}\nnames: [cat, dog]\n"
        )
        assert len(YoloFolder("set")[0].boxes) == 2


def test_classes_txt_without_yaml(tmp_path):
    write(tmp_path, yaml=None)
    (tmp_path / "classes.txt").write_text("\ufeffcat\r\ndog\r\n\r\n", encoding="utf-8")
    assert list(find_splits(tmp_path)) == ["all"]
    assert YoloFolder(tmp_path, "all").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("names: [cat, cat]\ntrain: images", "classes 0 and 1 are both named 'cat'"),
        ("names: [cat, yes]\ntrain: images", r"name 1 is read as bool, .*quote it"),
        ("names: [cat, ~]\ntrain: images", r"name 1 is read as NoneType, .*quote it"),
        ("names: [[cat], dog]\ntrain: images", r"name 0 is read as list, .*quote it"),
        ("names: [cat, 1.5]\ntrain: images", r"name 1 is read as float, .*quote it"),
        (f"names: [cat, 0x{'f' * 9000}]\ntrain: images", "name 1 is read as int, .*quote it"),
        ('names: [cat, "a\\nb"]\ntrain: images', "name 1: .*control character"),
        ("names: [cat]\nnc: [1]\ntrain: images", "nc is list, but"),
        ("names: {true: cat, 0: dog}\ntrain: images", "keys of names must be 0 to 1"),
        ("names: [cat, dog]\nval: a\nvalid: b", "val and valid name the same split; keep one"),
        ("a: &a {b: 1}\nc: {<<: *a}", r"line 2: merge keys \(<<\) are not read"),
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


def test_bare_numbers_are_names(tmp_path):
    yaml = "names: [3, '007']\ntrain: images\n"
    assert YoloFolder(write(tmp_path, yaml=yaml)).class_names == ("3", "007")


@pytest.mark.parametrize("key", ["names", "nc", "train", "val", "path", "kpt_shape", "merged"])
def test_a_small_file_stays_small(tmp_path, key):
    """Ten aliases a level, nested: as text the last level has 10^12 names."""
    plain, merge = ("[secret]", "[{}]") if key != "merged" else ("{k: secret}", "{{<<: [{}]}}")
    levels = [f"a0: &a0 {plain}"]
    for n in range(1, 13):
        levels.append(f"a{n}: &a{n} " + merge.format(", ".join([f"*a{n - 1}"] * 10)))
    content = {"names": "[cat, dog]", "train": "images", key: "*a12"}
    yaml = "\n".join([*levels, *(f"{k}: {value}" for k, value in content.items())])
    write(tmp_path, yaml=yaml)
    message = ""
    tracemalloc.start()
    try:
        YoloFolder(tmp_path)
    except DatasetError as error:
        message = str(error)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20e6
    assert len(message) < 500
    assert "secret" not in message
    assert bool(message) == (key in ("names", "nc", "train", "merged"))


def test_errors_do_not_print_what_is_in_the_file(tmp_path):
    for yaml in ("names: [cat\nsecret: [", "a: b: secret", "secret: !!python/object:os.system"):
        with pytest.raises(DatasetError, match=r"data\.yaml: not valid YAML \(line \d") as error:
            YoloFolder(write(tmp_path, yaml=yaml))
        assert "secret" not in str(error.value)
    (tmp_path / "data.yaml").write_bytes(b"names: [\xffsecret]")
    with pytest.raises(DatasetError, match=r"not UTF-8 text .* at byte 8") as error:
        YoloFolder(tmp_path)
    assert "secret" not in str(error.value)
    write(tmp_path, "1" * 5000 + " 0.5 0.5 0.5 0.5")
    with pytest.raises(DatasetError, match="class inf, but classes are 0 to 1"):
        YoloFolder(tmp_path)


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
