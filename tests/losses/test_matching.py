"""Targets, matching cost and matching of several sets, against NumPy and SciPy restatements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from aqdetr_jax.losses.criterion import LossWeights
from aqdetr_jax.losses.matching import QuerySet, match_sets, matching_cost
from aqdetr_jax.losses.targets import Predictions, Targets, repeat_counts

pytestmark = pytest.mark.usefixtures("quick_compile")

SOFTMAX = LossWeights()
FOCAL = LossWeights(cls=2.0, kind="focal")


cost_of = jax.jit(matching_cost, static_argnames="weights")
match = jax.jit(match_sets, static_argnames="weights")


def make_boxes(rng, *shape):
    size = rng.uniform(0.05, 0.4, (*shape, 2))
    centre = rng.uniform(0.2, 0.8, (*shape, 2))
    return np.concatenate([centre, size], -1).astype(np.float32)


def make_predictions(rng, layers, batch, queries, width):
    logits = rng.normal(0, 2, (layers, batch, queries, width)).astype(np.float32)
    return Predictions(logits, make_boxes(rng, layers, batch, queries))


def make_targets(rng, counts, slots, classes):
    valid = np.arange(slots) < np.asarray(counts)[:, None]
    boxes = make_boxes(rng, len(counts), slots) * valid[..., None]
    labels = rng.integers(0, classes, valid.shape).astype(np.int32) * valid
    return Targets(boxes.astype(np.float32), labels.astype(np.int32), valid)


def numpy_giou(a, b):
    """GIoU of two cxcywh boxes, in plain numbers."""
    a = [a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2]
    b = [b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2]
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union - (hull - union) / hull


def numpy_cost(logits, boxes, label, box, weights):
    """Cost of all queries [Q] for one target."""
    logits = logits.astype(np.float64)
    if weights.kind == "softmax":
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        cls = -p[:, label]
    else:
        p = 1 / (1 + np.exp(-logits[:, label]))
        cls = 0.25 * (1 - p) ** 2 * -np.log(p) - 0.75 * p**2 * -np.log(1 - p)
    l1 = np.abs(boxes.astype(np.float64) - box).sum(-1)
    giou = np.asarray([numpy_giou(b.astype(np.float64), box.astype(np.float64)) for b in boxes])
    return weights.cls * cls + weights.l1 * l1 - weights.giou * giou


@pytest.mark.parametrize("weights", [SOFTMAX, FOCAL, LossWeights(cls=3.0, l1=0.5, giou=7.0)])
def test_cost_restated(weights):
    rng = np.random.default_rng(0)
    predictions = make_predictions(rng, 2, 3, 8, 6)
    targets = make_targets(rng, [4, 1, 0], 5, 5)
    cost = np.asarray(cost_of(predictions, targets, weights))
    assert cost.shape == (2, 3, 5, 8)
    assert cost.dtype == np.float32
    for layer, image, t in np.ndindex(2, 3, 5):
        if targets.valid[image, t]:
            expected = numpy_cost(
                predictions.logits[layer, image],
                predictions.boxes[layer, image],
                targets.labels[image, t],
                targets.boxes[image, t],
                weights,
            )
            np.testing.assert_allclose(cost[layer, image, t], expected, atol=2e-5)
    assert np.isfinite(cost).all()  # padding too


@pytest.mark.parametrize("weights", [SOFTMAX, FOCAL])
def test_cost_is_float32_and_finite_for_extreme_low_precision_logits(weights):
    rng = np.random.default_rng(1)
    predictions = make_predictions(rng, 1, 1, 4, 6)
    logits = jnp.asarray(predictions.logits * 1e3, jnp.bfloat16)
    targets = make_targets(rng, [3], 3, 5)
    cost = cost_of(Predictions(logits, predictions.boxes), targets, weights)
    assert cost.dtype == jnp.float32
    assert np.isfinite(cost).all()


def test_cost_has_no_gradient():
    rng = np.random.default_rng(2)
    predictions = make_predictions(rng, 1, 2, 4, 6)
    targets = make_targets(rng, [3, 1], 3, 5)
    gradient = jax.grad(lambda p: cost_of(p, targets, SOFTMAX).sum())(
        jax.tree.map(jnp.asarray, predictions)
    )
    assert all(np.all(np.asarray(g) == 0) for g in gradient)


def test_repeat_counts():
    valid = np.asarray([[1, 1, 0, 0, 0], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    counts, limited = repeat_counts(valid, 3, 7)
    np.testing.assert_array_equal(
        counts, [[3, 3, 0, 0, 0], [2, 0, 2, 2, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    )
    np.testing.assert_array_equal(limited, [False, True, False, True])
    counts, limited = repeat_counts(valid, 1, 2)  # more targets than queries: the first ones
    np.testing.assert_array_equal(
        counts, [[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    )
    np.testing.assert_array_equal(limited, [False, True, False, True])
    counts, limited = repeat_counts(valid, 1, 5)
    np.testing.assert_array_equal(counts, valid)
    assert not limited.any()


@pytest.mark.parametrize("arguments", [(0, 5), (1, 0)])
def test_repeat_counts_error(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        repeat_counts(np.ones((1, 2), bool), *arguments)


@pytest.mark.accelerator
@pytest.mark.parametrize("weights", [SOFTMAX, FOCAL])
def test_sets_of_different_size_equal_scipy_layer_by_layer(weights):
    rng = np.random.default_rng(3)
    counts = [4, 0, 2, 6]
    targets = make_targets(rng, counts, 6, 5)
    first = make_predictions(rng, 3, 4, 7, 6)
    second = make_predictions(rng, 3, 4, 15, 6)
    sets = [
        QuerySet(first, repeat_counts(targets.valid, 1, 7)[0]),
        QuerySet(second, repeat_counts(targets.valid, 3, 15)[0]),
    ]
    matched, replaced = match(sets, targets, weights)
    np.testing.assert_array_equal(replaced, 0)
    assert [m.shape for m in matched] == [(3, 4, 7), (3, 4, 15)]
    for query_set, result in zip(sets, matched, strict=True):
        repeats = np.asarray(query_set.repeats)
        for layer, image in np.ndindex(3, 4):
            row = np.asarray(result[layer, image])
            np.testing.assert_array_equal(np.bincount(row[row >= 0], minlength=6), repeats[image])
            if not counts[image]:
                continue
            cost = np.stack(
                [
                    numpy_cost(
                        query_set.predictions.logits[layer, image],
                        query_set.predictions.boxes[layer, image],
                        targets.labels[image, t],
                        targets.boxes[image, t],
                        weights,
                    )
                    for t in range(counts[image])
                ]
            )
            copies = np.repeat(cost, repeats[image, : counts[image]], axis=0)
            best = copies[linear_sum_assignment(copies)].sum()
            queries = np.flatnonzero(row >= 0)
            assert cost[row[queries], queries].sum() == pytest.approx(best, abs=1e-4)


def test_one_call_equals_separate_calls():
    rng = np.random.default_rng(4)
    targets = make_targets(rng, [3, 5], 5, 5)
    sets = []
    for queries, repeats in ((5, 1), (11, 2), (11, 1)):
        predictions = make_predictions(rng, 2, 2, queries, 6)
        sets.append(QuerySet(predictions, repeat_counts(targets.valid, repeats, queries)[0]))
    together, _ = match(sets, targets, SOFTMAX)
    for query_set, result in zip(sets, together, strict=True):
        alone, _ = match([query_set], targets, SOFTMAX)
        np.testing.assert_array_equal(result, alone[0])


def test_broken_predictions_are_counted_per_image_and_still_matched():
    rng = np.random.default_rng(5)
    targets = make_targets(rng, [2, 3, 0], 3, 5)
    predictions = make_predictions(rng, 2, 3, 6, 6)
    predictions.logits[1, 1, 4] = np.nan  # one query of image 1: 3 targets
    predictions.boxes[0, 0] = np.inf  # all 6 queries of image 0: 2 targets
    predictions.logits[:, 2] = np.nan  # an image without targets needs no cost
    query_set = QuerySet(predictions, targets.valid.astype(np.int32))
    (matched,), replaced = match([query_set], targets, SOFTMAX)
    np.testing.assert_array_equal(replaced, [12, 3, 0])
    assert matched[1, 1, 4] == -1
    np.testing.assert_array_equal((matched >= 0).sum(-1), [[2, 3, 0], [2, 3, 0]])
