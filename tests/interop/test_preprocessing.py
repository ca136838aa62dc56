"""The padded sizes that ``convert`` writes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aqdetr_jax.checkpoint.model_folder import InputRule
from aqdetr_jax.data.eval_batches import EvalBatches
from aqdetr_jax.data.pipeline import PipelineConfig
from aqdetr_jax.data.shapes.dataset import ShapesDataset
from aqdetr_jax.interop.preprocessing import ImageRule, buckets


class Photographs(ShapesDataset):
    """Sizes without pixels."""

    def __init__(self, sizes):
        super().__init__("train", num_images=len(sizes))
        self.sizes = sizes

    def image_size(self, index):
        return self.sizes[index]


def sizes_taken(rule, sizes):
    """The padded size of each image, in their order."""
    input_rule = InputRule(buckets(rule), rule.short_side, rule.long_side)
    config = PipelineConfig(batch_size=1, **input_rule.pipeline())
    plan = EvalBatches(Photographs(sizes), config)._batches
    taken = {row: config.buckets[bucket] for bucket, (row,) in plan}
    return [taken[i] for i in range(len(sizes))]


@pytest.mark.parametrize(
    ("size", "padded"),
    [
        ((480, 640), (800, 1088)),  # 800 x 1066
        ((3024, 4032), (800, 1088)),
        ((640, 480), (1088, 800)),
        ((427, 640), (800, 1216)),  # 800 x 1199
        ((640, 427), (1216, 800)),
        ((500, 500), (800, 800)),
        ((480, 600), (800, 1088)),
        ((1080, 1920), (800, 1344)),  # 750 x 1333
        ((1000, 300), (1344, 800)),
    ],
)
def test_photographs_take_the_size_of_their_shape(size, padded):
    assert sizes_taken(ImageRule(), [size]) == [padded]


def test_no_image_is_shrunk_and_common_shapes_waste_little():
    rng = np.random.default_rng(0)
    images = [tuple(map(int, rng.integers(200, 2000, 2))) for _ in range(300)]
    for rule in (ImageRule(), ImageRule(480, 800), ImageRule(100, 101)):
        for (height, width), (high, wide) in zip(images, sizes_taken(rule, images), strict=True):
            scale = min(rule.short_side / min(height, width), rule.long_side / max(height, width))
            assert math.floor(height * scale) <= high
            assert math.floor(width * scale) <= wide
            assert high % 32 == wide % 32 == 0
    assert buckets(ImageRule(None, None)) == buckets(ImageRule())
    assert len(buckets(ImageRule())) == 7
    assert buckets(ImageRule(100, 101)) == ((128, 128),)
