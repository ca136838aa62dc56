"""COCO 2017 and VOC 2007 + 2012 in their authors' layouts, faults and all, from archives to AP."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import re
from types import ModuleType, SimpleNamespace

import numpy as np
import published_coco
import published_voc
import pytest
import tiny
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from aqdetr_jax.cli import main
from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.official import open_official
from aqdetr_jax.data.tfds_builder import TfdsDataset
from aqdetr_jax.evaluation.coco import METRIC_NAMES, evaluate_detections

pytestmark = pytest.mark.usefixtures("quick_compile")

SETS: dict[str, ModuleType] = {"coco2017": published_coco, "voc0712": published_voc}
JUDGED = {"coco2017": "val2017", "voc0712": "test"}


def splits_of(name, sets):
    """Split -> its pictures in order."""
    if name == "coco2017":
        return sets
    old, test, new = sets.values()
    return {"trainval": old + new, "test": test}


def run(*words):
    """(status, what was said, lines of errors) of a command."""
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        status = main([str(word) for word in words])
    return status, said.getvalue(), errors.getvalue().strip().splitlines()


@pytest.fixture(scope="module", params=list(SETS))
def made(request, tmp_path_factory):
    """A set made of archives with every fault, each mended when the program named it."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    module, manual, out = SETS[name], folder / "manual", folder / "out"
    sets = module.everything()
    module.write(folder / "loose", sets)
    faults = module.refusals(sets)
    for fault in faults.values():
        fault.plant(folder / "loose")
    module.pack(folder / "loose", manual)
    words = ("prepare-data", f"--set={name}", f"--manual={manual}", f"--out={out}", "--partial")
    heard = ""  # of all tries: what is found in annotations is said once in a process
    while True:
        status, said, errors = run(*words)
        heard += said
        if not status:
            break
        assert len(errors) == 2, errors  # the reason, and how to see more
        assert not out.exists(), "something is left"
        found = [key for key, fault in faults.items() if re.search(fault.said, errors[0])]
        assert len(found) == 1, errors
        faults.pop(found[0]).mend(manual)
    assert not faults, "not found"
    splits = splits_of(name, sets)
    return SimpleNamespace(name=name, out=out, manual=manual, splits=splits, said=heard)


def test_faults_are_refused_until_mended_and_the_rest_is_said(made):
    """What users correct in unpacked files stays, though the archives lie beside them."""
    for split, pictures in made.splits.items():
        boxes = [box for picture in pictures for box in picture.boxes]
        fates = collections.Counter(box.fate for box in boxes)
        ignored, kept = fates.pop("ignored"), fates[""] + fates["ignored"]
        name = {"coco2017": "coco", "voc0712": "voc"}[made.name]
        empty = sum(not any(b.fate in ("", "ignored") for b in p.boxes) for p in pictures)
        lines = made.said.splitlines()
        line = [x for x in lines if x.startswith(f"{name}/{split}: ") and "images (" in x][-1]
        assert empty == {"trainval": 2}.get(split, 1)
        assert f"{len(pictures)} images ({empty} without" in line
        assert f"{kept + ignored} boxes ({ignored} crowd or difficult;" in line
        counts = {reason: count for reason, count in fates.items() if reason}
        assert len(counts) == 4
        assert TfdsDataset(made.out, split).drops == counts
        [left_out] = [x for x in made.said.splitlines() if f"{split}: left out boxes" in x]
        assert all(f"{count} {reason}" in left_out for reason, count in counts.items())
    if made.name == "coco2017":
        assert made.said.count("2 annotations have no area above 0 (first: annotation ") == 2
        assert made.said.count("annotation id 0 gets another number in evaluation") == 2
    assert " files were changed since it was unpacked, and stay so" in made.said


def test_prepared_and_unpacked_are_what_was_published(made, tmp_path):
    """Pixels by Pillow alone, boxes as they were meant."""
    module = SETS[made.name]
    module.write(tmp_path / "loose", module.everything())
    unpacked = open_official(made.name, tmp_path / "loose", partial=True)
    for split, pictures in made.splits.items():
        prepared = TfdsDataset(made.out, split)
        assert prepared.fingerprint == unpacked[split].fingerprint
        assert prepared.clipped == unpacked[split].clipped > 0
        assert len(prepared) == len(pictures)
        for index, picture in enumerate(pictures):
            for dataset in (prepared, unpacked[split]):
                example = dataset[index]
                np.testing.assert_array_equal(example.image, picture.seen())
                height, width = picture.size
                kept = [b for b in picture.boxes if b.fate in ("", "ignored")]
                wanted = np.reshape([b.corners for b in kept], (-1, 4))
                wanted = np.clip(wanted, 0, [width, height, width, height])
                np.testing.assert_allclose(example.boxes, wanted, atol=1e-4)
                assert example.iscrowd.tolist() == [b.fate == "ignored" for b in kept]
                names = [dataset.class_names[label] for label in example.labels]
                assert names == [b.kind for b in kept]


