"""The loss of two-stage proposals: by hand, whatever the classes, and without any object."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqdetr_jax.losses.criterion import LossWeights
from aqdetr_jax.losses.proposals import proposal_loss
from aqdetr_jax.losses.targets import Predictions, Targets

pytestmark = pytest.mark.usefixtures("quick_compile")

WEIGHTS = LossWeights(cls=2.0, kind="focal")
TOKENS, CLASSES, SLOTS = 6, 3, 4


@jax.jit
def value_and_gradient(logits, coordinates, targets):
    """Of logits [B, S, C] and unbounded boxes [B, S, 4], as the model has them."""

    def loss(logits, coordinates):
        found = Predictions(logits[None], jax.nn.sigmoid(coordinates)[None])
        total, terms, replaced = proposal_loss(found, targets, WEIGHTS)
        return total, (terms, replaced)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(logits, coordinates)


def make_case(seed=0, counts=(3, 1)):
    rng = np.random.default_rng(seed)
    valid = np.arange(SLOTS) < np.asarray(counts)[:, None]
    boxes = np.concatenate(
        [rng.uniform(0.3, 0.7, (2, SLOTS, 2)), rng.uniform(0.1, 0.4, (2, SLOTS, 2))], -1
    )
    labels = rng.integers(0, CLASSES, valid.shape) * valid
    targets = Targets((boxes * valid[..., None]).astype(np.float32), labels.astype(np.int32), valid)
    logits = rng.normal(size=(2, TOKENS, CLASSES)).astype(np.float32)
    return logits, rng.normal(size=(2, TOKENS, 4)).astype(np.float32), targets


def test_by_hand_every_target_is_of_the_first_class():
    box = np.array([0.5, 0.5, 0.25, 0.5])
    coordinates = np.full((1, 3, 4), -2.0, np.float32)
    coordinates[0, 1] = np.log(box / (1 - box))
    logits = np.random.default_rng(1).normal(size=(1, 3, CLASSES)).astype(np.float32)
    targets = Targets(np.float32(box)[None, None], np.array([[2]], np.int32), np.ones((1, 1), bool))
    (total, (terms, replaced)), _ = value_and_gradient(logits, coordinates, targets)
    p = 1 / (1 + np.exp(-logits[0].astype(float)))
    right = 0.75 * p**2 * -np.log(1 - p)  # of all that is no object
    right[1, 0] = 0.25 * (1 - p[1, 0]) ** 2 * -np.log(p[1, 0])
    np.testing.assert_allclose(terms["proposals/loss_ce"], right.sum(), rtol=1e-5)
    assert terms["proposals/loss_bbox"] < 1e-6
    assert terms["proposals/loss_giou"] < 1e-6
    np.testing.assert_allclose(total, 2 * right.sum(), rtol=1e-5)
    assert set(terms) == {f"proposals/loss_{term}" for term in ("ce", "bbox", "giou")}
    assert not replaced.any()


def test_classes_of_the_targets_do_not_matter():
    logits, coordinates, targets = make_case()
    other = targets._replace(labels=(targets.labels + 1) % CLASSES)
    first, second = (value_and_gradient(logits, coordinates, t) for t in (targets, other))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), first, second))
    assert np.any(targets.labels != other.labels)


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
def test_tokens_that_may_not_propose_are_harmless(counts):
    """Padding and tokens at the rim stand at infinity: they have class scores, and no box."""
    logits, coordinates, targets = make_case(2, counts)
    coordinates[:, ::2] = np.inf
    (total, (terms, replaced)), (d_logits, d_coordinates) = value_and_gradient(
        logits, coordinates, targets
    )
    assert np.isfinite(total)
    assert total > 0
    assert not replaced.any()
    assert np.isfinite(d_logits).all()
    assert np.all(d_logits != 0)
    assert np.isfinite(d_coordinates).all()
    assert not np.any(d_coordinates[:, ::2])
    assert bool(np.any(d_coordinates)) == bool(sum(counts))
    if not sum(counts):
        assert terms["proposals/loss_bbox"] == terms["proposals/loss_giou"] == 0


def test_it_is_divided_by_the_boxes_of_the_batch():
    logits, coordinates, targets = make_case(3, (2, 2))
    (_, (both, _)), _ = value_and_gradient(logits, coordinates, targets)
    parts = [
        value_and_gradient(*(jax.tree.map(lambda x, i=i: x[i : i + 1], v) for v in arrays))[0][1][0]
        for i in range(2)
        for arrays in [(jnp.asarray(logits), jnp.asarray(coordinates), targets)]
    ]
    for name, value in both.items():
        wanted = (parts[0][name] * 2 + parts[1][name] * 2) / 4
        np.testing.assert_allclose(value, wanted, rtol=1e-5)


def test_losses_of_parts_add_up_to_the_whole():
    logits, coordinates, targets = make_case()
    (total, (terms, _)), _ = value_and_gradient(logits, coordinates, targets)
    parts = []
    for image in range(2):
        cut = slice(image, image + 1)
        part = Targets(*(x[cut] for x in targets[:3]), whole=targets.valid)
        (loss, (found, _)), _ = value_and_gradient(logits[cut], coordinates[cut], part)
        parts.append((loss, found))
    np.testing.assert_allclose(sum(p[0] for p in parts), total, rtol=1e-6)
    for name, value in terms.items():
        np.testing.assert_allclose(sum(p[1][name] for p in parts), value, rtol=1e-6, err_msg=name)
