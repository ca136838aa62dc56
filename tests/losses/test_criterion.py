"""The set loss against a restatement in NumPy that loops over images and queries."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqdetr_jax.losses.criterion import (
    LossWeights,
    cardinality_error,
    class_error,
    focal_loss,
    set_loss,
    softmax_loss,
)
from aqdetr_jax.losses.matching import QuerySet, match_sets
from aqdetr_jax.losses.targets import Predictions, Targets
from aqdetr_jax.training.experiment import load_experiment

pytestmark = pytest.mark.usefixtures("quick_compile")

SOFTMAX = LossWeights()
FOCAL = LossWeights(cls=2.0, kind="focal")


def make_boxes(rng, *shape):
    size = rng.uniform(0.05, 0.4, (*shape, 2))
    return np.concatenate([rng.uniform(0.2, 0.8, (*shape, 2)), size], -1).astype(np.float32)


def make_case(seed, layers=3, queries=9, counts=(4, 0, 2), slots=6, classes=5, width=6):
    rng = np.random.default_rng(seed)
    valid = np.arange(slots) < np.asarray(counts)[:, None]
    targets = Targets(
        make_boxes(rng, len(counts), slots) * valid[..., None],
        (rng.integers(0, classes, valid.shape) * valid).astype(np.int32),
        valid,
    )
    shape = (layers, len(counts), queries)
    predictions = Predictions(
        rng.normal(0, 2, (*shape, width)).astype(np.float32), make_boxes(rng, *shape)
    )
    return predictions, targets


@functools.partial(jax.jit, static_argnames="weights")
def match(predictions, targets, weights=SOFTMAX):
    repeats = jnp.asarray(targets.valid, jnp.int32)
    return match_sets([QuerySet(predictions, repeats)], targets, weights)[0][0]


@functools.partial(jax.jit, static_argnames="weights")
def set_loss_gradient(predictions, targets, matched, weights):
    return jax.grad(lambda p: set_loss(p, targets, matched, weights)[0])(predictions)


@functools.partial(jax.jit, static_argnames="weights")
def loss_of(predictions, targets, weights=SOFTMAX):
    return set_loss(predictions, targets, match(predictions, targets, weights), weights)


def corners(box):
    return box[0] - box[2] / 2, box[1] - box[3] / 2, box[0] + box[2] / 2, box[1] + box[3] / 2


def numpy_giou(a, b):
    a, b = corners(a), corners(b)
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union - (hull - union) / hull


def numpy_terms(logits, boxes, targets, matched, weights):
    """The three terms of one layer, query by query, in float64."""
    ce = weight_sum = l1 = giou = 0.0
    num_boxes = max(int(targets.valid.sum()), 1)
    width = logits.shape[-1]
    for image, query in np.ndindex(matched.shape):
        x = logits[image, query].astype(np.float64)
        target = matched[image, query]
        if weights.kind == "softmax":
            label = width - 1 if target < 0 else targets.labels[image, target]
            weight = weights.eos if target < 0 else 1.0
            ce -= weight * (x[label] - np.log(np.exp(x).sum()))
            weight_sum += weight
        else:
            p = 1 / (1 + np.exp(-x))
            for c in range(width):
                if target >= 0 and c == targets.labels[image, target]:
                    ce -= 0.25 * (1 - p[c]) ** 2 * np.log(p[c])
                else:
                    ce -= 0.75 * p[c] ** 2 * np.log(1 - p[c])
        if target >= 0:
            box, wanted = boxes[image, query], targets.boxes[image, target]
            l1 += np.abs(box.astype(np.float64) - wanted).sum()
            giou += 1 - numpy_giou(box.astype(np.float64), wanted.astype(np.float64))
    ce = ce / weight_sum if weights.kind == "softmax" else ce / num_boxes
    return {"loss_ce": ce, "loss_bbox": l1 / num_boxes, "loss_giou": giou / num_boxes}


@pytest.mark.parametrize(
    "weights", [SOFTMAX, FOCAL, LossWeights(cls=2.0, l1=3.0, giou=4.0, eos=0.5)]
)
def test_set_loss_restated(weights):
    predictions, targets = make_case(0)
    matched = np.asarray(match(predictions, targets, weights))
    total, terms = loss_of(predictions, targets, weights)
    layers = [
        numpy_terms(predictions.logits[i], predictions.boxes[i], targets, matched[i], weights)
        for i in range(3)
    ]
    expected = 0.0
    for name, scale in (("ce", weights.cls), ("bbox", weights.l1), ("giou", weights.giou)):
        name = f"loss_{name}"
        np.testing.assert_allclose(terms[name], layers[-1][name], rtol=2e-5)
        others = sum(layer[name] for layer in layers[:-1])
        np.testing.assert_allclose(terms[f"aux_layers/{name}"], others, rtol=2e-5)
        expected += scale * (layers[-1][name] + others)
    assert len(terms) == 6
    np.testing.assert_allclose(total, expected, rtol=2e-5)
    assert total.dtype == jnp.float32


def test_weighted_cross_entropy_by_hand():
    # Two queries, two classes and "no object"; uniform logits give log 3 whatever the weights.
    matched = np.asarray([[[0, -1]]])
    labels = np.asarray([[1]], np.int32)
    assert softmax_loss(jnp.zeros((1, 1, 2, 3)), labels, matched, 0.1)[0] == pytest.approx(
        np.log(3)
    )
    # The matched query is certainly right, the other certainly wrong by 20: 0.1 · 20 / 1.1.
    logits = jnp.asarray([[[[0.0, 20.0, 0.0], [20.0, 0.0, 0.0]]]])
    assert softmax_loss(logits, labels, matched, 0.1)[0] == pytest.approx(2 / 1.1, rel=1e-5)


def test_one_layer_has_no_auxiliary_decoding_loss():
    predictions, targets = make_case(1, layers=1)
    _, terms = loss_of(predictions, targets)
    assert all(terms[f"aux_layers/loss_{name}"] == 0 for name in ("ce", "bbox", "giou"))


@pytest.mark.parametrize("weights", [SOFTMAX, FOCAL])
def test_perfect_predictions(weights):
    _, targets = make_case(2, counts=(6, 6, 6))
    boxes = np.pad(targets.boxes, [(0, 0), (0, 3), (0, 0)], constant_values=0.5)  # 3 spare queries
    labels = np.pad(targets.labels, [(0, 0), (0, 3)], constant_values=5)  # say "no object"
    logits = np.where(np.arange(6) == labels[..., None], 30.0, -30.0).astype(np.float32)
    if weights.kind == "focal":
        logits[..., 5] = -30.0
    predictions = Predictions(np.stack([logits] * 3), np.stack([boxes] * 3))
    total, terms = loss_of(predictions, targets, weights)
    assert terms["loss_bbox"] == 0
    for value in terms.values():
        assert abs(float(value)) < 1e-5
    assert abs(float(total)) < 1e-4
    matched = match(predictions, targets, weights)[-1]
    assert class_error(predictions.logits[-1], targets.labels, matched) == 0


def test_identical_layers_give_identical_losses():
    predictions, targets = make_case(3, layers=1)
    repeated = Predictions(*(np.repeat(x, 4, axis=0) for x in predictions))
    one, terms = loss_of(predictions, targets)
    four, repeated_terms = loss_of(repeated, targets)
    np.testing.assert_allclose(four, 4 * one, rtol=1e-5)
    np.testing.assert_allclose(
        repeated_terms["aux_layers/loss_ce"], 3 * terms["loss_ce"], rtol=1e-5
    )


@pytest.mark.parametrize("weights", [SOFTMAX, FOCAL])
def test_a_batch_of_empty_images_is_finite(weights):
    predictions, targets = make_case(4, counts=(0, 0, 0))
    value, _ = loss_of(predictions, targets, weights)
    gradient = set_loss_gradient(predictions, targets, match(predictions, targets), weights)
    assert np.isfinite(value)
    assert value > 0
    assert np.isfinite(gradient.logits).all()
    np.testing.assert_array_equal(gradient.boxes, 0)


@pytest.mark.parametrize("weights", [SOFTMAX, FOCAL])
def test_more_padding_changes_nothing(weights):
    predictions, targets = make_case(5)
    padded = Targets(*(np.pad(x, [(0, 0), (0, 7)] + [(0, 0)] * (x.ndim - 2)) for x in targets[:3]))
    total, terms = loss_of(predictions, targets, weights)
    padded_total, padded_terms = loss_of(predictions, padded, weights)
    np.testing.assert_array_equal(total, padded_total)
    for name, value in terms.items():
        np.testing.assert_array_equal(value, padded_terms[name])


def test_slots_in_any_order_change_nothing():
    predictions, targets = make_case(6)
    order = np.asarray([3, 5, 0, 4, 1, 2])
    total, _ = loss_of(predictions, targets)
    shuffled, _ = loss_of(predictions, Targets(*(x[:, order] for x in targets[:3])))
    np.testing.assert_allclose(total, shuffled, rtol=1e-6)


def test_box_losses_are_of_the_whole_batch():
    """Sums over images, divided by all boxes: images with more boxes weigh more."""
    predictions, targets = make_case(7)
    _, together = loss_of(predictions, targets)
    alone = [
        loss_of(Predictions(*(x[:, i : i + 1] for x in predictions)),
                Targets(*(x[i : i + 1] for x in targets[:3])))[1]
        for i in range(3)
    ]  # fmt: skip
    for name in ("loss_bbox", "loss_giou"):
        expected = sum(float(alone[i][name]) * n for i, n in enumerate((4, 0, 2))) / 6
        np.testing.assert_allclose(together[name], expected, rtol=1e-5)


def test_extra_empty_images_change_only_the_class_term():
    predictions, targets = make_case(8, counts=(4, 2, 0, 0))
    few = Predictions(*(x[:, :2] for x in predictions)), Targets(*(x[:2] for x in targets[:3]))
    _, terms = loss_of(predictions, targets)
    _, few_terms = loss_of(*few)
    for name in ("loss_bbox", "loss_giou"):
        np.testing.assert_allclose(terms[name], few_terms[name], rtol=1e-6)


@pytest.mark.parametrize("weights", [SOFTMAX, FOCAL])
def test_gradient_is_finite_on_extreme_predictions(weights):
    predictions, targets = make_case(9)
    extreme = Predictions(
        jnp.asarray(predictions.logits * 100),
        jnp.asarray(predictions.boxes).at[0, 0].set(0.0).at[1].multiply(1e-6),
    )
    matched = match(extreme, targets, weights)
    gradient = set_loss_gradient(extreme, targets, matched, weights)
    assert all(np.isfinite(g).all() for g in gradient)


@pytest.mark.parametrize("weights", [SOFTMAX, FOCAL])
def test_gradient_is_the_slope_of_the_restatement(weights):
    predictions, targets = make_case(10)
    matched = np.asarray(match(predictions, targets, weights))  # not differentiated through
    gradient = set_loss_gradient(predictions, targets, matched, weights)

    def restated(step):
        total = 0.0
        for i in range(3):
            logits, boxes = (
                x[i] + step * d[i] for x, d in zip(predictions, direction, strict=True)
            )
            terms = numpy_terms(logits, boxes, targets, matched[i], weights)
            total += weights.cls * terms["loss_ce"] + weights.l1 * terms["loss_bbox"]
            total += weights.giou * terms["loss_giou"]
        return total

    rng = np.random.default_rng(0)
    direction = [rng.normal(size=x.shape) for x in predictions]
    slope = (restated(1e-6) - restated(-1e-6)) / 2e-6
    got = sum(np.vdot(g, d) for g, d in zip(gradient, direction, strict=True))
    np.testing.assert_allclose(got, slope, rtol=1e-4)


def test_low_precision_predictions_are_computed_in_float32():
    predictions, targets = make_case(11)
    low = Predictions(*(jnp.asarray(x, jnp.bfloat16) for x in predictions))
    same = Predictions(*(x.astype(jnp.float32) for x in low))
    assert loss_of(low, targets)[0] == loss_of(same, targets)[0]


def test_cardinality_and_class_error_by_hand():
    # Image 0: two of three queries say an object, two targets. Image 1: none says so, one target.
    logits = np.zeros((2, 3, 3), np.float32)
    logits[0, :, 0], logits[0, 2, 2], logits[1, :, 2] = 5, 9, 5
    valid = np.asarray([[1, 1], [1, 0]], bool)
    assert cardinality_error(logits, valid) == 0.5
    focal = np.where(logits[..., :2] > 0, 1.0, -1.0)  # image 0: all three above one half
    assert cardinality_error(focal, valid, "focal") == 1.0
    matched = np.asarray([[0, 1, -1], [-1, -1, 0]])
    labels = np.asarray([[0, 1], [2, 0]], np.int32)
    assert class_error(logits, labels, matched) == pytest.approx(1 / 3)
    assert class_error(logits, labels, np.full((2, 3), -1)) == 0


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"'softmax' or 'focal', got 'hinge'"):
        LossWeights(kind="hinge")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cls": -1.0}, "cls must be finite and not negative, got -1.0"),
        ({"eos": math.nan}, "eos must be finite and not negative, got nan"),
        ({"focal_alpha": 1.5}, r"focal_alpha must be in \[0, 1\], got 1.5"),
        ({"focal_gamma": math.inf}, "focal_gamma must be finite and not negative, got inf"),
    ],
)
def test_weights_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        LossWeights(**values)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_gradient_is_finite_where_probabilities_underflow(gamma):
    logits = np.asarray([[[[-200.0, 200.0], [200.0, -200.0]]]], np.float32)
    labels, matched = np.asarray([[0]], np.int32), np.asarray([[[0, -1]]])

    def total(logits):
        return focal_loss(logits, labels, matched, 1.0, 0.25, gamma).sum()

    gradient = np.asarray(jax.grad(total)(logits))
    # Of -a log p and -(1 - a) log(1 - p) far on the wrong side: -a and 1 - a; of p^g: nothing.
    np.testing.assert_allclose(gradient, [[[[-0.25, 0.75], [0.75, 0.0]]]], atol=1e-6)


@pytest.mark.parametrize("variant", [None, "r50,float", "r101-dc5,float", "r50,w4a4"])
def test_weights_are_those_of_detr(variant):
    # main.py of facebookresearch/detr: class 1, bbox_loss_coef 5, giou_loss_coef 2, eos_coef 0.1.
    weights = LossWeights() if variant is None else load_experiment(f"coco:{variant}").loss
    assert dataclasses.asdict(weights) == {
        "cls": 1.0,
        "l1": 5.0,
        "giou": 2.0,
        "eos": 0.1,
        "kind": "softmax",
        "focal_alpha": 0.25,
        "focal_gamma": 2.0,
    }
