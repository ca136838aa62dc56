import contextlib
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.special import expit, softmax

from aqdetr_jax.evaluation import coco
from aqdetr_jax.io import read_json, write_json_atomic


def _truth(boxes, *, images=(1,), categories=((1, "circle"), (7, "square")), crowd=()):
    """boxes: [(image, category, [x, y, w, h])]."""
    return {
        "images": [{"id": i, "width": 200, "height": 200} for i in images],
        "categories": [{"id": c, "name": n} for c, n in categories],
        "annotations": [
            {
                "id": k,
                "image_id": i,
                "category_id": c,
                "bbox": list(b),
                "area": b[2] * b[3],
                "iscrowd": int(k in crowd),
            }
            for k, (i, c, b) in enumerate(boxes, start=1)
        ],
    }


def _found(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def _conventional(truth, results, image_ids=None):
    """pycocotools the way its demo uses it: the oracle for everything below."""
    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO()
        index.dataset = json.loads(json.dumps(truth))
        index.createIndex()
        evaluation = COCOeval(index, index.loadRes(json.loads(json.dumps(results))), "bbox")
        if image_ids is not None:
            evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _random_case(seed, images=12, per_image=6):
    rng = np.random.default_rng(seed)
    ids = rng.permutation(1000)[:images].tolist()
    boxes, results = [], []
    for image in ids:
        for _ in range(rng.integers(0, per_image)):
            size = rng.choice([12.0, 50.0, 120.0]) * rng.uniform(0.7, 1.4, 2)
            box = [*rng.uniform(0, 80, 2), *size]
            category = int(rng.choice([1, 7]))
            boxes.append((image, category, [float(v) for v in box]))
            moved = np.array(box) + rng.normal(0, 0.06, 4) * [*size, *size]
            found = category if rng.random() < 0.85 else int(rng.choice([1, 7]))
            results.append(_found(image, found, np.abs(moved).tolist(), float(rng.random())))
        for _ in range(rng.integers(0, 4)):
            box = [*rng.uniform(0, 100, 2), *rng.uniform(5, 90, 2)]
            # Few distinct scores, so that ties between images are exercised too.
            results.append(_found(image, 7, [float(v) for v in box], round(rng.random(), 1)))
    return _truth(boxes, images=ids, crowd=(2, 5)), results


@pytest.mark.parametrize("seed", range(4))
def test_numbers_are_those_of_pycocotools(seed, capfd):
    truth, results = _random_case(seed)
    oracle = _conventional(truth, results)
    metrics = coco.evaluate_detections(truth, results)
    np.testing.assert_array_equal([metrics[n] for n in coco.METRIC_NAMES], oracle.stats)
    precision = oracle.eval["precision"]
    for k, name in enumerate(["circle", "square"]):
        all_thresholds, half = precision[:, :, k, 0, 2], precision[0, :, k, 0, 2]
        assert metrics["per_class"][name] == {
            "AP": all_thresholds[all_thresholds > -1].mean(),
            "AP50": half[half > -1].mean(),
        }
    assert all(type(metrics[n]) is float for n in coco.METRIC_NAMES)
    assert capfd.readouterr() == ("", "")


def test_image_subset_is_that_of_pycocotools():
    truth, results = _random_case(7)
    subset = [image["id"] for image in truth["images"][::2]]
    oracle = _conventional(truth, results, subset)
    metrics = coco.evaluate_detections(truth, results, image_ids=subset)
    np.testing.assert_array_equal([metrics[n] for n in coco.METRIC_NAMES], oracle.stats)


def test_inputs_are_left_alone():
    truth, results = _random_case(1)
    before = json.dumps([truth, results])
    coco.evaluate_detections(truth, results)
    assert json.dumps([truth, results]) == before


def test_perfect_detections_score_one():
    boxes = [
        (1, 1, [10, 10, 20, 20]),
        (1, 7, [50, 50, 60, 60]),
        (2, 1, [0, 0, 150, 150]),
    ]
    truth = _truth(boxes, images=(1, 2))
    results = [_found(i, c, b, 0.5 + 0.1 * k) for k, (i, c, b) in enumerate(boxes)]
    metrics = coco.evaluate_detections(truth, results)
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "ARs", "ARm", "ARl"):
        assert metrics[name] == pytest.approx(1.0)
    assert metrics["per_class"]["square"] == {"AP": pytest.approx(1.0), "AP50": pytest.approx(1.0)}


