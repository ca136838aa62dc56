"""The detection loss with auxiliary queries, against its parts and H-DETR's formulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqdetr_jax.losses.auxiliary import (
    AuxiliaryLossConfig,
    aqdetr_detection_loss,
    combine_losses,
    split_groups,
)
from aqdetr_jax.losses.criterion import LossWeights, set_loss
from aqdetr_jax.losses.matching import QuerySet, match_sets
from aqdetr_jax.losses.targets import Predictions, Targets

pytestmark = pytest.mark.usefixtures("quick_compile")

SOFTMAX = LossWeights()
FOCAL = LossWeights(cls=2.0, kind="focal")
LAYERS, CLASSES, SLOTS = 2, 5, 5


loss_of = jax.jit(aqdetr_detection_loss, static_argnames=("weights", "auxiliary"))


def make_boxes(rng, *shape):
    size = rng.uniform(0.05, 0.4, (*shape, 2))
    return np.concatenate([rng.uniform(0.2, 0.8, (*shape, 2)), size], -1).astype(np.float32)


def make_predictions(rng, batch, queries):
    shape = (LAYERS, batch, queries)
    logits = rng.normal(0, 2, (*shape, CLASSES + 1)).astype(np.float32)
    return Predictions(logits, make_boxes(rng, *shape))


def make_targets(rng, counts):
    valid = np.arange(SLOTS) < np.asarray(counts)[:, None]
    labels = rng.integers(0, CLASSES, valid.shape) * valid
    return Targets(make_boxes(rng, *valid.shape) * valid[..., None], labels.astype(np.int32), valid)


def make_case(seed, counts=(4, 0, 2), queries=6, auxiliary=24):
    rng = np.random.default_rng(seed)
    batch = len(counts)
    return (
        make_predictions(rng, batch, queries),
        make_predictions(rng, batch, auxiliary),
        make_targets(rng, counts),
    )


@functools.partial(jax.jit, static_argnames="weights")
def plain_loss(predictions, targets, weights=SOFTMAX):
    """DETR's one-to-one loss of a set."""
    query_set = QuerySet(predictions, jnp.asarray(targets.valid, jnp.int32))
    (matched,), _ = match_sets([query_set], targets, weights)
    return set_loss(predictions, targets, matched, weights)


@functools.partial(jax.jit, static_argnames=("weights", "config"))
def value_and_gradient(first, second, targets, weights, config):
    def loss(a, b):
        return aqdetr_detection_loss(a, b, targets, weights, config)[0]

    return jax.value_and_grad(loss, argnums=(0, 1))(first, second)


def copies(targets, repeats):
    """H-DETR's formulation: the targets repeated K times as targets of their own."""
    return Targets(*(np.tile(x, (1, repeats) + (1,) * (x.ndim - 2)) for x in targets[:3]))


@pytest.mark.parametrize(("weights", "repeats"), [(SOFTMAX, 3), (SOFTMAX, 6), (FOCAL, 3)])
def test_equals_one_to_one_on_repeated_targets(weights, repeats):
    first, second, targets = make_case(0)
    config = AuxiliaryLossConfig(weight=0.7, repeats=repeats)
    total, terms, diagnostics = loss_of(first, second, targets, weights, config)
    object_loss, object_terms = plain_loss(first, targets, weights)
    auxiliary_loss, auxiliary_terms = plain_loss(second, copies(targets, repeats), weights)
    np.testing.assert_allclose(total, object_loss + 0.7 * auxiliary_loss, rtol=1e-5)
    for name, value in object_terms.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5)
        np.testing.assert_allclose(
            terms[f"auxiliary_queries/{name}"], auxiliary_terms[name], rtol=1e-5
        )
    assert len(terms) == 12
    assert diagnostics["num_boxes"] == 6
    assert diagnostics["auxiliary_num_boxes"] == 6 * repeats
    assert diagnostics["limited_images"] == 0
    np.testing.assert_array_equal(diagnostics["replaced_costs"], 0)


def test_without_auxiliary_queries_it_is_detr():
    first, _, targets = make_case(1)
    total, terms, diagnostics = loss_of(first, None, targets, SOFTMAX, AuxiliaryLossConfig())
    expected, expected_terms = plain_loss(first, targets)
    assert total == expected
    assert terms.keys() == expected_terms.keys()
    assert "auxiliary_num_boxes" not in diagnostics


def test_zero_weight_leaves_the_object_loss_and_no_gradient():
    first, second, targets = make_case(2)
    config = AuxiliaryLossConfig(weight=0.0)
    total, (_, gradient) = value_and_gradient(first, second, targets, SOFTMAX, config)
    np.testing.assert_allclose(total, plain_loss(first, targets)[0], rtol=1e-6)
    assert all(np.all(np.asarray(g) == 0) for g in gradient)


def test_repeats_are_limited_image_by_image_and_said():
    first, second, targets = make_case(3, counts=(4, 1, 5), auxiliary=10)
    _, _, diagnostics = loss_of(first, second, targets, SOFTMAX, AuxiliaryLossConfig(repeats=3))
    # 4 boxes: 2 each; 1 box: 3; 5 boxes: 2 each.
    assert diagnostics["auxiliary_num_boxes"] == 8 + 3 + 10
    assert diagnostics["num_boxes"] == 10
    assert diagnostics["limited_images"] == 2


