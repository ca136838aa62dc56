"""COCO 2017 and VOC 2007 + 2012 from their archives: small copies in the exact layout."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from aqdetr_jax.cli import main
from aqdetr_jax.data import official
from aqdetr_jax.data.dataset import DatasetError
from aqdetr_jax.data.official import SETS, VOC_CLASSES, open_official
from aqdetr_jax.data.tfds_builder import TfdsDataset
from aqdetr_jax.paths import as_path, files_of

SIZES = {"train2017": 5, "val2017": 3}


def jpeg(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def instances(split: str) -> bytes:
    images = [
        {"id": n, "file_name": f"{n:012d}.jpg", "height": 30, "width": 40, "license": 1}
        for n in range(1, SIZES[split] + 1)
    ]
    boxes = [
        {
            "id": n,
            "image_id": n,
            "category_id": (1, 90)[n % 2],
            "bbox": [1.5, 2.5, 10.25, 20.0],
            "area": 100.5,
            "iscrowd": 0,
            "segmentation": [[1.5, 2.5, 11.75, 2.5, 11.75, 22.5]],
        }
        for n in range(1, SIZES[split] + 1)
    ]
    kinds = [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]
    return json.dumps({"images": images, "annotations": boxes, "categories": kinds}).encode()


@pytest.fixture
def coco(tmp_path):
    """Folder with the three archives."""
    folder = tmp_path / "manual"
    folder.mkdir()
    for split, count in SIZES.items():
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
            archive.writestr(f"{split}/", b"")
            for n in range(1, count + 1):
                archive.writestr(f"{split}/{n:012d}.jpg", jpeg(n))
    with zipfile.ZipFile(folder / "annotations_trainval2017.zip", "w") as archive:
        for split in SIZES:
            archive.writestr(f"annotations/instances_{split}.json", instances(split))
            archive.writestr(f"annotations/captions_{split}.json", b"{}")
    return folder


XML = """<annotation><folder>{year}</folder><filename>{name}.jpg</filename>
<size><width>40</width><height>30</height><depth>3</depth></size>
<object><name>{kind}</name><difficult>0</difficult>
<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>20</xmax><ymax>25</ymax></bndbox></object></annotation>
"""
VOC = {
    "VOCtrainval_06-Nov-2007.tar": ("VOC2007", "trainval", ("000005", "000007")),
    "VOCtest_06-Nov-2007.tar": ("VOC2007", "test", ("000001",)),
    "VOCtrainval_11-May-2012.tar": ("VOC2012", "trainval", ("2007_000027", "2008_000002")),
}


@pytest.fixture
def voc(tmp_path):
    folder = tmp_path / "manual"
    folder.mkdir()
    for file, (year, split, names) in VOC.items():
        content = {f"ImageSets/Main/{split}.txt": "".join(f"{n}\n" for n in names).encode()}
        for number, name in enumerate(names):
            text = XML.format(year=year, name=name, kind=VOC_CLASSES[number])
            content[f"Annotations/{name}.xml"] = text.encode()
            content[f"JPEGImages/{name}.jpg"] = jpeg(number)
        with tarfile.open(folder / file, "w") as archive:
            for name, data in content.items():
                info = tarfile.TarInfo(f"VOCdevkit/{year}/{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return folder


def test_coco_from_archives_to_records(coco, tmp_path, capsys):
    words = ("prepare-data", "--set=coco2017", f"--manual={coco}", f"--out={tmp_path}/out")
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "'train2017' has 5 images, published are 118287" in said
    assert main((*words, "--partial")) == 0
    for split, count in SIZES.items():
        made = TfdsDataset(tmp_path / "out", split)
        assert len(made) == count
        assert made.class_names == ("person", "toothbrush")
        assert made.category_ids == (1, 90)
        assert bytes(made._source[2]["image"]) == jpeg(3)  # the file's own bytes
        truth = made.coco_ground_truth()
        assert truth["annotations"][2]["bbox"] == [1.5, 2.5, 10.25, 20.0]
        assert truth["annotations"][2]["area"] == 100.5
        assert [image["id"] for image in truth["images"]] == list(range(1, count + 1))
    assert main((*words, "--partial")) == 1
    assert "prepared already" in capsys.readouterr().err


def test_voc_from_archives_to_records(voc, tmp_path):
    sets = open_official("voc0712", voc, partial=True)
    assert [len(part) for part in sets.values()] == [4, 1]
    joined = sets["trainval"]
    assert joined.class_names == sets["test"].class_names == VOC_CLASSES
    assert [joined.image_id(n) for n in range(4)] == [1, 2, 3, 4]
    assert joined.file_name(2) == "VOC2012/JPEGImages/2007_000027.jpg"
    assert joined.image_path(2).read_bytes() == jpeg(0)
    np.testing.assert_array_equal(joined[3].boxes, [[2, 3, 20, 25]])  # counted from 1, to the end
    np.testing.assert_array_equal(joined[3].labels, [1])
    out = ("--format=coco", f"--out={tmp_path}/out", "--partial")
    assert main(("prepare-data", "--set=voc0712", f"--manual={voc}", *out)) == 0
    assert (tmp_path / "out" / "annotations" / "instances_trainval.json").is_file()


def test_what_is_missing_is_said_with_where_it_goes(coco, tmp_path):
    (coco / "val2017.zip").unlink()
    with pytest.raises(FileNotFoundError, match=r"put there val2017.zip \(or, unpacked, val2017\)"):
        open_official("coco2017", coco, partial=True)
    (coco / "val2017").mkdir()
    for n in range(1, 4):
        (coco / "val2017" / f"{n:012d}.jpg").write_bytes(jpeg(n))
    assert len(open_official("coco2017", coco, partial=True)["val2017"]) == 3
    with pytest.raises(FileNotFoundError, match=r"VOCtest_06-Nov-2007\.tar"):
        open_official("voc0712", tmp_path, partial=True)
    with pytest.raises(ValueError, match=r"--manual=DIR.*train2017\.zip"):
        open_official("coco2017", None)


@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_unpacking_goes_on_where_it_was_killed(kind, request, monkeypatch):
    folder = request.getfixturevalue(kind)
    name = {"coco": "coco2017", "voc": "voc0712"}[kind]
    write, written = official.write_bytes_atomic, []

    def killed(path, data):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, data)

    monkeypatch.setattr(official, "write_bytes_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        open_official(name, folder, partial=True)
    first = list(written)
    first[1].write_bytes(b"cut")  # by a machine that went down before it was on the disk

    monkeypatch.setattr(official, "write_bytes_atomic", lambda path, data: seen(path, data))
    again = []

    def seen(path, data):
        again.append(path)
        return write(path, data)

    open_official(name, folder, partial=True)
    assert first[1] in again
    assert not {first[0], first[2]} & set(again)
    again.clear()
    open_official(name, folder, partial=True)
    assert not again


def test_corrections_stay_until_there_is_another_archive(coco, capsys):
    open_official("coco2017", coco, partial=True)
    file = coco / "annotations" / "instances_val2017.json"
    published = file.read_text()
    file.write_text(published.replace("person", "human being"))
    (coco / "val2017" / "000000000001.jpg").unlink()
    sets = open_official("coco2017", coco, partial=True)
    assert sets["val2017"].class_names[0] == "human being"
    said = capsys.readouterr().out
    assert f"1 files were changed since it was unpacked, and stay so (first: {file}" in said
    assert (coco / "val2017" / "000000000001.jpg").is_file()
    with zipfile.ZipFile(coco / "annotations_trainval2017.zip", "a") as archive:
        archive.writestr("annotations/captions_more.json", b"{}")
    open_official("coco2017", coco, partial=True)
    assert file.read_text() == published


@pytest.mark.parametrize("damage", ["cut", "flipped", "outside"])
def test_bad_archives_are_named(coco, damage):
    file = coco / "train2017.zip"
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 3] ^= 1
        file.write_bytes(bytes(data))
    else:
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("../outside.jpg", b"1")
    with pytest.raises(DatasetError, match=r"train2017\.zip"):
        open_official("coco2017", coco, partial=True)
    assert not (coco.parent / "outside.jpg").exists()


def test_a_cut_tar_is_named(voc):
    file = voc / "VOCtest_06-Nov-2007.tar"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(DatasetError, match=r"VOCtest_06-Nov-2007\.tar: is cut off or damaged"):
        open_official("voc0712", voc, partial=True)


def test_the_numbers_are_the_published_ones():
    """From the authors' pages: 118287 + 5000 images; 5011 + 11540 and 4952."""
    assert SETS["coco2017"].splits == {"train2017": 118287, "val2017": 5000}
    assert SETS["voc0712"].splits == {"trainval": 16551, "test": 4952}


