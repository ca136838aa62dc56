"""The Grain pipeline: order, resume, process counts, padding, buckets, unreadable images."""

import dataclasses

import numpy as np
import pytest

from aqdetr_jax.data.coco import CocoFolder
from aqdetr_jax.data.coco_writer import write_coco_folder
from aqdetr_jax.data.dataset import DatasetError, Example, ImageReadError
from aqdetr_jax.data.eval_batches import EvalBatches
from aqdetr_jax.data.pipeline import (
    PipelineConfig,
    make_train_pipeline,
    train_bucket,
    train_map_dataset,
)
from aqdetr_jax.data.shapes.dataset import ShapesDataset
from aqdetr_jax.data.transforms import AugmentConfig


class ArrayDataset(ShapesDataset):
    """Plain images of given sizes, all pixels equal to the index + 1; some may be unreadable."""

    def __init__(self, sizes, boxes=(), crowd=None, broken=()):
        super().__init__("train", num_images=max(len(sizes), 1))
        self._num_images = len(sizes)
        self.sizes, self.boxes, self.broken = sizes, np.asarray(boxes, np.float32), set(broken)
        self.crowd = np.zeros(len(self.boxes), bool) if crowd is None else np.asarray(crowd)

    def __getitem__(self, index):
        if index in self.broken:
            raise ImageReadError(f"broken_{index}.png: cannot be decoded")
        image = np.full((*self.sizes[index], 3), index + 1, np.uint8)
        return Example(
            image,
            self.boxes.reshape(-1, 4).copy(),
            np.arange(len(self.boxes), dtype=np.int32) % 10,
            self.crowd.copy(),
            index,
            f"{index}.png",
        )

    def image_size(self, index):
        return self.sizes[index]

    def max_boxes_per_image(self):
        return int((~self.crowd).sum())


@pytest.fixture(scope="module")
def shapes():
    return ShapesDataset("train", num_images=10)


def config(**kwargs):
    values = {
        "batch_size": 4,
        "buckets": ((128, 128),),
        "max_boxes": 16,
        "num_threads": 0,
        "prefetch": 0,
        "augment": AugmentConfig(
            scales=(96, 112, 128), crop_probability=0.5, crop_size=(80, 128), colour_jitter=0.2
        ),
    }
    return PipelineConfig(**(values | kwargs))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_batch_follows_the_contract(shapes):
    batch = next(make_train_pipeline(shapes, config()))
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "images": ((4, 128, 128, 3), "uint8"),
        "mask": ((4, 128, 128), "bool"),
        "boxes": ((4, 16, 4), "float32"),
        "labels": ((4, 16), "int32"),
        "valid": ((4, 16), "bool"),
        "image_index": ((4,), "int32"),
        "size": ((4, 2), "int32"),
        "original_size": ((4, 2), "int32"),
    }
    for row in range(4):
        h, w = batch["size"][row]
        assert batch["mask"][row, :h, :w].all()
        assert batch["mask"][row].sum() == h * w
        assert not batch["images"][row][~batch["mask"][row]].any()
        valid = batch["valid"][row]
        assert not batch["boxes"][row][~valid].any()
        assert not batch["labels"][row][~valid].any()
        assert (batch["boxes"][row][valid] > 0).all()
        assert (batch["boxes"][row][valid] <= 1).all()


def test_boxes_are_normalised_by_the_unpadded_size():
    data = ArrayDataset([(40, 80)], boxes=[(20, 10, 60, 30), (0, 0, 80, 40)])
    batch = next(EvalBatches(data, config(batch_size=1, buckets=((64, 96),))).__iter__())
    assert batch["size"].tolist() == [[40, 80]]
    assert batch["boxes"][0, :2].tolist() == [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]
    assert batch["mask"][0, :40, :80].all()
    assert batch["mask"].sum() == 40 * 80