# --- evaluation ----------------------------------------------------------------------------------


def by_hand(truth, detections):
    """The twelve numbers of pycocotools, of ground truth that is not the program's."""
    with contextlib.redirect_stdout(io.StringIO()):
        if isinstance(truth, dict):
            numbers = {i.get("was", i["id"]): i["id"] for i in truth["images"]}
            detections = [{**d, "image_id": numbers[d["image_id"]]} for d in detections]
            judge = COCO()
            judge.dataset = truth
            judge.createIndex()
        else:
            judge = COCO(str(truth))
        evaluation = COCOeval(judge, judge.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def truth_of(name, sets):
    """Ground truth of the judged split, written by hand."""
    module = SETS[name]
    pictures = splits_of(name, sets)[JUDGED[name]]
    return module.truth(pictures if name == "coco2017" else [pictures])


def guesses(dataset, seed=0):
    """Detections that are partly right, of every kind of box there is."""
    rng, results = np.random.default_rng(seed), []
    truth = dataset.coco_ground_truth()
    for box in truth["annotations"]:
        for _ in range(rng.integers(0, 4)):
            noise = rng.normal(0, rng.choice([0.01, 0.1, 0.3]), 4) * (box["bbox"][2:] * 2)
            x, y, w, h = (box["bbox"] + noise).tolist()
            wrong = rng.random() < 0.2
            results.append(
                {
                    "image_id": truth["images"][rng.integers(0, 9)]["id"]
                    if wrong
                    else box["image_id"],
                    "category_id": box["category_id"],
                    "bbox": [x, y, abs(w), abs(h)],
                    "score": float(rng.random()),
                }
            )
    return results


@pytest.mark.parametrize("faults", [True, False])
@pytest.mark.parametrize("name", list(SETS))
def test_partly_right_detections_are_judged_as_pycocotools_does(name, faults, tmp_path):
    module = SETS[name]
    sets = module.everything(faults=faults)
    module.write(tmp_path / "set", sets)
    dataset = open_official(name, tmp_path / "set", partial=True)[JUDGED[name]]
    detections = guesses(dataset)
    metrics = evaluate_detections(dataset.coco_ground_truth(), detections)
    numbers = [metrics[key] for key in METRIC_NAMES]
    assert min(numbers[:3]) > 0.05
    assert max(numbers[:3]) < 0.95
    np.testing.assert_allclose(numbers, by_hand(truth_of(name, sets), detections), atol=1e-12)
    if name == "coco2017" and not faults:  # as its users do it, without a line of ours
        file = tmp_path / "set/annotations/instances_val2017.json"
        np.testing.assert_allclose(numbers, by_hand(file, detections), atol=1e-12)


def test_a_model_is_trained_and_judged_as_pycocotools_does(made, tmp_path):
    train_split, eval_split = made.splits
    config = dataclasses.replace(
        tiny.FLOAT,
        model=dataclasses.replace(tiny.MODEL, decoder_layers=1),
        data=DataConfig(
            kind="tfds",
            root=str(made.out),
            train_split=train_split,
            eval_split=eval_split,
            buckets=tiny.FLOAT.data.buckets,
            augment=tiny.FLOAT.data.augment,
        ),
        optimizer=dataclasses.replace(tiny.FLOAT.optimizer, lr=3e-3, lr_backbone=3e-3),
        train=dataclasses.replace(
            tiny.FLOAT.train, steps=40, log_every=20, checkpoint_every=40, pictures=0
        ),
    )
    file, folder, out = tmp_path / "c.json", tmp_path / "run", tmp_path / "eval"
    tiny.write_config(config, file)
    status, said, errors = run("inspect-data", f"--config={file}")
    assert status == 0, errors
    assert "would stop" not in said
    status, said, errors = run("train", f"--config={file}", f"--workdir={folder}")
    assert status == 0, errors
    assert "left out boxes" in said
    status, said, errors = run("eval", f"--config={file}", f"--model={folder}", f"--out={out}")
    assert status == 0, errors
    truth = truth_of(made.name, SETS[made.name].everything())
    for place in (folder, out):
        results, detections = (
            json.loads((place / f"{part}.json").read_text()) for part in ("results", "detections")
        )
        numbers = [results[key] for key in METRIC_NAMES]
        assert numbers[1] > 0.1  # otherwise zeros would be compared
        np.testing.assert_allclose(numbers, by_hand(truth, detections), atol=1e-12)


# --- looking -------------------------------------------------------------------------------------


def inspected(name, root, file, *options):
    """``run`` of ``inspect-data`` on an unpacked folder; of VOC on that of one year."""
    tiny.write_config(dataclasses.replace(tiny.FLOAT, data=DataConfig(kind="auto")), file)
    words = [f"data.root={root}"]
    if name == "voc0712":
        words = [
            f"data.root={root / 'VOCdevkit' / 'VOC2007'}",
            "data.train_split=trainval",
            "data.eval_split=test",
        ]
    return run("inspect-data", f"--config={file}", *words, *options)


def test_unpacked_folders_are_inspected(made, tmp_path):
    picture = tmp_path / "look.png"
    status, said, errors = inspected(
        made.name, made.manual, tmp_path / "c.json", f"--pictures={picture}"
    )
    assert status == 0, errors
    assert picture.stat().st_size > 10_000
    for line in (
        "dropped: zero_area",
        "dropped: negative",
        "dropped: non_finite",
        "dropped: outside",
        "! dropped boxes: 4",
        "! doubled boxes (same class, IoU > 0.9): 1",
        "! images with an EXIF rotation: 3",
        "(1 without boxes)",
        " RGB, 1 L, 1 CMYK, 1 RGBA (all read as RGB)",
    ):
        assert said.count(line) == 2, line
    assert "unreadable" not in said
    assert "another size" not in said


@pytest.mark.parametrize("name", list(SETS))
def test_images_that_stop_training_are_all_listed(name, tmp_path):
    module, root = SETS[name], tmp_path / "set"
    sets = module.everything()
    module.write(root, sets)
    planted = ("other size", "cut", "missing", "no picture", "empty")
    faults = {k: f for k, f in module.refusals(sets).items() if k in planted}
    for fault in faults.values():
        fault.plant(root)
    status, said, _ = inspected(name, root, tmp_path / "c.json")
    assert status == 1
    stops = [line for line in said.splitlines() if line.startswith("training would stop: ")]
    assert len(stops) == {"coco2017": 3, "voc0712": 2}[name]
    wrong = [fault.file for fault in faults.values() if "VOC2012" not in fault.file]
    assert len(wrong) == {"coco2017": 5, "voc0712": 2}[name]
    for file in wrong:
        assert file.rpartition("/")[2] in said
    assert inspected(name, root, tmp_path / "c.json", "data.on_error=skip")[0] == 0


def test_archives_are_told_from_a_set(tmp_path):
    for name, module in SETS.items():
        module.write(tmp_path / "loose" / name, module.everything(faults=False))
        module.pack(tmp_path / "loose" / name, tmp_path / name)
        file = tmp_path / "c.json"
        tiny.write_config(dataclasses.replace(tiny.FLOAT, data=DataConfig(kind="auto")), file)
        status, _, errors = run("inspect-data", f"--config={file}", f"data.root={tmp_path / name}")
        assert status == 1
        assert f"aqdetr prepare-data --set={name} --manual={tmp_path / name}" in errors[0]


def test_the_copy_is_as_published(tmp_path):
    """Judged by COCO's own tools."""
    sets = published_coco.everything(faults=False)
    published_coco.write(tmp_path, sets)
    for split, pictures in sets.items():
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(tmp_path / "annotations" / f"instances_{split}.json"))
        assert len(coco.cats) == 80
        assert max(coco.cats) == 90
        by_id = {picture.id: picture for picture in pictures}
        crowds = 0
        for annotation in coco.anns.values():
            encoded = coco.annToRLE(annotation)
            assert encoded["size"] == list(by_id[annotation["image_id"]].size)
            x, y, w, h = annotation["bbox"]
            np.testing.assert_allclose(masks.toBbox(encoded), [x, y, w, h], atol=1)
            crowds += annotation["iscrowd"]
        assert crowds > 2