def test_options_of_another_kind_are_refused(coco, capsys):
    for words, said in (
        (("--config=shapes_teacher", f"--manual={coco}"), "are of --set"),
        (("--set=coco2017", f"--manual={coco}", "data.fit=64"), "has no effect"),
    ):
        assert main(("prepare-data", *words, "--out=x")) == 1
        assert said in capsys.readouterr().err


# --- in a store ----------------------------------------------------------------------------------


def test_prepared_in_a_store_and_read_from_it(coco, bucket, tmp_path, monkeypatch, store):
    """Records go there whole, and are fetched once to be read; a new set is fetched anew."""
    monkeypatch.setenv("AQDETR_DATA_CACHE", str(tmp_path / "cache"))
    words = ("prepare-data", "--set=coco2017", f"--manual={coco}", f"--out={bucket}/tfds")
    assert main((*words, "--partial")) == 0
    made = TfdsDataset(bucket / "tfds", "train2017")
    assert bytes(made._source[4]["image"]) == jpeg(5)
    fetched = len(list(files_of(tmp_path / "cache")))
    before = len(store.requests)
    assert TfdsDataset(str(bucket / "tfds"), "val2017").fingerprint
    reads = [path for _, path in store.requests[before:] if "alt=media" in path]
    assert not reads
    assert len(list(files_of(tmp_path / "cache"))) == fetched
    # Another one in its place.
    folder = bucket / "tfds" / "aqdetr_detection" / "1.0.0"
    shard = next(path for path in files_of(folder) if "train2017.array_record" in path.name)
    content = shard.read_bytes()
    shard.write_bytes(content[:-7])
    with pytest.raises(DatasetError, match="prepare it again"):
        TfdsDataset(bucket / "tfds", "train2017")
    shard.write_bytes(content)
    assert len(TfdsDataset(bucket / "tfds", "train2017")) == 5


@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_archives_in_a_store(kind, request, bucket):
    folder = request.getfixturevalue(kind)
    for file in folder.iterdir():
        (bucket / "manual" / file.name).write_bytes(file.read_bytes())
    name = {"coco": "coco2017", "voc": "voc0712"}[kind]
    here, there = (
        open_official(name, place, partial=True) for place in (folder, bucket / "manual")
    )
    for split in here:
        assert here[split].fingerprint == there[split].fingerprint
        np.testing.assert_array_equal(here[split][0].image, there[split][0].image)


def test_another_version_is_refused(bucket, tmp_path):
    for place in (as_path(tmp_path), bucket):
        (place / "aqdetr_detection" / "0.9.0").mkdir(parents=True)
        (place / "aqdetr_detection" / "0.9.0" / "dataset_info.json").write_bytes(b"{}")
        with pytest.raises(DatasetError, match=r"version 0\.9\.0 and this program reads 1\.0\.0"):
            TfdsDataset(place, "train")
