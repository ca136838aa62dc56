"""Attention distillation against NumPy, and what must and must not change it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqdetr_jax.losses.distillation import (
    DistillationWeights,
    attention_kl,
    layer_by_layer_loss,
    layer_loss,
    location_distance,
    map_kl,
)
from aqdetr_jax.ops.deformable import attention_map

pytestmark = pytest.mark.usefixtures("quick_compile")

KINDS = ("kl", "mse", "logits", "output")
BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 5, 5, 6
VALID = np.array([[True] * 5, [True] * 3 + [False] * 2])
MASKED = -1e9


class Maps(NamedTuple):
    scores: jax.Array
    output: jax.Array


def maps(seed, keys_masked=True):
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 2, (BATCH, HEADS, QUERIES, KEYS)).astype(np.float32)
    if keys_masked:
        scores = np.where(VALID[:, None, None], scores, np.float32(MASKED))
    return Maps(scores, rng.normal(size=(BATCH, QUERIES, WIDTH)).astype(np.float32))


def restated(kind, teacher, student, valid):
    """One term, query by query, in float64."""
    total, norm, count = 0.0, 0.0, 0
    for b in range(BATCH):
        for q in range(QUERIES):
            if not valid[b, q]:
                continue
            if kind == "output":
                t, s = teacher.output[b, q], student.output[b, q]
                total += np.mean((t.astype(float) - s) ** 2)
                norm += np.mean(t.astype(float) ** 2)
                count += 1
                continue
            for h in range(HEADS):
                t, s = (np.asarray(m.scores[b, h, q], float)[VALID[b]] for m in (teacher, student))
                p, r = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (t, s))
                if kind == "kl":
                    total += np.sum(p * np.log(p / r))
                elif kind == "mse":
                    total += np.sum((p - r) ** 2)
                else:
                    total += np.mean((t - t.mean() - s + s.mean()) ** 2)
                count += 1
    return total / norm if kind == "output" else total / count


@pytest.fixture(scope="module", params=KINDS)
def term(request):
    kind = request.param
    function = jax.jit(lambda t, s, valid: layer_loss(kind, t, s, valid))
    return kind, function


def test_agrees_with_the_restatement(term):
    kind, function = term
    teacher, student = maps(0), maps(1)
    expected = restated(kind, teacher, student, VALID)
    np.testing.assert_allclose(function(teacher, student, VALID), expected, rtol=1e-5)


def test_zero_for_equal_maps_and_positive_otherwise(term):
    _, function = term
    for seed in range(3):
        assert abs(float(function(maps(seed), maps(seed), VALID))) < 1e-6
        assert float(function(maps(seed), maps(seed + 1), VALID)) > 1e-3


def test_a_constant_added_to_the_scores_changes_nothing(term):
    kind, function = term
    teacher, student = maps(0), maps(1)
    shifted = np.where(VALID[:, None, None], student.scores + 3, np.float32(MASKED))
    np.testing.assert_allclose(
        function(teacher, Maps(shifted, student.output), VALID),
        function(teacher, student, VALID),
        rtol=1e-4,
        err_msg=kind,
    )


def test_padded_queries_do_not_count(term):
    _, function = term
    teacher, student = maps(0), maps(1)
    before = function(teacher, student, VALID)
    other_t, other_s = maps(2), maps(3)

    def replaced(here, other):
        keep = VALID[:, None, :, None]
        return Maps(
            np.where(keep, here.scores, other.scores),
            np.where(VALID[..., None], here.output, other.output),
        )

    after = function(replaced(teacher, other_t), replaced(student, other_s), VALID)
    np.testing.assert_array_equal(before, after)


def test_no_gradient_to_the_teacher_and_none_to_padding(term):
    kind, _ = term

    def loss(t, s):
        return layer_loss(kind, t, s, VALID)

    to_teacher, to_student = jax.jit(jax.grad(loss, (0, 1)))(maps(0), maps(1))
    for leaf in jax.tree.leaves(to_teacher):
        np.testing.assert_array_equal(leaf, 0)
    used = to_student.output if kind == "output" else to_student.scores
    assert np.all(np.isfinite(used))
    assert np.any(np.asarray(used) != 0)
    padded_queries = np.moveaxis(np.asarray(used), -2, 1)[~VALID]
    np.testing.assert_array_equal(padded_queries, 0)
    if kind != "output":
        padded_keys = np.moveaxis(np.asarray(used), -1, 1)[~VALID]
        np.testing.assert_allclose(padded_keys, 0, atol=1e-12)


def test_kl_gradient_is_the_difference_of_probabilities():
    # d KL(p || softmax(s)) / d s = softmax(s) - p, averaged over batch, heads and queries.
    teacher, student = maps(0, keys_masked=False), maps(1, keys_masked=False)
    gradient = jax.grad(lambda s: layer_loss("kl", teacher, student._replace(scores=s)))(
        jnp.asarray(student.scores)
    )
    difference = jax.nn.softmax(student.scores) - jax.nn.softmax(teacher.scores)
    np.testing.assert_allclose(gradient, difference / (BATCH * HEADS * QUERIES), atol=1e-6)


def test_without_a_mask_all_queries_count(term):
    kind, _ = term
    teacher, student = maps(0), maps(1)
    expected = restated(kind, teacher, student, np.ones_like(VALID))
    np.testing.assert_allclose(layer_loss(kind, teacher, student), expected, rtol=1e-5)


def test_an_image_without_any_valid_query_is_harmless(term):
    _, function = term
    assert float(function(maps(0), maps(1), np.zeros_like(VALID))) == 0.0


def test_layers_are_averaged(term):
    kind, function = term
    teacher, student = [maps(0), maps(1)], [maps(2), maps(3)]
    got = layer_by_layer_loss(kind, teacher, student, VALID)
    each = [float(function(t, s, VALID)) for t, s in zip(teacher, student, strict=True)]
    np.testing.assert_allclose(got, np.mean(each), rtol=1e-6)


def test_layers_must_pair():
    with pytest.raises(ValueError, match="as many teacher layers as student layers, got 2 and 1"):
        layer_by_layer_loss("kl", [maps(0), maps(1)], [maps(2)])


def test_weights_are_checked():
    assert not DistillationWeights().active
    assert DistillationWeights(decoder_cross=0.1).active
    with pytest.raises(ValueError, match="must not be negative"):
        DistillationWeights(encoder=-1.0)
    with pytest.raises(ValueError, match="'kl', 'mse', 'logits', 'output'"):
        DistillationWeights(kind="l2")


# --- deformable attention ---

SIZES = np.array([[6, 4], [3, 2]], np.float32)  # (width, height) of two levels
POINTS = 3


class DeformableMaps(NamedTuple):
    scores: jax.Array
    probabilities: jax.Array
    locations: jax.Array
    sizes: jax.Array
    output: jax.Array


def deformable_maps(seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(BATCH, HEADS, QUERIES, 2 * POINTS)).astype(np.float32)
    locations = rng.uniform(size=(BATCH, QUERIES, HEADS, 2, POINTS, 2)).astype(np.float32)
    output = rng.normal(size=(BATCH, QUERIES, WIDTH)).astype(np.float32)
    return DeformableMaps(scores, np.asarray(jax.nn.softmax(scores)), locations, SIZES, output)


def test_location_distance_agrees_with_the_restatement():
    teacher, student = deformable_maps(0), deformable_maps(1)
    total, count = 0.0, 0
    for b, q, h in np.ndindex(BATCH, QUERIES, HEADS):
        if not VALID[b, q]:
            continue
        count += 1
        for level, point in np.ndindex(2, POINTS):
            weight = teacher.probabilities[b, h, q, level * POINTS + point]
            step = (
                teacher.locations[b, q, h, level, point] - student.locations[b, q, h, level, point]
            )
            total += weight * np.abs(step * SIZES[level]).sum()
    found = location_distance(
        teacher.locations, student.locations, teacher.probabilities, SIZES, VALID
    )
    np.testing.assert_allclose(found, total / count, rtol=1e-5)


def test_one_cell_apart_is_a_distance_of_one():
    teacher = deformable_maps(2)
    moved = teacher.locations + np.array([1, 0]) / SIZES[:, None]  # one cell right on every level
    found = location_distance(teacher.locations, moved, teacher.probabilities, SIZES)
    np.testing.assert_allclose(found, 1.0, rtol=1e-5)


def test_deformable_layers_are_judged_by_weights_and_places():
    teacher, student = deformable_maps(3), deformable_maps(4)
    assert layer_loss("kl", teacher, teacher, VALID, locations=0.5) == 0
    kl = attention_kl(teacher.scores, student.scores, VALID)
    far = location_distance(
        teacher.locations, student.locations, teacher.probabilities, SIZES, VALID
    )
    found = layer_by_layer_loss("kl", [teacher], [student], VALID, locations=0.5)
    np.testing.assert_allclose(found, kl + 0.5 * far, rtol=1e-6)
    np.testing.assert_allclose(layer_loss("kl", teacher, student, VALID), kl, rtol=1e-6)


def test_no_gradient_of_the_distance_to_the_teacher():
    teacher, student = deformable_maps(5), deformable_maps(6)
    gradients = jax.grad(location_distance, (0, 1, 2))(
        teacher.locations, student.locations, teacher.probabilities, SIZES
    )
    assert not np.any(gradients[0])
    assert np.all(gradients[1] != 0)
    assert not np.any(gradients[2])


def test_dense_check_and_cheap_terms_rank_students_alike():
    """Students that look further away, or weigh worse, are further away on the dense map too."""
    teacher, other = deformable_maps(7), deformable_maps(8)

    def dense(maps):
        weights = maps.probabilities.transpose(0, 2, 1, 3).reshape(BATCH, QUERIES, HEADS, 2, POINTS)
        shape = (4, 6)
        dense = attention_map(maps.locations[:, :, :, 0], weights[:, :, :, 0], shape)
        return dense.reshape(*dense.shape[:3], -1).transpose(0, 2, 1, 3)

    def mixed(part):
        scores = teacher.scores + part * (other.scores - teacher.scores)
        places = teacher.locations + part * (other.locations - teacher.locations)
        return teacher._replace(
            scores=scores, probabilities=jax.nn.softmax(scores), locations=places
        )

    students = [mixed(part) for part in (0.0, 0.1, 0.3, 1.0)]
    cheap = [float(layer_loss("kl", teacher, s, VALID, locations=0.1)) for s in students]
    check = [float(map_kl(dense(teacher), dense(s), VALID)) for s in students]
    assert abs(cheap[0]) < 1e-6
    assert abs(check[0]) < 1e-6
    assert cheap == sorted(cheap)
    assert check == sorted(check)
    assert check[1] > 1e-3


def test_map_kl_by_hand_counts_what_lies_outside():
    teacher = np.array([0.5, 0.25]).reshape(1, 1, 1, 2)  # a quarter outside
    student = np.array([0.25, 0.25]).reshape(1, 1, 1, 2)  # a half outside
    want = 0.5 * np.log(2) + 0.25 * np.log(0.25 / 0.5)
    np.testing.assert_allclose(map_kl(teacher, student), want, rtol=1e-5)


def test_kl_of_bfloat16_maps_is_float32_and_keeps_no_float32_map():
    teacher, student = (jnp.asarray(maps(seed).scores, jnp.bfloat16) for seed in (0, 1))
    loss, pullback = jax.vjp(lambda s: attention_kl(teacher, s, VALID), student)
    wide = [x.astype(jnp.float32) for x in (teacher, student)]
    np.testing.assert_allclose(loss, attention_kl(*wide, VALID), rtol=1e-6)
    kept = [x for x in jax.tree.leaves(pullback) if x.shape == student.shape]
    assert {x.dtype for x in kept} == {jnp.dtype(jnp.bfloat16)}
    (gradient,) = pullback(jnp.float32(1))
    assert gradient.dtype == jnp.bfloat16
    exact = jax.grad(attention_kl, 1)(*wide, VALID)
    np.testing.assert_array_equal(gradient, exact.astype(jnp.bfloat16))
