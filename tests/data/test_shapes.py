"""The generated set: determinism, statistics, cache, and the folder it can be written to."""

import colorsys
import dataclasses

import numpy as np
import pytest
from PIL import Image

from aqdetr_jax.data.coco import CocoFolder
from aqdetr_jax.data.coco_writer import write_coco_folder, write_coco_folders
from aqdetr_jax.data.dataset import DatasetError
from aqdetr_jax.data.shapes import objects as shapes_objects
from aqdetr_jax.data.shapes import render as shapes_render
from aqdetr_jax.data.shapes.dataset import ShapesDataset
from aqdetr_jax.data.shapes.spec import ShapesSpec

COUNT = 600


@pytest.fixture(scope="module")
def many():
    return ShapesDataset("train", num_images=COUNT)


def sides(boxes):
    return boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]


def same(a, b):
    return np.array_equal(a.image, b.image) and np.array_equal(a.boxes, b.boxes)


def test_examples_follow_the_contract(many):
    for i in range(40):
        example = many[i]
        assert example.image.dtype == np.uint8
        assert example.image.shape == (128, 128, 3)
        assert example.boxes.dtype == np.float32
        assert example.boxes.shape == (len(example.labels), 4)
        assert example.labels.dtype == np.int32
        assert not example.iscrowd.any()
        assert (example.image_id, example.file_name) == (i + 1, f"train_{i:06d}.png")
        assert (example.boxes >= 0).all()
        assert (example.boxes <= 128).all()
    assert len(many.class_names) == len(many.category_ids) == 10
    with pytest.raises(IndexError):
        many[COUNT]
    with pytest.raises(IndexError):
        many[-1]


def test_statistics(many):
    boxes = [many[i].boxes for i in range(COUNT)]
    counts = np.array([len(b) for b in boxes])
    assert 4.0 < counts.mean() < 5.0
    assert counts.max() <= many.max_boxes_per_image() == 12
    assert 0.02 < (counts == 0).mean() < 0.065
    width, height = sides(np.concatenate(boxes))
    area = width * height
    assert min(width.min(), height.min()) >= 10
    small, large = (area < 32**2).mean(), (area >= 96**2).mean()
    assert small == pytest.approx(0.40, abs=0.05)
    assert large == pytest.approx(0.15, abs=0.03)
    labels = np.concatenate([many[i].labels for i in range(COUNT)])
    assert np.bincount(labels, minlength=10).min() > 0.07 * len(labels)


def test_occlusion_happens_and_is_limited(many):
    visible = np.concatenate([many.visible_fractions(i) for i in range(COUNT)])
    assert visible.min() >= 0.35
    assert 0.2 < (visible < 0.99).mean() < 0.7


def test_function_of_seed_split_and_index_only(many):
    again = ShapesDataset("train", num_images=3)
    later = [again[2], again[0]]
    assert same(later[0], many[2])
    assert same(later[1], many[0])
    assert not same(ShapesDataset("train", num_images=1, seed=1)[0], many[0])
    assert not same(ShapesDataset("validation", num_images=1)[0], many[0])


def test_examples_are_copies(many):
    many[0].image[:] = 0
    assert many[0].image.any()


def test_fingerprint_covers_every_parameter():
    base = ShapesDataset("train", num_images=2)
    assert base.fingerprint == ShapesDataset("train", num_images=2).fingerprint
    changed = {
        "hue_fidelity": 0.5,
        "texture_fidelity": 0.5,
        "noise": 1.0,
        "blur": 0.0,
        "clutter": 1.0,
        "size_mix": (1.0, 1.0, 0.0),
        "min_side": 11,
        "max_objects": 9,
        "mean_objects": 3.0,
        "empty": 0.1,
        "min_visible": 0.5,
    }
    assert set(changed) == {f.name for f in dataclasses.fields(ShapesSpec)}
    prints = {
        ShapesDataset("train", num_images=2, **{key: value}).fingerprint
        for key, value in changed.items()
    }
    prints |= {
        base.fingerprint,
        ShapesDataset("train", num_images=3).fingerprint,
        ShapesDataset("train", num_images=2, seed=1).fingerprint,
        ShapesDataset("train", num_images=2, size=96).fingerprint,
        ShapesDataset("validation", num_images=2).fingerprint,
    }
    assert len(prints) == len(changed) + 5