@pytest.mark.parametrize("threads", [0, 3])
def test_resume_equals_straight(shapes, threads):
    straight = take(make_train_pipeline(shapes, config()), 8)
    resumed = make_train_pipeline(
        shapes, config(start_step=5, num_threads=threads, prefetch=2 * threads)
    )
    for a, b in zip(straight[5:], take(resumed, 3), strict=True):
        assert_equal(a, b)
    resumed.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A COCO folder of twelve images, the fifth of which is cut off."""
    root = tmp_path_factory.mktemp("coco")
    write_coco_folder(ShapesDataset("train", num_images=12), root)
    images = sorted((root / "train").iterdir())
    images[4].write_bytes(images[4].read_bytes()[:200])
    return CocoFolder(root=root, split="train"), images[4].name


def test_worker_processes_change_nothing(folder):
    """Nor do they lose what was left out."""
    data, broken = folder
    given = {"on_error": "skip", "max_boxes": 2, "allow_truncation": True, "start_step": 2}
    alone = make_train_pipeline(data, config(**given))
    shared = make_train_pipeline(data, config(**given, workers=2, num_threads=1, prefetch=2))
    try:
        for a, b in zip(take(alone, 7), take(shared, 7), strict=True):
            assert_equal(a, b)
    finally:
        shared.close()
    assert shared.stats.truncated_boxes >= alone.stats.truncated_boxes > 0  # read ahead
    assert shared.stats.skipped_images == alone.stats.skipped_images == 1
    assert broken in shared.stats.summary()


def test_an_error_in_a_worker_names_the_image(folder):
    data, broken = folder
    batches = make_train_pipeline(data, config(workers=1, num_threads=1, prefetch=1))
    try:
        with pytest.raises(Exception, match=broken):
            take(batches, 4)
    finally:
        batches.close()


def test_seed_changes_order_and_epochs_differ(shapes):
    def order(seed):
        batches = take(make_train_pipeline(shapes, config(batch_size=5, seed=seed)), 4)
        return np.concatenate([b["image_index"] for b in batches])

    first, other = order(0), order(1)
    assert not np.array_equal(first, other)
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10))
    assert not np.array_equal(first[:10], first[10:])


@pytest.mark.parametrize("processes", [2, 4])
def test_same_images_for_any_number_of_processes(shapes, processes):
    """Rows are dealt out like cards; pixels, boxes and buckets are bit for bit the same."""
    settings = config(batch_size=8, buckets=((128, 128), (96, 128), (128, 96)))
    alone = train_map_dataset(shapes, settings)
    parts = [
        train_map_dataset(
            shapes, dataclasses.replace(settings, process_index=r, process_count=processes)
        )
        for r in range(processes)
    ]
    for step in (0, 1, 2, 7):
        whole = alone[step]
        for r, part in enumerate(parts):
            mine = part[step]
            assert_equal(mine, {key: value[r::processes] for key, value in whole.items()})


def test_bucket_is_a_function_of_seed_and_step(shapes):
    settings = config(buckets=((128, 128), (96, 128)), seed=3)
    choice = [train_bucket(settings, step) for step in range(40)]
    assert set(choice) == {0, 1}
    assert choice == [train_bucket(settings, step) for step in range(40)]
    assert choice != [train_bucket(dataclasses.replace(settings, seed=4), s) for s in range(40)]
    batches = take(make_train_pipeline(shapes, settings), 6)
    for step, batch in enumerate(batches):
        assert batch["images"].shape[1:3] == settings.buckets[choice[step]]


def test_images_are_shrunk_to_the_bucket_and_never_enlarged():
    data = ArrayDataset([(100, 200), (20, 30)], boxes=[(0, 0, 20, 20)])
    settings = config(batch_size=2, buckets=((64, 64),), augment=AugmentConfig())
    batch = next(make_train_pipeline(data, settings))
    sizes = {int(i): tuple(s) for i, s in zip(batch["image_index"], batch["size"], strict=True)}
    assert sizes == {0: (32, 64), 1: (20, 30)}
    row = batch["image_index"].tolist().index(0)
    assert batch["original_size"][row].tolist() == [100, 200]
    assert batch["boxes"][row, 0].tolist() == pytest.approx([0.05, 0.1, 0.1, 0.2])


def test_crowd_is_no_target():
    data = ArrayDataset([(64, 64)], boxes=[(0, 0, 9, 9), (5, 5, 30, 30)], crowd=[True, False])
    batch = next(make_train_pipeline(data, config(batch_size=1, augment=AugmentConfig())))
    assert batch["valid"].sum() == 1
    assert batch["labels"][0, 0] == 1


def test_too_many_boxes_are_refused_or_counted():
    boxes = [(i, i, i + 10, i + 10) for i in range(7)]
    data = ArrayDataset([(64, 64)] * 3, boxes=boxes)
    settings = config(batch_size=3, max_boxes=5)
    with pytest.raises(DatasetError, match=r"up to 7 boxes but .* --config\.data\.max_boxes=7,"):
        make_train_pipeline(data, settings)
    allowed = dataclasses.replace(settings, allow_truncation=True, augment=AugmentConfig())
    iterator = make_train_pipeline(data, allowed)
    batch = next(iterator)
    assert batch["valid"].all()
    assert iterator.stats.truncated_boxes == 3 * 2


def test_empty_dataset_is_refused():
    data = ArrayDataset([])
    for make in (make_train_pipeline, EvalBatches):
        with pytest.raises(DatasetError, match="shapes/train: the dataset has no images"):
            make(data, config())


@pytest.mark.parametrize("threads", [0, 2])
def test_unreadable_image_stops_the_run_and_is_named(threads):
    data = ArrayDataset([(32, 32)] * 4, broken=[2])
    iterator = make_train_pipeline(
        data, config(num_threads=threads, prefetch=threads, augment=AugmentConfig())
    )
    with pytest.raises(ImageReadError, match=r"broken_2\.png.*--config\.data\.on_error=skip"):
        next(iterator)
    with pytest.raises(ImageReadError, match=r"broken_2\.png"):
        list(EvalBatches(data, config()))


def test_unreadable_image_can_be_skipped_the_same_way_everywhere():
    data = ArrayDataset([(32, 32)] * 4, broken=[2])
    settings = config(on_error="skip", augment=AugmentConfig())
    iterator = make_train_pipeline(data, settings)
    assert sorted(next(iterator)["image_index"].tolist()) == [0, 1, 3, 3]
    for _ in range(3):  # The same image comes by again and again.
        next(iterator)
    assert iterator.stats.skipped_images == len(iterator.stats.skipped_names) == 1
    assert "broken_2.png" in iterator.stats.skipped_names[0]
    again = make_train_pipeline(data, settings)
    assert_equal(next(again), next(make_train_pipeline(data, settings)))
    evaluation = EvalBatches(data, settings)
    (batch,) = list(evaluation)
    assert batch["image_index"].tolist() == [0, 1, -1, 3]
    list(evaluation)
    assert evaluation.stats.skipped_images == len(evaluation.stats.skipped_names) == 1
    assert evaluation.stats.summary() == f"1 unreadable image ({evaluation.stats.skipped_names[0]})"


def test_a_dataset_of_unreadable_images_ends_in_an_error():
    data = ArrayDataset([(32, 32)] * 3, broken=[0, 1, 2])
    with pytest.raises(ImageReadError, match="3 images in a row cannot be read"):
        next(make_train_pipeline(data, config(on_error="skip")))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_sees_every_image_once(shapes, processes):
    seen, lengths = [], set()
    for r in range(processes):
        batches = EvalBatches(shapes, config(process_index=r, process_count=processes))
        lengths.add(len(batches))
        for batch in batches:
            assert len(batch["image_index"]) == 4 // processes
            seen += batch["image_index"].tolist()
            filler = batch["image_index"] < 0
            assert batch["mask"][filler].all()
            assert not batch["images"][filler].any()
            assert not batch["valid"][filler].any()
    assert lengths == {3}
    assert sorted(seen) == [-1, -1, *range(10)]


def test_evaluation_is_in_order_unaugmented_and_repeatable(shapes):
    evaluation = EvalBatches(shapes, config(num_threads=2, prefetch=2))
    first, second = list(evaluation), list(evaluation)
    for a, b in zip(first, second, strict=True):
        assert_equal(a, b)
    index = np.concatenate([b["image_index"] for b in first])
    assert index.tolist() == [*range(10), -1, -1]
    assert np.array_equal(first[0]["images"][1], shapes[1].image)
    x1, y1, x2, y2 = shapes[1].boxes.T / 128
    expected = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1)
    np.testing.assert_allclose(first[0]["boxes"][1, : len(expected)], expected, atol=1e-6)


def test_evaluation_groups_by_bucket_without_extra_shrinking():
    sizes = [(60, 100), (100, 60), (60, 100), (60, 60), (200, 200)]
    settings = config(batch_size=2, buckets=((100, 128), (128, 100), (64, 64)))
    batches = list(EvalBatches(ArrayDataset(sizes), settings))
    where = {}
    for batch in batches:
        for index, size in zip(batch["image_index"], batch["size"], strict=True):
            if index >= 0:
                where[int(index)] = (batch["images"].shape[1:3], tuple(size.tolist()))
    assert where[0][1] == (60, 100)
    assert where[1][1] == (100, 60)
    assert where[3] == ((64, 64), (60, 60))
    assert where[4][1] == (100, 100)  # Fits nowhere: shrunk as little as possible.
    assert len(where) == 5


def test_evaluation_resize_rule():
    settings = config(batch_size=1, buckets=((100, 133),), eval_short_side=80, eval_max_size=133)
    (batch,) = list(EvalBatches(ArrayDataset([(48, 64)]), settings))
    assert batch["size"].tolist() == [[80, 106]]
    assert batch["original_size"].tolist() == [[48, 64]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 3, "process_count": 2}, "multiple of process_count"),
        ({"process_index": 2, "process_count": 2}, "process_index 2"),
        ({"buckets": ()}, "buckets"),
        ({"max_boxes": 0}, "max_boxes"),
        ({"on_error": "ignore"}, "on_error"),
        ({"start_step": -1}, "start_step"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_parameters(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)
