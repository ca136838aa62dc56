"""Buckets and resizes that follow from a set, against hand-computed ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sized import Sized

from aqdetr_jax.data import fit as fit_module
from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.transforms import AugmentConfig


def fit(dataset, most=320, stride=16, **augment):
    data = DataConfig(kind="auto", fit=most, augment=AugmentConfig(**augment))
    return fit_module.fitted(data, dataset, stride)


def test_photographs_of_blood_cells():
    """640 x 480 with boxes of 100 pixels: 16 of 0.18 of the root of the area, so the least size."""
    found = fit(Sized([(480, 640)] * 10, side=100.0), crop_probability=0.5)
    # 192 x 256 pixels are 221.7 squared, the most below 224 that three to four fills.
    assert found.buckets == found.eval_buckets == ((192, 256),)
    assert (found.eval_short_side, found.eval_max_size, found.fit) == (192, 256, 0)
    assert found.augment.scales == (160, 176, 192)
    assert found.augment.crop_resize == (192, 224, 256)
    assert found.augment.crop_size == (144, 192)


def test_small_boxes_ask_for_more_pixels_up_to_the_limit():
    # 16 / (30 / 640) = 341 pixels.
    square = [(640, 640)] * 4
    assert fit(Sized(square, side=30.0)).buckets == ((320, 320),)
    assert fit(Sized(square, side=30.0), most=640).buckets == ((320, 320),)  # 341 rounded down
    assert fit(Sized(square, side=20.0), most=640).buckets == ((512, 512),)
    assert fit(Sized(square, side=20.0), most=320).buckets == ((320, 320),)


def test_small_images_are_at_most_doubled():
    assert fit(Sized([(100, 100)] * 4, side=5.0)).buckets == ((192, 192),)
    assert fit(Sized([(20, 20)] * 4, side=5.0)).buckets == ((32, 32),)


def test_a_larger_stride_takes_more_pixels():
    """ResNet-50's 32: twice the sides of a stride of 16."""
    assert fit(Sized([(480, 640)] * 4, side=100.0), most=640, stride=32).buckets == ((384, 512),)


def test_what_has_no_effect_is_not_filled_in():
    assert fit(Sized([(480, 640)]), crop_probability=0.0).augment.crop_resize == ()


@pytest.mark.parametrize("value", [-5, 5, 31])
def test_a_limit_below_one_bucket_is_refused(value):
    with pytest.raises(ValueError, match=r"data\.fit must be 0 or at least 32 pixels"):
        DataConfig(kind="auto", fit=value)


def test_every_frequent_orientation_has_a_bucket():
    mixed = [(480, 640)] * 60 + [(640, 480)] * 35 + [(600, 600)] * 5
    found = fit(Sized(mixed, side=100.0))
    assert found.buckets == ((192, 256), (256, 192))  # one square in twenty gets none
    assert (found.eval_short_side, found.eval_max_size) == (192, 256)


@given(
    ratio=st.floats(0.02, 50, allow_nan=False),
    side=st.integers(32, 1400),
)
def test_a_bucket_is_within_the_area_and_no_better_one_exists(ratio, side):
    height, width = fit_module._bucket(ratio, side)
    assert height % 32 == width % 32 == 0
    assert 32 * 32 <= height * width <= max(side, 32) ** 2
    filled = min(height, width / ratio)
    for h in range(32, side**2 // 32 + 1, 32):  # brute force
        w = 32 * (side**2 // (32 * h))
        assert min(h, w / ratio) <= filled + 1e-9
