"""Augmentation: boxes against pixels, sizes against hand values."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aqdetr_jax.data import transforms as T
from aqdetr_jax.data.dataset import Example


def example(height=40, width=60, boxes=((10, 5, 30, 25), (50, 30, 60, 40))):
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(height)[:, None]
    image[..., 1] = np.arange(width)[None, :]
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    return Example(
        image, boxes, np.arange(len(boxes), dtype=np.int32), np.zeros(len(boxes), bool), 1, "x.png"
    )


@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1066)),  # 800 * 640 / 480 = 1066.67, cut off.
        ((640, 480), 800, 1333, (1066, 800)),
        ((427, 640), 800, 1333, (800, 1199)),  # 1199.06
        ((200, 500), 800, 1333, (533, 1332)),  # Long side binds: round(533.2), then 1332.5.
        ((500, 200), 800, 1333, (1332, 533)),
        ((800, 1066), 800, 1333, (800, 1066)),  # Already there: untouched.
        ((480, 640), 800, None, (800, 1066)),
        ((600, 600), 512, 1333, (512, 512)),
    ],
)
def test_resize_rule_of_detr(size, short, longest, expected):
    assert T.resized_size(*size, short, longest) == expected


@pytest.mark.parametrize(
    ("size", "bucket", "expected"),
    [
        ((100, 200), (128, 256), (100, 200)),  # Never up.
        ((100, 200), (50, 256), (50, 100)),
        ((100, 200), (100, 100), (50, 100)),
        ((3, 1000), (100, 100), (1, 100)),
    ],
)
def test_fitted_size(size, bucket, expected):
    assert T.fitted_size(*size, bucket) == expected


@given(st.tuples(*[st.integers(1, 2000)] * 4))
@settings(max_examples=200)
def test_fitted_size_always_fits(numbers):
    height, width, *bucket = numbers
    h, w = T.fitted_size(height, width, tuple(bucket))
    assert 1 <= h <= min(bucket[0], height)
    assert 1 <= w <= min(bucket[1], width)


def test_flip_by_hand():
    flipped = T.horizontal_flip(example())
    assert flipped.boxes.tolist() == [[30, 5, 50, 25], [0, 30, 10, 40]]
    assert flipped.image[0, :3, 1].tolist() == [59, 58, 57]
    back = T.horizontal_flip(flipped)
    assert np.array_equal(back.image, example().image)
    assert np.array_equal(back.boxes, example().boxes)


def test_crop_by_hand():
    cropped = T.crop(example(), top=10, left=20, height=20, width=30)
    assert cropped.image.shape == (20, 30, 3)
    assert cropped.image[0, 0].tolist() == [10, 20, 0]
    # The first box keeps (20, 10)-(30, 25); the second starts where the window ends.
    assert cropped.boxes.tolist() == [[0, 0, 10, 15]]
    assert cropped.labels.tolist() == [0]
    with pytest.raises(ValueError, match="leaves the image"):
        T.crop(example(), 30, 0, 20, 10)


def test_resize_matches_pillow_and_scales_boxes():
    resized = T.resize(example(), (20, 90))
    oracle = Image.fromarray(example().image).resize((90, 20), Image.Resampling.BILINEAR)
    assert np.array_equal(resized.image, np.asarray(oracle))
    assert resized.boxes.tolist() == [[15, 2.5, 45, 12.5], [75, 15, 90, 20]]


def test_empty_images_pass():
    rng = np.random.default_rng(0)
    config = T.AugmentConfig(
        flip_probability=1, crop_probability=1, crop_size=(10, 20), scales=(16, 24)
    )
    done = T.augment(example(boxes=()), rng, config, (32, 32))
    assert done.boxes.shape == (0, 4)
    assert done.boxes.dtype == np.float32


@given(st.integers(0, 10_000))
@settings(max_examples=60)
def test_boxes_follow_the_pixels(seed):
    """The oracle is the picture: a bright rectangle must end up where its box says."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(60, 120, 2)
    x1, y1 = rng.integers(0, width - 30), rng.integers(0, height - 30)
    x2, y2 = rng.integers(x1 + 12, width + 1), rng.integers(y1 + 12, height + 1)
    start = example(height, width, [(x1, y1, x2, y2)])
    start.image[:] = 0
    start.image[y1:y2, x1:x2] = 255
    config = T.AugmentConfig(
        flip_probability=0.5,
        crop_probability=0.5,
        crop_resize=(60, 80, 100),
        crop_size=(40, 90),
        scales=(48, 64, 100),
        max_size=140,
    )
    done = T.augment(start, rng, config, (96, 96))
    assert done.image.shape[0] <= 96
    assert done.image.shape[1] <= 96
    bright = done.image[..., 0] >= 128
    if not len(done.boxes):
        assert not bright[1:-1, 1:-1].any()
        return
    box = done.boxes[0]
    assert (box >= 0).all()
    if (box[2:] - box[:2]).min() < 3:
        return  # A sliver at the edge of the crop need not reach half brightness.
    rows, columns = np.nonzero(bright.any(1))[0], np.nonzero(bright.any(0))[0]
    found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose(box, found, atol=1.51)


