"""Resizing and mirroring of pixels, against Pillow's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aqdetr_jax.data import resampling as R

SIZES = [(800, 1066), (480, 901), (300, 320), (100, 133), (37, 31)]


def photograph(height=240, width=320):
    """Smooth patches with noise on them, uint8 [height, width, 3]."""
    rng = np.random.default_rng(0)
    patches = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    smooth = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC), int)
    return np.clip(smooth + rng.normal(0, 10, smooth.shape), 0, 255).astype(np.uint8)


def pillows(image, size):
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def defined(image, size):
    """The formula in float64: triangles as wide as a pixel of the coarser grid."""

    def weights(outputs, inputs):
        scale = inputs / outputs
        centers = (np.arange(outputs)[:, None] + 0.5) * scale
        triangle = 1 - np.abs(centers - (np.arange(inputs) + 0.5)) / max(scale, 1.0)
        positive = np.clip(triangle, 0, None)
        return positive / positive.sum(axis=1, keepdims=True)

    rows = np.tensordot(weights(size[0], image.shape[0]), image.astype(float), (1, 0))
    columns = weights(size[1], image.shape[1])
    return np.tensordot(rows, columns, (1, 1)).transpose(0, 2, 1)


# Bytes are rounded after each pass, by half a step; the rest is that of the weights' 16 bits.
ROUNDING = 1.02


@pytest.mark.parametrize("size", SIZES)
def test_fast_pixels_are_pillows_but_for_rounding(size):
    fast, wanted = R.resize_fast(photograph(), size).astype(int), pillows(photograph(), size)
    assert fast.shape == (*size, 3)
    assert np.abs(fast - wanted).max() <= 1
    assert np.mean(fast != wanted) < 0.01
    assert abs(np.mean(fast - wanted)) < 0.002  # to neither side
    assert np.array_equal(R.resize_exact(photograph(), size), wanted)


@given(st.tuples(*[st.integers(1, 70)] * 4), st.integers(0, 99))
@settings(max_examples=60)
def test_any_size_of_noise(sizes, seed):
    height, width, *size = sizes
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    fast = R.resize_fast(image, tuple(size)).astype(int)
    assert np.abs(fast - pillows(image, size)).max() <= 2  # where Pillow takes columns first
    if size == [height, width]:
        assert np.array_equal(fast, image)


@given(st.tuples(*[st.integers(8, 150)] * 4), st.tuples(*[st.floats(0, 1)] * 4))
@settings(max_examples=100)
def test_a_window_is_a_part_of_the_whole(sizes, shares):
    height, width, *size = sizes
    image = photograph()[:height, :width]
    high, wide = (1 + int(share * (side - 1)) for share, side in zip(shares, size, strict=False))
    top, left = int(shares[2] * (size[0] - high)), int(shares[3] * (size[1] - wide))
    part = R.resize_fast(image, tuple(size), (top, left, high, wide)).astype(int)
    whole = R.resize_fast(image, tuple(size))[top : top + high, left : left + wide]
    assert part.shape == (high, wide, 3)
    # The largest weight of a part decides how finely its weights are rounded, so that it need not
    # be byte for byte the whole's, only as near to what is defined.
    wanted = defined(image, size)[top : top + high, left : left + wide]
    assert np.abs(part - wanted).max() <= ROUNDING
    assert np.abs(whole - wanted).max() <= ROUNDING


@pytest.mark.skipif(R.simd is None, reason="cykooz-resizer has no wheel for this platform")
def test_every_instruction_set_gives_the_same(monkeypatch):
    usual, results = R.simd.Resizer().cpu_extensions, {}
    for extensions in R.simd.CpuExtensions:
        made = R.simd.Resizer()
        made.cpu_extensions = extensions  # kept as it is where the processor lacks them
        monkeypatch.setattr(R.simd, "Resizer", lambda made=made: made)
        results[made.cpu_extensions] = R.resize_fast(photograph(), (333, 500))
    assert usual in results
    assert len(results) > 1
    assert all(np.array_equal(results[usual], other) for other in results.values())


def test_without_the_wheel_it_is_pillow(monkeypatch):
    monkeypatch.setattr(R, "simd", None)
    for size in SIZES:
        assert np.array_equal(R.resize_fast(photograph(), size), pillows(photograph(), size))
        part = R.resize_fast(photograph(), size, (3, 5, 20, 16))
        assert np.array_equal(part, pillows(photograph(), size)[3:23, 5:21])


@pytest.mark.parametrize("window", [np.s_[:, :], np.s_[10:21, 5:40], np.s_[:1, :1]])
def test_mirrored_and_views(window):
    image = photograph()[window]
    assert np.array_equal(R.mirrored(image), image[:, ::-1])
    assert np.array_equal(R.resize_fast(image, (50, 60)), R.resize_fast(image.copy(), (50, 60)))
