"""Q-DETR's foreground distillation: hand values, and its equations restated with NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqdetr_jax.losses import foreground

pytestmark = pytest.mark.usefixtures("quick_compile")

# Two unit-high boxes side by side: GIoU by hand. Targets [0, 1] x [0, 1] and [2, 3] x [0, 1].
TARGETS = np.float32([[0.5, 0.5, 1, 1], [2.5, 0.5, 1, 1]])
QUERIES = np.float32(
    [
        [0.5, 0.5, 1, 1],  # the first target
        [1.0, 0.5, 2, 1],  # twice as wide: IoU 1/2, no gap
        [0.75, 0.5, 1, 1],  # shifted by a quarter: IoU 3/5, no gap
        [2.0, 0.5, 1, 1],  # half of the second target: IoU 1/3
        [8.5, 0.5, 1, 1],  # far from both
    ]
)
OVERLAPS = np.float32(
    [
        # Hull of the first target and query 3 is [0, 2.5], union 2: 0 - 0.5/2.5.
        [1, 1 / 2, 3 / 5, -0.2, -7 / 9],
        # Query 0 leaves a gap of 1 in a hull of 3; query 1 none; query 2 0.75 of 2.75; 4: 5 of 7.
        [-1 / 3, 0.0, -0.75 / 2.75, 1 / 3, -5 / 7],
    ]
)


def test_overlaps_and_their_best_by_hand():
    got = foreground.target_overlaps(TARGETS[None], QUERIES[None])[0]
    np.testing.assert_allclose(got, OVERLAPS, atol=1e-6)
    np.testing.assert_allclose(foreground.best_overlaps(got), [1, 1 / 3], atol=1e-6)


@pytest.mark.parametrize(
    ("tau", "valid", "kept"),
    [
        (0.6, [True, True], [0, 3]),  # 3/5 is not more than 0.6
        (0.55, [True, True], [0, 2, 3]),
        (0.4, [True, True], [0, 1, 2, 3]),
        (0.4, [True, False], [0, 1, 2]),
        (0.0, [True, True], [0, 1, 2, 3]),  # imitate all that overlap
        (1.0, [True, True], []),  # imitate none
        (0.6, [False, False], []),
    ],
)
def test_foreground_queries_by_hand(tau, valid, kept):
    # (0.6 as float32 is a little more than 3/5.)
    got = foreground.foreground_queries(OVERLAPS[None], np.array([valid]), tau)[0]
    np.testing.assert_array_equal(np.flatnonzero(got), kept)


def test_an_object_that_nothing_overlaps_has_no_query():
    apart = np.float32([[[-0.2, -0.5]]])
    for tau in (0.0, 0.6, 1.0):
        assert not np.any(foreground.foreground_queries(apart, np.ones((1, 1), bool), tau))


def test_the_match_weighs_overlap_and_distance():
    student = np.float32([[0.2, 0.5, 0.2, 0.2]])
    teacher = np.float32(
        [
            [0.2, 0.5, 0.1, 0.1],  # IoU 1/4, no more hull: 2/4 - 5 * 0.2 = -0.5
            [0.3, 0.5, 0.2, 0.2],  # IoU 1/3: 2/3 - 5 * 0.1 = 1/6
            [0.2, 0.5, 0.2, 0.3],  # IoU 2/3: 4/3 - 5 * 0.1 = 5/6
        ]
    )
    assert foreground.matched_queries(student[None], teacher[None])[0, 0] == 2
    assert foreground.matched_queries(student[None], teacher[None, :2])[0, 0] == 1


def test_the_loss_by_hand():
    student, teacher = np.zeros((2, 3, 2), np.float32), np.zeros((2, 3, 2), np.float32)
    student[0, 0], student[0, 1], student[1, 2] = (3, 4), (6, 8), (100, 0)
    kept = np.array([[True, True, False], [False, True, False]])
    # The first image: the mean of 5 and 10; the second's one query agrees.
    assert foreground.foreground_loss(student, teacher, kept) == pytest.approx(7.5 / 2)
    slope = jax.grad(foreground.foreground_loss)(student, teacher, kept)
    np.testing.assert_allclose(slope[0, 0], np.array([0.6, 0.8]) / 4, rtol=1e-6)
    assert np.all(np.isfinite(slope))
    assert not np.any(np.asarray(slope)[~kept])
    assert not np.any(np.asarray(slope)[1])
    nothing = jax.grad(foreground.foreground_loss, 1)(student, teacher, kept)
    assert not np.any(nothing)  # the teacher learns nothing
    assert foreground.foreground_loss(student, teacher, np.zeros_like(kept)) == 0


def giou(a, b):
    """One pair of ``cxcywh`` boxes, in float64."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (
        (c - w / 2, d - h / 2, c + w / 2, d + h / 2) for c, d, w, h in (a, b)
    )
    inner = max(min(ax1, bx1) - max(ax0, bx0), 0) * max(min(ay1, by1) - max(ay0, by0), 0)
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - inner
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return inner / union - (hull - union) / hull


def restated(student, teacher, d_s, d_t, targets, valid, tau):
    """Equations 10 to 14, box by box."""
    images = []
    for b in range(len(student)):
        kept = set()
        for i in np.flatnonzero(valid[b]):
            row = [giou(targets[b, i], box) for box in student[b]]
            kept |= {j for j, value in enumerate(row) if value > tau * max(row)}
        norms = []
        for j in kept:
            likeness = [
                2 * giou(student[b, j], box) - 5 * np.abs(student[b, j] - box).sum()
                for box in teacher[b]
            ]
            norms.append(np.sqrt(((d_s[b, j] - d_t[b, int(np.argmax(likeness))]) ** 2).sum()))
        images.append(np.mean(norms) if norms else 0.0)
    return np.mean(images)


LOSS = jax.jit(foreground.foreground_distillation)


@given(seed=st.integers(0, 2**31 - 1), tau=st.floats(0, 1))
@settings(max_examples=25)
def test_all_of_it_against_the_equations(seed, tau):
    rng = np.random.default_rng(seed)

    def boxes(count):
        return np.concatenate(
            [rng.uniform(0.2, 0.8, (2, count, 2)), rng.uniform(0.05, 0.4, (2, count, 2))], -1
        )

    student, teacher, targets = boxes(7), boxes(5), boxes(3)
    d_s, d_t = rng.normal(size=(2, 7, 4)), rng.normal(size=(2, 5, 4))
    valid = rng.random((2, 3)) < 0.6
    arrays = [np.float32(x) for x in (student, teacher, d_s, d_t, targets)]
    wanted = restated(*(x.astype(float) for x in arrays), valid, tau)
    got = float(LOSS(*arrays, valid, np.float32(tau)))
    # A query may lie on the threshold, up to rounding: then its term is there or not.
    near = [restated(*(x.astype(float) for x in arrays), valid, tau + e) for e in (-1e-6, 1e-6)]
    assert min(abs(got - value) for value in (wanted, *near)) < 1e-4


def test_the_whole_moves_nothing_but_the_students_features():
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0.3, 0.6, (3, 2, 4, 4)).astype(np.float32)
    features = rng.normal(size=(2, 2, 4, 3)).astype(np.float32)
    valid = np.ones((2, 4), bool)
    slopes = jax.jit(jax.grad(foreground.foreground_distillation, (0, 1, 2, 3, 4)))(
        boxes[0], boxes[1], *features, boxes[2], valid, 0.0
    )
    moved = [bool(jnp.any(slope)) for slope in slopes]
    assert moved == [False, False, True, False, False]
