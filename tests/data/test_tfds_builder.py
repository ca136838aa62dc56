"""TFDS round trip on ArrayRecord, without TensorFlow."""

import io
import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from aqdetr_jax.data import tfds_builder
from aqdetr_jax.data.coco import CocoFolder
from aqdetr_jax.data.dataset import DatasetError, ImageReadError
from aqdetr_jax.data.pipeline import PipelineConfig, make_train_pipeline
from aqdetr_jax.data.shapes.dataset import ShapesDataset
from aqdetr_jax.data.tfds_builder import TfdsDataset, prepare


@pytest.fixture(scope="module")
def shapes():
    return {
        "train": ShapesDataset("train", num_images=9),
        "validation": ShapesDataset("validation", num_images=4),
    }


@pytest.fixture(scope="module")
def prepared(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    prepare(shapes, folder)
    return folder


def test_round_trip(shapes, prepared):
    for split, source in shapes.items():
        back = TfdsDataset(prepared, split)
        assert back.name == f"tfds/{split}"
        assert back.class_names == source.class_names
        assert back.category_ids == source.category_ids
        assert back.coco_ground_truth() == source.coco_ground_truth()
        assert len(back) == len(source)
        for i in range(len(source)):
            for field in ("image", "boxes", "labels", "iscrowd"):
                a, b = getattr(back[i], field), getattr(source[i], field)
                assert a.dtype == b.dtype
                assert np.array_equal(a, b)
            assert (back[i].image_id, back[i].file_name) == (
                source[i].image_id,
                source[i].file_name,
            )
    batch = next(make_train_pipeline(back, PipelineConfig(4, ((128, 128),), num_threads=0)))
    assert sorted(batch["image_index"].tolist()) == [0, 1, 2, 3]


def test_any_tfds_reader_can_read_it(shapes, prepared):
    """Records are complete: TFDS's own generic reader finds images and objects in them."""
    folder = prepared / "aqdetr_detection" / "1.0.0"
    source = tfds.builder_from_directory(folder).as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    stored = source[2]
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(stored["image"]))), shapes["train"][2].image
    )
    objects = stored["objects"]
    boxes = np.asarray(
        [o["bbox"] for o in objects] if isinstance(objects, list) else objects["bbox"]
    )
    assert np.array_equal(boxes.reshape(-1, 4), shapes["train"][2].boxes)


def test_odd_images_ids_and_drops_survive(tmp_path):
    images = tmp_path / "in" / "some"
    images.mkdir(parents=True)
    Image.new("CMYK", (30, 20), (0, 99, 0, 0)).save(images / "a.jpg")
    rgb = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(rgb).save(images / "b.jpg")
    content = {
        "images": [
            {"id": "x", "file_name": "a.jpg", "height": 20, "width": 30},
            {"id": "y", "file_name": "b.jpg", "height": 20, "width": 30},
        ],
        "annotations": [
            {"id": 5, "image_id": "x", "category_id": 7, "bbox": [0.1, 2.7, 3.3, 40.2], "area": 9},
            {"id": 6, "image_id": "x", "category_id": 7, "bbox": [1, 2, 3, 0]},
            {"id": 8, "image_id": "y", "category_id": 4, "bbox": [1, 2, 3, 3], "iscrowd": 1},
        ],
        "categories": [{"id": 7, "name": "s"}, {"id": 4, "name": "f"}],
    }
    (tmp_path / "in" / "annotations").mkdir()
    (tmp_path / "in" / "annotations" / "instances_some.json").write_text(json.dumps(content))
    source = CocoFolder(root=tmp_path / "in", split="some")
    prepare(source, tmp_path / "out")
    back = TfdsDataset(tmp_path / "out", "some")
    assert back.fingerprint == source.fingerprint
    assert back.drops == source.drops == {"zero_area": 1}
    assert back.drop_examples == source.drop_examples
    assert back.clipped == source.clipped == 1
    for i in range(2):
        assert np.array_equal(back[i].image, source[i].image)
        assert np.array_equal(back[i].boxes, source[i].boxes)
        assert np.array_equal(back[i].iscrowd, source[i].iscrowd)
    stored = back._source[1]["image"]
    assert bytes(stored) == (images / "b.jpg").read_bytes()  # The file's own bytes.