def test_more_targets_than_object_queries_is_said():
    first, second, targets = make_case(4, counts=(5, 3), queries=4)
    total, _, diagnostics = loss_of(first, second, targets, SOFTMAX, AuxiliaryLossConfig(repeats=2))
    assert np.isfinite(total)
    assert diagnostics["limited_images"] == 1
    assert diagnostics["num_boxes"] == 4 + 3


@pytest.mark.parametrize("repeats", [1, 2])
def test_groups_are_matched_apart(repeats):
    first, second, targets = make_case(5)
    config = AuxiliaryLossConfig(repeats=repeats, groups=2)
    total, terms, diagnostics = loss_of(first, second, targets, SOFTMAX, config)
    repeated = copies(targets, repeats)
    parts = split_groups(second, 2)
    np.testing.assert_array_equal(parts[1].boxes, second.boxes[:, :, 12:])
    losses = [plain_loss(part, repeated)[1] for part in parts]
    for name in ("loss_bbox", "loss_giou"):  # the same normaliser in both: their mean
        expected = (losses[0][name] + losses[1][name]) / 2
        np.testing.assert_allclose(terms[f"auxiliary_queries/{name}"], expected, rtol=1e-5)
    assert diagnostics["auxiliary_num_boxes"] == 2 * 6 * repeats
    # equal groups with equal class weights: the weighted mean is the mean, too
    expected = (losses[0]["loss_ce"] + losses[1]["loss_ce"]) / 2
    np.testing.assert_allclose(terms["auxiliary_queries/loss_ce"], expected, rtol=1e-5)
    assert total > 0


def test_groups_must_divide_the_queries():
    _, second, _ = make_case(6)
    with pytest.raises(ValueError, match="24 auxiliary queries cannot be cut into 5 groups"):
        split_groups(second, 5)


@pytest.mark.parametrize("values", [{"weight": -1.0}, {"repeats": 0}, {"groups": 0}])
def test_config_is_checked(values):
    with pytest.raises(ValueError, match="AuxiliaryLossConfig needs"):
        AuxiliaryLossConfig(**values)


@pytest.mark.parametrize("weights", [SOFTMAX, FOCAL])
@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 0, 0)])
def test_gradients_are_finite_under_jit(weights, counts):
    first, second, targets = make_case(7, counts=counts)

    value, gradient = value_and_gradient(first, second, targets, weights, AuxiliaryLossConfig())
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert any(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(gradient[1]))


def test_more_padding_changes_nothing_and_tuples_will_do():
    first, second, targets = make_case(8)
    padded = Targets(*(np.pad(x, [(0, 0), (0, 9)] + [(0, 0)] * (x.ndim - 2)) for x in targets[:3]))
    arguments = SOFTMAX, AuxiliaryLossConfig()
    total, terms, _ = loss_of(first, second, targets, *arguments)
    again, padded_terms, _ = loss_of(tuple(first), tuple(second), padded, *arguments)
    assert total == again
    assert all(padded_terms[name] == value for name, value in terms.items())


def test_broken_predictions_are_said():
    first, second, targets = make_case(9)
    second.logits[0, 2, 3] = np.nan
    total, terms, diagnostics = loss_of(first, second, targets, SOFTMAX, AuxiliaryLossConfig())
    np.testing.assert_array_equal(diagnostics["replaced_costs"], [0, 0, 2])
    assert not np.isfinite(total)  # the guard keeps the matching alive; it does not hide the cause
    assert np.isfinite(terms["loss_ce"])
    assert not np.isfinite(terms["auxiliary_queries/aux_layers/loss_ce"])


def test_combination():
    assert combine_losses(jnp.float32(2.0), jnp.float32(3.0), 0.5) == 3.5


@pytest.mark.parametrize("weights", [SOFTMAX, FOCAL])
@pytest.mark.parametrize("counts", [(4, 0, 2), (0, 0, 0), (1, 6, 6)])
def test_losses_of_parts_add_up_to_the_whole(weights, counts):
    """Micro-batches: what each is divided by is counted over all of them."""
    first, second, targets = make_case(12, counts)
    config = AuxiliaryLossConfig(weight=0.7, repeats=3, groups=2)
    whole = loss_of(first, second, targets, weights, config)
    sums = []
    for image in range(len(counts)):
        cut = slice(image, image + 1)
        part = Targets(*(x[cut] for x in targets[:3]), whole=targets.valid)
        predictions = (Predictions(*(x[:, cut] for x in p)) for p in (first, second))
        sums.append(loss_of(*predictions, part, weights, config))
    total, terms, diagnostics = jax.tree.map(lambda *x: sum(x), *[(s[0], s[1], {
        k: s[2][k] for k in ("num_boxes", "auxiliary_num_boxes", "class_error", "limited_images")
    }) for s in sums])  # fmt: skip
    np.testing.assert_allclose(total, whole[0], rtol=1e-6)
    for name, value in terms.items():
        np.testing.assert_allclose(value, whole[1][name], rtol=1e-6, err_msg=name)
    for name, value in diagnostics.items():
        np.testing.assert_allclose(value, whole[2][name], rtol=1e-6, err_msg=name)