@pytest.mark.parametrize(("scores", "expected"), [((0.9, 0.8), 1.0), ((0.8, 0.9), 0.5)])
def test_one_hit_and_one_miss_by_hand(scores, expected):
    # One box. The hit first: precision 1 at every recall. The miss first: precision 1/2.
    truth = _truth([(1, 1, [10, 10, 40, 40])], categories=((1, "circle"),))
    results = [
        _found(1, 1, [10, 10, 40, 40], scores[0]),
        _found(1, 1, [120, 120, 40, 40], scores[1]),
    ]
    metrics = coco.evaluate_detections(truth, results)
    assert metrics["AP"] == pytest.approx(expected)
    assert metrics["AP50"] == pytest.approx(expected)
    assert metrics["AR1"] == pytest.approx(1.0 if expected == 1.0 else 0.0)
    assert metrics["AR10"] == pytest.approx(1.0)


def test_half_the_boxes_found_by_hand():
    # Recall stops at 1/2: precision is 1 at the recall levels 0, .01, ..., .50, that is 51 of 101.
    boxes = [(1, 1, [10, 10, 40, 40]), (1, 1, [100, 100, 40, 40])]
    truth = _truth(boxes, categories=((1, "circle"),))
    metrics = coco.evaluate_detections(truth, [_found(1, 1, boxes[0][2], 0.9)])
    assert metrics["AP"] == pytest.approx(51 / 101)
    assert metrics["AR100"] == pytest.approx(0.5)


def test_loose_box_counts_up_to_its_iou_by_hand():
    # IoU 72/100: right at the thresholds .50, .55, .60, .65, .70, wrong at the other five.
    truth = _truth([(1, 1, [0, 0, 100, 100])], categories=((1, "circle"),))
    metrics = coco.evaluate_detections(truth, [_found(1, 1, [0, 0, 100, 72], 0.9)])
    assert metrics["AP"] == pytest.approx(0.5)
    assert (metrics["AP50"], metrics["AP75"]) == (pytest.approx(1.0), 0.0)


def test_detection_in_a_crowd_is_neither_right_nor_wrong():
    boxes = [(1, 1, [0, 0, 100, 100]), (1, 1, [150, 150, 40, 40])]
    right = _found(1, 1, boxes[1][2], 0.5)
    inside = _found(1, 1, [10, 10, 30, 30], 0.9)
    crowd = _truth(boxes, categories=((1, "circle"),), crowd=(1,))
    plain = _truth(boxes[1:], categories=((1, "circle"),))
    assert coco.evaluate_detections(crowd, [inside, right])["AP"] == pytest.approx(1.0)
    assert coco.evaluate_detections(plain, [inside, right])["AP"] == pytest.approx(0.5)


def test_no_detections_are_zeros_not_a_crash():
    truth = _truth([(1, 1, [10, 10, 20, 20])])
    metrics = coco.evaluate_detections(truth, [])
    assert metrics["AP"] == metrics["AR100"] == metrics["APs"] == 0.0
    # No large box and no square exist: undefined, as pycocotools says it.
    assert metrics["APl"] == coco.UNDEFINED
    assert metrics["per_class"] == {
        "circle": {"AP": 0.0, "AP50": 0.0},
        "square": {"AP": -1.0, "AP50": -1.0},
    }


def test_no_annotations_are_undefined_not_a_crash():
    metrics = coco.evaluate_detections(_truth([]), [_found(1, 1, [0, 0, 5, 5], 0.5)])
    assert {metrics[n] for n in coco.METRIC_NAMES} == {-1.0}


def test_string_ids_and_numeric_text_are_the_same_images():
    truth, results = _random_case(3)
    expected = coco.evaluate_detections(truth, results)
    as_text = [{**r, "image_id": str(r["image_id"])} for r in results]
    assert coco.evaluate_detections(truth, as_text) == expected
    named = _truth([("b.jpg", 1, [0, 0, 50, 50])], images=("b.jpg", "a.jpg"))
    metrics = coco.evaluate_detections(named, [_found("b.jpg", 1, [0, 0, 50, 50], 0.5)])
    assert metrics["per_class"]["circle"]["AP"] == pytest.approx(1.0)


def test_categories_can_be_chosen_and_named():
    truth = _truth([(1, 1, [0, 0, 50, 50]), (1, 7, [80, 80, 50, 50])])
    results = [_found(1, 7, [80, 80, 50, 50], 0.5), _found(1, 99, [0, 0, 9, 9], 0.9)]
    metrics = coco.evaluate_detections(truth, results, category_ids=[7], class_names=["quadrat"])
    assert list(metrics["per_class"]) == ["quadrat"]
    assert metrics["AP"] == pytest.approx(1.0)
    same_name = _truth([(1, 1, [0, 0, 50, 50])], categories=((1, "x"), (7, "x")))
    assert list(coco.evaluate_detections(same_name, [])["per_class"]) == ["x (1)", "x (7)"]