def test_augment_is_a_function_of_its_generator():
    config = T.AugmentConfig(scales=(30, 40, 50), crop_probability=0.5, crop_size=(20, 40))
    a = [T.augment(example(), np.random.default_rng(i), config) for i in range(8)]
    b = [T.augment(example(), np.random.default_rng(i), config) for i in range(8)]
    assert all(np.array_equal(x.image, y.image) for x, y in zip(a, b, strict=True))
    assert len({x.image.shape for x in a}) > 1


def test_default_augmentation_only_flips():
    rng = np.random.default_rng(1)
    for _ in range(6):
        image = T.augment(example(), rng, T.AugmentConfig()).image
        assert np.array_equal(image, example().image) or np.array_equal(
            image, example().image[:, ::-1]
        )


SEEDS = range(200)


def augmented(config):
    """The example of coordinates (40 x 60), augmented with each seed."""
    return [T.augment(example(), np.random.default_rng(seed), config).image for seed in SEEDS]


def mirrored(image):
    """Whether columns fall from left to right."""
    return image[0, 0, 1] > image[0, -1, 1]


@pytest.mark.parametrize(("chance", "least", "most"), [(0, 0, 0), (0.5, 70, 130), (1, 200, 200)])
def test_flips_as_often_as_told(chance, least, most):
    images = augmented(T.AugmentConfig(flip_probability=chance))
    assert least <= sum(map(mirrored, images)) <= most
    assert {image.shape for image in images} == {(40, 60, 3)}


@pytest.mark.parametrize(("chance", "least", "most"), [(0, 0, 0), (0.5, 70, 130), (1, 200, 200)])
def test_crops_as_often_as_told(chance, least, most):
    config = T.AugmentConfig(flip_probability=0, crop_probability=chance, crop_size=(10, 14))
    images = augmented(config)
    cut = [image for image in images if image.shape != (40, 60, 3)]
    assert least <= len(cut) <= most
    for axis in (0, 1) if cut else ():
        # Every side from the least to the most is drawn, both ends included.
        assert {image.shape[axis] for image in cut} == {10, 11, 12, 13, 14}
        # The window can lie anywhere: first row and column are written in the pixels.
        assert len({int(image[0, 0, axis]) for image in cut}) > 15
    # Of the 25 sizes, most: height and width are drawn apart.
    assert not cut or len({image.shape for image in cut}) > 15
    for image in cut:
        row, column, _ = image[0, 0]
        height, width, _ = image.shape
        assert np.array_equal(image, example().image[row : row + height, column : column + width])


def test_crop_keeps_a_side_that_is_short_already():
    config = T.AugmentConfig(flip_probability=0, crop_probability=1, crop_size=(50, 53))
    assert {image.shape[:2] for image in augmented(config)} == {(40, w) for w in range(50, 54)}


def test_all_scales_are_drawn():
    scales = T.AugmentConfig(scales=(20, 30, 50))
    assert {image.shape[:2] for image in augmented(scales)} == {(20, 30), (30, 45), (50, 75)}
    # Before the crop, which here keeps everything.
    crop = T.AugmentConfig(crop_probability=1, crop_resize=(20, 30, 50), crop_size=(99, 99))
    assert {image.shape[:2] for image in augmented(crop)} == {(20, 30), (30, 45), (50, 75)}


def test_coco_recipe_is_that_of_detr():
    # make_coco_transforms("train") in datasets/coco.py of facebookresearch/detr.
    assert dataclasses.asdict(T.DETR_COCO) == {
        "flip_probability": 0.5,
        "scales": (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        "max_size": 1333,
        "crop_probability": 0.5,
        "crop_resize": (400, 500, 600),
        "crop_size": (384, 600),
        "colour_jitter": 0.0,
    }


def test_colour_jitter_stays_in_range_and_is_off_at_zero():
    noisy = example()
    noisy.image[:] = np.random.default_rng(0).integers(0, 256, noisy.image.shape)
    changed = T.colour_jitter(noisy, np.random.default_rng(1), 0.4)
    assert changed.image.dtype == np.uint8
    assert not np.array_equal(changed.image, noisy.image)
    same = T.colour_jitter(noisy, np.random.default_rng(1), 0.0)
    assert np.array_equal(same.image, noisy.image)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flip_probability", 2),
        ("scales", (0,)),
        ("crop_size", (10, 5)),
        ("colour_jitter", 1.0),
    ],
)
def test_bad_parameters(field, value):
    with pytest.raises(ValueError, match=field):
        T.AugmentConfig(**{field: value})