def test_errors(shapes, prepared, tmp_path):
    with pytest.raises(FileNotFoundError, match="no prepared dataset in"):
        TfdsDataset(tmp_path, "train")
    with pytest.raises(
        DatasetError, match=r"unknown split 'dev' \(there are: train, validation; config"
    ):
        TfdsDataset(prepared, "dev")
    with pytest.raises(DatasetError, match="prepared already"):
        prepare(shapes, prepared)
    with pytest.raises(DatasetError, match="no dataset"):
        prepare({}, tmp_path)
    other = ShapesDataset("train", num_images=1)
    other.class_names = tuple(reversed(other.class_names))
    with pytest.raises(DatasetError, match="disagree on classes"):
        prepare({"train": shapes["train"], "other": other}, tmp_path)


SHARD = "aqdetr_detection-train.array_record-00000-of-00001"
DAMAGES = {
    "missing": lambda file, data: file.unlink(),
    "empty": lambda file, data: file.write_bytes(b""),
    "cut": lambda file, data: file.write_bytes(data[: 2 * len(data) // 3]),
    "one byte short": lambda file, data: file.write_bytes(data[:-1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [SHARD, "dataset_info.json", "features.json", "metadata.json"])
def test_a_partly_copied_folder_names_the_file(prepared, tmp_path, name, damage):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "aqdetr_detection" / "1.0.0" / name
    DAMAGES[damage](file, file.read_bytes())
    with pytest.raises(DatasetError, match="prepare it again") as caught:
        TfdsDataset(tmp_path, "train")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, ImageReadError)  # Nothing that a run may skip.


def test_metadata_of_another_program_are_refused(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "aqdetr_detection" / "1.0.0" / "metadata.json"
    for content, message in (([], "is no JSON object"), ({"train": {}}, "has no 'clipped'")):
        file.write_text(json.dumps(content))
        with pytest.raises(DatasetError, match=message):
            TfdsDataset(tmp_path, "train")


def test_damage_that_shows_when_reading_names_the_file(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "aqdetr_detection" / "1.0.0" / SHARD
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 50] = bytes(50)
    file.write_bytes(bytes(data))
    damaged = TfdsDataset(tmp_path, "train")
    whole = TfdsDataset(prepared, "train")
    errors = []
    for i in range(len(whole)):
        try:
            assert np.array_equal(damaged[i].image, whole[i].image)
        except ImageReadError as error:
            errors.append(str(error))
    assert errors
    assert all(f"{file}: missing or damaged, record" in error for error in errors)


def test_a_failed_preparation_leaves_nothing(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(
        tfds_builder, "_encoded", lambda *a: (_ for _ in ()).throw(RuntimeError("stop"))
    )
    with pytest.raises(RuntimeError, match="stop"):
        prepare(shapes, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_preparation_left_goes(shapes, tmp_path):
    left = tmp_path / "aqdetr_detection" / ".1.0.0.partial" / "aqdetr_detection"
    left.mkdir(parents=True)
    (left / "shard").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="no prepared dataset"):
        TfdsDataset(tmp_path, "train")
    shown = []
    made = prepare(shapes, tmp_path, progress=lambda done, total: shown.append((done, total)))
    assert [path.name for path in made.parent.iterdir()] == ["1.0.0"]
    assert shown[-1] == (len(shown), len(shown))
    assert len(shown) == sum(map(len, shapes.values()))


def test_tensorflow_is_never_imported(run_python):
    run_python(
        """
        import sys, tempfile
        from aqdetr_jax.data.open import load_dataset
        from aqdetr_jax.data.pipeline import PipelineConfig, make_train_pipeline
        from aqdetr_jax.data.tfds_builder import prepare
        with tempfile.TemporaryDirectory() as folder:
            prepare(load_dataset("shapes", num_images=3), folder)
            data = load_dataset("tfds", data_dir=folder, split="train")
            iterator = make_train_pipeline(data, PipelineConfig(2, ((128, 128),)))
            assert next(iterator)["images"].any()
            iterator.close()
        assert "tensorflow" not in sys.modules
        """,
        devices=1,
    )