def test_missing_area_and_crowd_flag_have_their_defaults():
    truth, results = _random_case(5)
    for annotation in truth["annotations"]:
        annotation["iscrowd"] = 0
    bare = json.loads(json.dumps(truth))
    for annotation in bare["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    assert coco.evaluate_detections(bare, results) == coco.evaluate_detections(truth, results)


def _changed(**changes):
    truth = _truth([(1, 1, [10, 10, 20, 20])])
    truth["annotations"][0].update(changes)
    return truth


@pytest.mark.parametrize(
    ("truth", "results", "message"),
    [
        (_changed(id=0), [], "number annotations from 1"),
        (_changed(category_id=5), [], "unknown category 5"),
        (_changed(image_id=9), [], "image id 9"),
        (_changed(bbox=[0, 0, float("nan"), 1]), [], "annotation 1"),
        (_changed(), [_found(42, 1, [0, 0, 1, 1], 0.5)], "image id 42"),
        (_changed(), [_found(1, 1, [0, 0, float("inf"), 1], 0.5)], "image 1"),
        (_changed(), [_found(1, 1, [0, 0, 1, 1], float("nan"))], "image 1.*score"),
        (_changed(), [_found(1, 1, [5, 5, -2, 1], 0.5)], "image 1.*bbox"),
        (_changed(), [_found(1, 0, [0, 0, 1, 1], 0.5)], "contiguous labels"),
        (_truth([], images=()), [], "nothing to evaluate"),
        (_truth([], images=(1, "1")), [], "twice"),
    ],
)
def test_bad_input_is_named(truth, results, message):
    with pytest.raises(ValueError, match=message):
        coco.evaluate_detections(truth, results)


def test_softmax_rule_against_numpy():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (2, 5, 4)).astype(np.float32)
    boxes = rng.uniform(0.2, 0.6, (2, 5, 4)).astype(np.float32)
    size = np.array([[100, 200], [64, 48]], np.int32)
    scores, labels, corners = jax.jit(coco.postprocess)(logits, boxes, size)
    real = softmax(logits.astype(np.float64), -1)[..., :3]
    np.testing.assert_allclose(scores, real.max(-1), rtol=1e-5)
    np.testing.assert_array_equal(labels, real.argmax(-1))
    for b, (height, width) in enumerate(size):
        cx, cy, w, h = boxes[b].T
        expected = np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)
        np.testing.assert_allclose(corners[b], expected * [width, height, width, height], rtol=1e-5)
    assert (scores.dtype, labels.dtype, corners.dtype) == (jnp.float32, jnp.int32, jnp.float32)


