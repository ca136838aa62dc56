"""The dense pretraining loss on a 4 x 4 grid, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqdetr_jax.losses.dense import dense_assignment, dense_loss
from aqdetr_jax.losses.targets import Targets

pytestmark = pytest.mark.usefixtures("quick_compile")

GRID = 4
CENTRES = np.stack(np.meshgrid(np.arange(4), np.arange(4)), -1).reshape(1, 16, 2) / 4 + 0.125
CENTRES = CENTRES.astype(np.float32)
CELL = np.full((1, 1, 2), 0.25, np.float32)
# A large box and a small one inside its middle; the third slot is padding that covers everything.
TARGETS = Targets(
    np.array([[[0.5, 0.5, 0.9, 0.9], [0.375, 0.375, 0.3, 0.3], [0.5, 0.5, 1, 1]]], np.float32),
    np.array([[1, 2, 0]], np.int32),
    np.array([[True, True, False]]),
)
ASSIGNED = np.array([[-1, -1, -1, -1], [-1, 1, 0, -1], [-1, 0, 0, -1], [-1, -1, -1, -1]])


@pytest.fixture(scope="module")
def loss():
    return jax.jit(dense_loss)


def perfect(matched):
    index = np.maximum(matched, 0)
    boxes = TARGETS.boxes[0][index]
    labels = np.where(matched >= 0, TARGETS.labels[0][index], -1)
    logits = np.where(np.arange(3) == labels[..., None], 12.0, -12.0).astype(np.float32)
    return logits, boxes


def test_assignment_by_hand():
    # Radius 1.5 cells = 0.375: cell centres .125 and .875 are exactly .375 from the large box's
    # centre (not near); .375 and .625 are. The small box reaches only its own cell and wins there.
    got = dense_assignment(CENTRES, TARGETS, CELL)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got[0].reshape(4, 4), ASSIGNED)


def test_radius():
    got = dense_assignment(CENTRES, TARGETS, CELL, radius=2.0)[0].reshape(4, 4)
    # Now every cell whose centre lies inside the large box, which spans .05 to .95.
    assert np.all(np.asarray(got) >= 0)
    assert np.sum(np.asarray(got) == 1) == 1


@pytest.mark.parametrize("centre", [(0.27, 0.27), (0.49, 0.01), (0.99, 0.99)])
def test_a_box_smaller_than_a_cell_has_its_cell(centre):
    boxes = np.array([[[*centre, 0.02, 0.02]]], np.float32)
    targets = Targets(boxes, np.zeros((1, 1), np.int32), np.ones((1, 1), bool))
    got = np.asarray(dense_assignment(CENTRES, targets, CELL))[0]
    column, row = int(centre[0] * 4), int(centre[1] * 4)
    np.testing.assert_array_equal(np.flatnonzero(got == 0), [row * 4 + column])


def test_perfect_prediction_has_no_box_loss(loss):
    matched = ASSIGNED.reshape(1, 16)
    total, terms = loss(*perfect(matched), np.ones((1, 16), bool), matched, TARGETS)
    assert float(terms["loss_bbox"]) == 0
    assert abs(float(terms["loss_giou"])) < 1e-6
    assert 0 <= float(terms["loss_ce"]) < 1e-8
    assert float(total) < 1e-5


def test_terms_by_hand(loss):
    matched = ASSIGNED.reshape(1, 16)
    logits, boxes = perfect(matched)
    boxes = boxes.copy()
    boxes[0, 5] += np.float32([0.15, 0, 0, 0])  # the small box, moved by half its width
    logits = np.zeros_like(logits)  # p = 1/2 everywhere
    valid = np.ones((1, 16), bool)
    valid[0, 12:] = False
    total, terms = loss(logits, boxes, valid, matched, TARGETS)
    np.testing.assert_allclose(terms["loss_bbox"], 0.15 / 4, rtol=1e-5)
    # Overlap 1/2 of each: IoU = 1/3, hull = union.
    np.testing.assert_allclose(terms["loss_giou"], (1 - 1 / 3) / 4, rtol=1e-5)
    # Focal: 4 positives of weight 1/4 and 12 cells x 3 classes - 4 negatives of 3/4, over 4.
    focal = 0.25 * np.log(2)
    np.testing.assert_allclose(terms["loss_ce"], (4 * 0.25 + 32 * 0.75) * focal / 4, rtol=1e-5)
    expected = terms["loss_ce"] + 5 * terms["loss_bbox"] + 2 * terms["loss_giou"]
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_padding_and_background_boxes_change_nothing(loss):
    matched = ASSIGNED.reshape(1, 16)
    logits, boxes = perfect(matched)
    valid = np.ones((1, 16), bool)
    valid[0, 12:] = False
    before = loss(logits, boxes, valid, matched, TARGETS)[0]
    boxes, logits = boxes.copy(), logits.copy()
    boxes[matched < 0] = 0.3
    logits[0, 12:] = 5.0
    np.testing.assert_array_equal(loss(logits, boxes, valid, matched, TARGETS)[0], before)


def test_no_targets_at_all(loss):
    matched = np.full((1, 16), -1)
    total, terms = loss(*perfect(matched), np.ones((1, 16), bool), matched, TARGETS)
    assert np.isfinite(float(total))
    assert float(terms["loss_bbox"]) == float(terms["loss_giou"]) == 0
