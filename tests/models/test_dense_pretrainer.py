"""The dense head's boxes by hand, and the parameters it hands on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from aqdetr_jax.losses.dense import dense_assignment
from aqdetr_jax.losses.targets import Targets
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.dense import DensePretrainer
from aqdetr_jax.models.detr import Detr
from aqdetr_jax.models.resnet import BackboneConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = DetrConfig(
    BackboneConfig("basic", (1,), (4,), (2,), (1,), 4, 3, 2, False),
    num_classes=2,
    num_queries=3,
    dim=8,
    heads=2,
    encoder_layers=1,
    decoder_layers=1,
    ffn=4,
)
# Stride 4. Bucket 16 x 24 is 4 x 6 cells; the image's 12 x 16 pixels are 3 x 4 of them.
BUCKET, SIZE = (16, 24), (12, 16)
SIDES = np.log(np.array([1.0, 0.5, 2.0, 1.5], np.float32))  # left, top, right, bottom, in cells


@pytest.fixture(scope="module")
def output():
    images = np.zeros((1, *BUCKET, 3), np.uint8)
    mask = np.zeros((1, *BUCKET), bool)
    mask[:, : SIZE[0], : SIZE[1]] = True
    module = DensePretrainer(CONFIG)
    variables = jax.eval_shape(module.init, jax.random.key(0), images, mask)
    variables = jax.tree.map(lambda s: jnp.full(s.shape, 0.1, s.dtype), variables)
    head = {"kernel": jnp.zeros((CONFIG.dim, 4)), "bias": jnp.asarray(SIDES)}
    variables = {**variables, "params": {**variables["params"], "dense_box": head}}
    return jax.jit(module.apply)(variables, images, mask)


def test_boxes_by_hand(output):
    assert output.logits.shape == (1, 24, 2)
    assert output.boxes.shape == (1, 24, 4)
    for row, column in np.ndindex(4, 6):
        cell = row * 6 + column
        assert bool(output.valid[0, cell]) == (row < 3 and column < 4)
        # In cells of the real image (3 high, 4 wide).
        x, y = column + 0.5, row + 0.5
        np.testing.assert_allclose(output.centres[0, cell], [x / 4, y / 3], rtol=1e-6)
        low, high = (x - 1.0, y - 0.5), (x + 2.0, y + 1.5)
        expected = [
            (low[0] + high[0]) / 2 / 4,
            (low[1] + high[1]) / 2 / 3,
            (high[0] - low[0]) / 4,
            (high[1] - low[1]) / 3,
        ]
        np.testing.assert_allclose(output.boxes[0, cell], expected, rtol=1e-5)
    np.testing.assert_allclose(output.cell[0, 0], [1 / 4, 1 / 3], rtol=1e-6)


def test_padding_is_never_assigned(output):
    # A box over the whole image and one in its last corner.
    boxes = np.array([[[0.5, 0.5, 1.0, 1.0], [0.97, 0.97, 0.05, 0.05]]], np.float32)
    targets = Targets(boxes, np.zeros((1, 2), np.int32), np.ones((1, 2), bool))
    matched = dense_assignment(output.centres, targets, output.cell, radius=9.0)
    np.testing.assert_array_equal(np.asarray(matched >= 0), output.valid)
    assert int(matched[0, 2 * 6 + 3]) == 1


def test_detr_takes_over_its_parameters():
    image = jax.ShapeDtypeStruct((1, *BUCKET, 3), jnp.uint8)
    mask = jax.ShapeDtypeStruct((1, *BUCKET), bool)

    def shapes(module):
        tree = jax.eval_shape(module.init, jax.random.key(0), image, mask)
        return {k: v.shape for k, v in traverse_util.flatten_dict(tree, sep="/").items()}

    dense, detr = shapes(DensePretrainer(CONFIG)), shapes(Detr(CONFIG))
    own = {path for path in dense if "dense_" in path}
    assert own == {
        f"params/dense_{h}/{leaf}" for h in ("box", "class") for leaf in ("kernel", "bias")
    }
    parts = ("backbone", "input_proj", "encoder")
    handed_on = {path: s for path, s in detr.items() if path.split("/")[1] in parts}
    assert {path: s for path, s in dense.items() if path not in own} == handed_on