def test_focal_rule_against_numpy():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (2, 6, 3)).astype(np.float32)
    boxes = rng.uniform(0.2, 0.6, (2, 6, 4)).astype(np.float32)
    size = np.full((2, 2), 10, np.int32)
    scores, labels, corners = coco.postprocess(logits, boxes, size, kind="focal", max_detections=7)
    for b in range(2):
        flat = expit(logits[b].astype(np.float64)).ravel()
        best = np.argsort(-flat)[:7]
        np.testing.assert_allclose(scores[b], flat[best], rtol=1e-5)
        np.testing.assert_array_equal(labels[b], best % 3)
        wide = np.asarray(corners[b])[:, 2:] - np.asarray(corners[b])[:, :2]
        np.testing.assert_allclose(wide, boxes[b][best // 3][:, 2:] * 10, rtol=1e-4)
    all_of_them = coco.postprocess(logits, boxes, size, kind="focal")
    assert all_of_them[0].shape == (2, 18)


@pytest.mark.parametrize("kind", ["softmax", "focal"])
def test_classes_that_the_data_lack_are_never_detected(kind):
    # COCO's head has columns for more classes than the data; here one, and it is always highest.
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 2, (2, 5, 4 if kind == "softmax" else 3)).astype(np.float32)
    logits[..., 2] = 9
    boxes = rng.uniform(0.2, 0.6, (2, 5, 4)).astype(np.float32)
    size = np.full((2, 2), 10, np.int32)
    run = jax.jit(functools.partial(coco.postprocess, kind=kind), static_argnames="num_classes")
    scores, labels, corners = run(logits, boxes, size, num_classes=2)
    assert np.all(np.asarray(run(logits, boxes, size)[1])[:, :5] == 2)
    for b in range(2):
        if kind == "softmax":
            # The probabilities are still shared with the class that is left out.
            known = softmax(logits[b].astype(np.float64), -1)[:, :2]
            query, wanted, label = np.arange(5), known.max(-1), known.argmax(-1)
        else:
            flat = expit(logits[b, :, :2].astype(np.float64)).ravel()
            best = np.argsort(-flat)  # all ten pairs of a query and a class
            query, wanted, label = best // 2, flat[best], best % 2
        np.testing.assert_allclose(scores[b], wanted, rtol=1e-5)
        np.testing.assert_array_equal(labels[b], label)
        wide = np.asarray(corners[b])[:, 2:] - np.asarray(corners[b])[:, :2]
        np.testing.assert_allclose(wide, boxes[b][query][:, 2:] * 10, rtol=1e-4)


def test_postprocess_refuses_nonsense():
    logits, boxes, size = jnp.zeros((1, 2, 3)), jnp.zeros((1, 2, 4)), jnp.ones((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="kind"):
        coco.postprocess(logits, boxes, size, kind="argmax")
    with pytest.raises(ValueError, match="boxes"):
        coco.postprocess(logits, boxes[:, :1], size)


def test_results_are_plain_json_and_skip_filler():
    results = coco.to_coco_results(
        [np.int64(12), None, "x.png"],
        np.float32([[0.5], [np.nan], [0.25]]),
        np.int32([[1], [0], [0]]),
        np.float32([[[1, 2, 4, 8]], [[0, 0, 0, 0]], [[0, 0, 1, 1]]]),
        [3, 9],
    )
    assert json.loads(json.dumps(results)) == [
        {"image_id": 12, "category_id": 9, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.5},
        {"image_id": "x.png", "category_id": 3, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.25},
    ]


@pytest.mark.parametrize(
    ("score", "label", "corner", "message"),
    [
        (np.nan, 0, 1.0, "image 'cat.jpg'.*not finite"),
        (0.5, 0, np.inf, "image 'cat.jpg'.*not finite"),
        (0.5, 2, 1.0, "image 'cat.jpg'.*2 categories"),
    ],
)
def test_bad_outputs_name_the_image(score, label, corner, message):
    with pytest.raises(ValueError, match=message):
        coco.to_coco_results(["cat.jpg"], [[score]], [[label]], [[[0, 0, 1, corner]]], [1, 2])
    with pytest.raises(ValueError, match="want 2 rows"):
        coco.to_coco_results([1, 2], [[score]], [[label]], [[[0, 0, 1, corner]]], [1, 2])


def _block():
    truth, results = _random_case(2)
    return coco.results_block(
        coco.evaluate_detections(truth, results),
        images=12,
        config="shapes",
        seed=0,
        commit="abc",
        seconds=1.25,
    )


def test_results_block_survives_the_disk(tmp_path):
    block = _block()
    path = write_json_atomic(tmp_path / "deep" / "results.json", block)
    assert coco.validate_results_block(read_json(path)) == block
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("AP", 41.2, r"AP must be in \[0, 1\]"),
        ("AP50", "0.4", "AP50 must be a number"),
        ("images", 0, "images"),
        ("seed", True, "seed"),
        ("commit", None, "commit"),
        ("seconds", -1, "seconds"),
        ("per_class", {"a": {"AP": 0.1}}, "per_class"),
        ("per_class", {"a": {"AP": 0.1, "AP50": float("nan")}}, "AP50"),
        ("surprise", 1, "unknown .*surprise"),
    ],
)
def test_results_block_is_checked(key, value, message):
    with pytest.raises(ValueError, match=message):
        coco.validate_results_block({**_block(), key: value})


def test_text_table_shows_percent_and_undefined():
    truth = _truth([(1, 1, [0, 0, 50, 50])])
    metrics = coco.evaluate_detections(truth, [_found(1, 1, [0, 0, 50, 50], 0.5)])
    lines = coco.format_results(metrics).splitlines()
    assert lines[1].split() == ["100.0", "100.0", "100.0", "-", "100.0", "-"]
    assert lines[-2].split() == ["circle", "100.0", "100.0"]
    assert lines[-1].split() == ["square", "-", "-"]
    assert coco.format_results(_block()).startswith("shapes  seed 0  commit abc  12 images  1.2 s")
