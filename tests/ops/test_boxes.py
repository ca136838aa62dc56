"""Box operations against hand values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqdetr_jax.ops import boxes

# (a, b, IoU, GIoU) with corners as xyxy, computed by hand from the areas.
PAIRS = [
    ([0, 0, 2, 2], [0, 0, 2, 2], 1.0, 1.0),  # equal
    ([0, 0, 1, 1], [2, 0, 3, 1], 0.0, -1 / 3),  # a gap of one box between them
    ([0, 0, 1, 1], [2, 2, 3, 3], 0.0, -7 / 9),  # diagonal: hull 9, union 2
    ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7, 1 / 7 - 2 / 9),
    ([0, 0, 4, 4], [1, 1, 2, 3], 1 / 8, 1 / 8),  # inside: the hull is the union
    ([0, 0, 4, 4], [1, 1, 2, 2], 1 / 16, 1 / 16),
    ([0, 0, 1, 1], [1, 0, 2, 1], 0.0, 0.0),  # touching at an edge
    ([0, 0, 1, 1], [1, 1, 2, 2], 0.0, -0.5),  # touching at a corner
    ([0, 0, 2, 1], [0, 0, 1, 2], 1 / 3, 1 / 3 - 1 / 4),
]
A, B, IOU, GIOU = (np.asarray(column, np.float32) for column in zip(*PAIRS, strict=True))
DEGENERATE = np.asarray(
    [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0], [2, 0, 1, 3], [0.2, 0.3, 0.6, 0.9]],
    np.float32,
)


def test_round_trip():
    x = np.random.default_rng(0).random((3, 7, 4)).astype(np.float32)
    np.testing.assert_allclose(boxes.xyxy_to_cxcywh(boxes.cxcywh_to_xyxy(x)), x, atol=1e-6)


def test_conversion_by_hand():
    np.testing.assert_allclose(
        boxes.cxcywh_to_xyxy(jnp.asarray([0.5, 0.4, 0.2, 0.6])), [0.4, 0.1, 0.6, 0.7], atol=1e-7
    )


@pytest.mark.parametrize("scale", [1.0, 1e-3, 640.0])
def test_hand_values(scale):
    a, b = jnp.asarray(A * scale), jnp.asarray(B * scale)
    np.testing.assert_allclose(boxes.elementwise_iou(a, b), IOU, atol=1e-5)
    np.testing.assert_allclose(boxes.elementwise_giou(a, b), GIOU, atol=1e-5)
    np.testing.assert_allclose(boxes.elementwise_giou(b, a), GIOU, atol=1e-5)


def test_area():
    np.testing.assert_allclose(
        boxes.area(jnp.asarray(DEGENERATE)), [0, 0, 0, 0, 0, 0.24], atol=1e-6
    )


def test_pairwise_is_every_pair():
    a, b = jnp.asarray(A), jnp.asarray(B)
    for pairwise, elementwise in (
        (boxes.pairwise_iou, boxes.elementwise_iou),
        (boxes.pairwise_giou, boxes.elementwise_giou),
    ):
        table = pairwise(a, b[:5])
        assert table.shape == (9, 5)
        for i in range(9):
            for j in range(5):
                assert table[i, j] == elementwise(a[i], b[j])
        batched = pairwise(jnp.stack([a, b]), jnp.stack([b[:5], a[:5]]))
        np.testing.assert_array_equal(batched[0], table)


def test_degenerate_boxes_give_finite_values_and_gradients():
    x = jnp.asarray(DEGENERATE)
    for pairwise in (boxes.pairwise_iou, boxes.pairwise_giou):
        value = pairwise(x, x)
        assert np.isfinite(value).all()
        assert np.all(np.abs(value) <= 1.0 + 1e-6)
        for argument in (0, 1):
            gradient = jax.grad(lambda a, b, f=pairwise: f(a, b).sum(), argnums=argument)(x, x)
            assert np.isfinite(gradient).all()


def test_giou_gradient_pulls_distant_boxes_together():
    a, b = jnp.asarray([0.0, 0.0, 1.0, 1.0]), jnp.asarray([3.0, 0.0, 4.0, 1.0])
    gradient = jax.grad(boxes.elementwise_giou)(a, b)
    assert gradient[0] + gradient[2] > 0  # moving right is better; IoU alone would not notice
    assert gradient[2] > 0  # so is growing towards the other box
