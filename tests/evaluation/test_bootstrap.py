import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from aqdetr_jax.evaluation.bootstrap import bootstrap_ap, image_draws

IMAGES = 8


def case(seed):
    """Ground truth and results of a few images, none with equal scores."""
    rng = np.random.default_rng(seed)
    boxes, results = [], []
    for image in range(10, 10 + IMAGES):
        for _ in range(rng.integers(1, 5)):
            box = np.concatenate([rng.uniform(0, 80, 2), rng.uniform(20, 90, 2)])
            category = int(rng.choice([1, 7]))
            boxes.append((image, category, box.tolist(), int(rng.random() < 0.2)))
            moved = (box + rng.normal(0, 4, 4)).tolist()
            if rng.random() < 0.9:
                results.append((image, category, moved, float(rng.random())))
            if rng.random() < 0.3:
                results.append((image, 7, rng.uniform(20, 60, 4).tolist(), float(rng.random())))
    return boxes, results


def coco_json(boxes, results, images):
    """Both in COCO's form."""
    truth = {
        "images": [{"id": i, "width": 200, "height": 200} for i in images],
        "categories": [{"id": 1, "name": "a"}, {"id": 7, "name": "b"}],
        "annotations": [
            {
                "id": k,
                "image_id": i,
                "category_id": c,
                "bbox": b,
                "area": b[2] * b[3],
                "iscrowd": crowd,
            }
            for k, (i, c, b, crowd) in enumerate(boxes, start=1)
        ],
    }
    found = [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in results]
    return truth, found


def pycocotools_ap(truth, found):
    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO()
        index.dataset = json.loads(json.dumps(truth))
        index.createIndex()
        evaluation = COCOeval(index, index.loadRes(json.loads(json.dumps(found))), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[0]


def test_each_draw_is_a_set_of_its_own_to_pycocotools():
    boxes, results = case(0)
    draws = np.concatenate([np.arange(IMAGES)[None], image_draws(IMAGES, 5, seed=3)])
    wanted = []
    for draw in draws:
        b, r = [], []
        for copy, position in enumerate(draw):  # an image drawn twice becomes two images
            b += [(copy + 1, *row[1:]) for row in boxes if row[0] == 10 + position]
            r += [(copy + 1, *row[1:]) for row in results if row[0] == 10 + position]
        wanted.append(pycocotools_ap(*coco_json(b, r, range(1, IMAGES + 1))))
    assert len(set(wanted)) > 3
    assert any(crowd for *_, crowd in boxes)
    found = bootstrap_ap(*coco_json(boxes, results, range(10, 10 + IMAGES)), draws)
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_draws_of_another_set_are_refused():
    truth, found = coco_json(*case(1), range(10, 10 + IMAGES))
    with pytest.raises(ValueError, match=r"\(4, 9\), not \[R, 8\]"):
        bootstrap_ap(truth, found, image_draws(9, 4))
