"""COCO 2017 and VOC 2007 + 2012 from their archives: small copies in the exact layout."""

from __future__ import annotations

import shutil
import zipfile

import numpy as np
import published_coco
import published_voc
import pytest

from aqdetr_jax.cli import main
from aqdetr_jax.data import official
from aqdetr_jax.data.dataset import DatasetError
from aqdetr_jax.data.official import SETS, VOC_CLASSES, open_official
from aqdetr_jax.data.tfds_builder import TfdsDataset
from aqdetr_jax.paths import as_path, files_of


def packed(module, folder, most=3):
    """(Folder with the archives, images): the first of each split, without the lists of classes."""
    sets = {part: made[:most] for part, made in module.everything(faults=False).items()}
    module.write(folder / "loose", sets)
    for path in (folder / "loose").glob("VOCdevkit/*/ImageSets/Main/*_*.txt"):
        path.unlink()
    module.pack(folder / "loose", folder / "manual")
    return folder / "manual", sets


@pytest.fixture
def coco(tmp_path):
    return packed(published_coco, tmp_path, 5)[0]


@pytest.fixture
def voc(tmp_path):
    return packed(published_voc, tmp_path)[0]


def test_coco_from_archives_to_records(tmp_path, capsys):
    manual, sets = packed(published_coco, tmp_path, 5)
    words = ("prepare-data", "--set=coco2017", f"--manual={manual}", f"--out={tmp_path}/out")
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "'train2017' has 5 images, published are 118287" in said
    assert main((*words, "--partial")) == 0
    for split, pictures in sets.items():
        made = TfdsDataset(tmp_path / "out", split)
        assert len(made) == len(pictures)
        assert bytes(made._source[3]["image"]) == pictures[3].file  # the file's own bytes
        assert made.category_ids == tuple(published_coco.IDS.values())
        assert made.class_names == tuple(published_coco.IDS)
        truth, wanted = made.coco_ground_truth(), published_coco.instances(pictures, split)
        for kind, keys in {
            "images": ("id", "file_name", "height", "width"),
            "annotations": ("image_id", "category_id", "bbox", "area", "iscrowd"),
        }.items():
            for mine, theirs in zip(truth[kind], wanted[kind], strict=True):
                assert [mine[key] for key in keys] == [theirs[key] for key in keys]
    assert main((*words, "--partial")) == 1
    assert "prepared already" in capsys.readouterr().err


def test_voc_from_archives_to_records(tmp_path):
    manual, archives = packed(published_voc, tmp_path)
    sets = open_official("voc0712", manual, partial=True)
    assert [len(part) for part in sets.values()] == [6, 3]
    joined = sets["trainval"]
    assert joined.class_names == sets["test"].class_names == VOC_CLASSES
    assert [joined.image_id(n) for n in range(6)] == [*range(1, 7)]
    assert joined.file_name(3) == "VOC2012/JPEGImages/2008_000085.jpg"
    assert joined.image_path(3).read_bytes() == archives["VOCtrainval_11-May-2012"][0].file
    out = ("--format=coco", f"--out={tmp_path}/out", "--partial")
    assert main(("prepare-data", "--set=voc0712", f"--manual={manual}", *out)) == 0
    assert (tmp_path / "out" / "annotations" / "instances_trainval.json").is_file()


def test_what_is_missing_is_said_with_where_it_goes(coco, tmp_path):
    (coco / "val2017.zip").unlink()
    with pytest.raises(FileNotFoundError, match=r"put there val2017.zip \(or, unpacked, val2017\)"):
        open_official("coco2017", coco, partial=True)
    shutil.copytree(tmp_path / "loose" / "val2017", coco / "val2017")
    assert len(open_official("coco2017", coco, partial=True)["val2017"]) == 5
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
    file.write_text(published.replace('"name": "person"', '"name": "human being"'))
    missing = next((coco / "val2017").iterdir())
    missing.unlink()
    sets = open_official("coco2017", coco, partial=True)
    assert sets["val2017"].class_names[0] == "human being"
    said = capsys.readouterr().out
    assert f"1 files were changed since it was unpacked, and stay so (first: {file}" in said
    assert missing.is_file()
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


def test_prepared_in_a_store_and_read_from_it(bucket, tmp_path, monkeypatch, store):
    """Records go there whole, and are fetched once to be read; a new set is fetched anew."""
    monkeypatch.setenv("AQDETR_DATA_CACHE", str(tmp_path / "cache"))
    manual, sets = packed(published_coco, tmp_path, 5)
    words = ("prepare-data", "--set=coco2017", f"--manual={manual}", f"--out={bucket}/tfds")
    assert main((*words, "--partial")) == 0
    made = TfdsDataset(bucket / "tfds", "train2017")
    assert bytes(made._source[4]["image"]) == sets["train2017"][4].file
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