def test_size_mix_and_counts_can_be_chosen():
    data = ShapesDataset(
        "train", num_images=150, size_mix=(1, 0, 0), mean_objects=3.0, max_objects=5, empty=0.3
    )
    boxes = [data[i].boxes for i in range(len(data))]
    width, height = sides(np.concatenate(boxes))
    # An object may lose up to a third at the border; none may grow out of its bin.
    assert (width * height < 32**2).all()
    assert max(len(b) for b in boxes) <= 5
    assert 0.2 < np.mean([len(b) == 0 for b in boxes]) < 0.42


def test_a_small_image_has_no_large_objects():
    data = ShapesDataset("train", size=64, num_images=40)
    width, height = sides(np.concatenate([data[i].boxes for i in range(len(data))]))
    assert (width * height < 64**2).all()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"split": "dev"}, "unknown split 'dev'"),
        ({"size": 8}, "size must be"),
        ({"num_images": 0}, "num_images"),
        ({"hue_fidelity": 1.5}, "hue_fidelity"),
        ({"size_mix": (1, 1)}, "size_mix"),
        ({"mean_objects": 20.0}, "mean_objects"),
        ({"noise": -1}, "noise"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(DatasetError, match=message):
        ShapesDataset(**parameters)


@pytest.mark.parametrize("label", range(10))
def test_masks_are_trimmed_and_have_the_wanted_size(label):
    mask = shapes_objects.object_mask(np.random.default_rng(label), label, 60.0, 10)
    solid = mask >= 0.5
    assert solid.any(0)[[0, -1]].all()
    assert solid.any(1)[[0, -1]].all()
    assert np.sqrt(solid.shape[0] * solid.shape[1]) == pytest.approx(60, abs=1.5)


def test_objects_are_turned_every_way():
    """The long axis of an arrow, from the second moments of its mask, over many draws."""
    rng, axes = np.random.default_rng(0), []
    for _ in range(200):
        mask = shapes_objects.object_mask(rng, shapes_objects.CLASS_NAMES.index("arrow"), 40.0, 10)
        y, x = np.indices(mask.shape)
        weight = mask / mask.sum()
        x, y = x - (weight * x).sum(), y - (weight * y).sum()
        covariance = (weight * x * y).sum()
        axes.append(0.5 * np.arctan2(2 * covariance, (weight * (x**2 - y**2)).sum()))
    # Doubled angles of a uniform turn point everywhere: their mean is near the centre.
    assert np.abs(np.mean(np.exp(2j * np.array(axes)))) < 0.25
    quarters = np.histogram(axes, bins=4, range=(-np.pi / 2, np.pi / 2))[0]
    assert quarters.min() > 25


def test_boxes_are_tight_around_the_drawn_pixels(monkeypatch):
    """Oracle: single objects drawn in a colour that nothing else has, found again by it."""
    monkeypatch.setattr(
        shapes_render, "fill", lambda rng, spec, label, shape, behind: np.full((*shape, 3), 1e6)
    )
    monkeypatch.setattr(shapes_render, "_camera", lambda rng, spec, canvas, size: canvas)
    data = ShapesDataset(num_images=30, mean_objects=1, max_objects=1, clutter=0, empty=0)
    for i in range(30):
        drawn = data[i].image[..., 0] > 5e5 - 200
        rows, columns = np.nonzero(drawn.any(1))[0], np.nonzero(drawn.any(0))[0]
        expected = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert data[i].boxes.tolist() == [expected]


def test_colour_and_texture_follow_the_class_as_far_as_told():
    rng = np.random.default_rng(0)
    ground = np.full((20, 20, 3), 128, np.float32)

    def hue_and_spread(**spec):
        colours = shapes_objects.fill(rng, ShapesSpec(**spec), 0, (20, 20), ground)
        red, green, blue = colours[0, 0] / 255
        return colorsys.rgb_to_hsv(red, green, blue)[0], np.ptp(colours, axis=(0, 1)).max()

    sure = [hue_and_spread(hue_fidelity=1, texture_fidelity=1) for _ in range(60)]
    # Class 0 is plain and red.
    assert all(spread == 0 for _, spread in sure)
    near = [abs((hue - 0.02 + 0.5) % 1 - 0.5) for hue, _ in sure]
    assert max(near) < 0.12
    free = [hue_and_spread(hue_fidelity=0, texture_fidelity=0) for _ in range(60)]
    assert np.mean([spread > 0 for _, spread in free]) > 0.6
    near = [abs((hue - 0.02 + 0.5) % 1 - 0.5) for hue, _ in free]
    assert max(near) > 0.2


def test_hole_of_a_ring_is_no_part_of_it():
    mask = shapes_objects.object_mask(np.random.default_rng(0), 1, 60.0, 10)
    assert mask[mask.shape[0] // 2, mask.shape[1] // 2] == 0


def test_cache_round_trip(tmp_path):
    first = ShapesDataset("train", num_images=5, cache_dir=tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    stamp = path.stat().st_mtime_ns
    second = ShapesDataset("train", num_images=5, cache_dir=tmp_path / "cache")
    assert path.stat().st_mtime_ns == stamp
    plain = ShapesDataset("train", num_images=5)
    for i in range(5):
        assert same(first[i], plain[i])
        assert same(second[i], plain[i])
    assert second.coco_ground_truth() == plain.coco_ground_truth()


@pytest.mark.parametrize("damage", [b"", b"not a zip", None])
def test_broken_cache_is_made_anew(tmp_path, damage):
    ShapesDataset("train", num_images=3, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:2000] if damage is None else damage)
    again = ShapesDataset("train", num_images=3, cache_dir=tmp_path)
    assert same(again[2], ShapesDataset("train", num_images=3)[2])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with np.load(path) as stored:
        assert str(stored["fingerprint"]) == again.fingerprint


def test_coco_folder_round_trip(tmp_path):
    data = ShapesDataset("validation", num_images=6)
    annotation_file = write_coco_folder(data, tmp_path / "out")
    back = CocoFolder(root=tmp_path / "out", split="validation")
    assert annotation_file == back.annotation_file
    assert back.class_names == data.class_names
    for i in range(6):
        assert same(back[i], data[i])
        assert np.array_equal(back[i].labels, data[i].labels)
    truth, expected = back.coco_ground_truth(), data.coco_ground_truth()
    assert truth["annotations"] == expected["annotations"]
    with Image.open(back.image_path(0)) as picture:
        assert picture.format == "PNG"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["annotations", "validation"]
    with pytest.raises(DatasetError, match="exists already"):
        write_coco_folder(data, tmp_path / "out")


def test_interrupted_folder_leaves_nothing_behind(tmp_path, monkeypatch):
    data = ShapesDataset("train", num_images=4)
    data.coco_ground_truth()

    def fail(index):
        raise RuntimeError("stop")

    monkeypatch.setattr(data, "_scene", lambda i, real=data._scene: fail(i) if i == 2 else real(i))
    monkeypatch.setattr(data, "coco_ground_truth", ShapesDataset(num_images=4).coco_ground_truth)
    with pytest.raises(RuntimeError, match="stop"):
        write_coco_folder(data, tmp_path)
    assert not list(tmp_path.iterdir())
    # Nor does a split before it, which would be in the way of the next try.
    with pytest.raises(RuntimeError, match="stop"):
        write_coco_folders([ShapesDataset("validation", num_images=2), data], tmp_path / "out")
    assert not list(tmp_path.iterdir())
