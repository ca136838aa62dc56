"""From an image file to network input, and from outputs to boxes, against transformers' processors.

The fixture is written by ``experiments/record/preprocessing.py``, which also makes the pictures.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from aqdetr_jax.data.eval_batches import EvalBatches
from aqdetr_jax.data.images import as_array
from aqdetr_jax.data.open import load_dataset
from aqdetr_jax.data.pipeline import PipelineConfig
from aqdetr_jax.data.transforms import resized_size
from aqdetr_jax.evaluation.coco import postprocess
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.heads import normalize_images

ROOT = Path(__file__).resolve().parents[2]
OFFICIAL = ((800, 1344), (1344, 800))


@functools.cache
def recorder():
    """The script that made the fixture, for its pictures; it needs torch only to record."""
    path = ROOT / "experiments" / "record" / "preprocessing.py"
    spec = importlib.util.spec_from_file_location("record_preprocessing", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def recorded():
    with np.load(ROOT / "tests" / "fixtures" / "preprocessing.npz") as stored:
        return dict(stored)


PICTURES = recorder().PICTURES
PHOTOGRAPHS = recorder().PHOTOGRAPHS
PAST_THE_LIMIT = ("very_long", "very_high")


def coco_folder(folder: Path, files: dict[str, bytes], suffix: str = ".png"):
    """A COCO folder of pictures with the recorder's annotations, as they are seen upright."""
    (folder / "val").mkdir(parents=True)
    images, annotations = [], []
    for number, (name, data) in enumerate(files.items(), 1):
        (folder / "val" / f"{name}{suffix}").write_bytes(data)
        height, width = as_array(data).shape[:2]
        images.append(
            {"id": number, "file_name": f"{name}{suffix}", "height": height, "width": width}
        )
        for row in recorder().annotations(height, width):
            annotations.append({**row, "image_id": number, "id": len(annotations) + 1})
    categories = [{"id": i, "name": f"kind {i}"} for i in range(3)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return load_dataset("coco", root=folder, split="val")


def rows_of(dataset, buckets=OFFICIAL, batch_size=1):
    """Evaluation batches by image name, each a dict of arrays without a batch axis."""
    config = PipelineConfig(
        batch_size=batch_size,
        buckets=buckets,
        max_boxes=8,
        eval_short_side=800,
        eval_max_size=1333,
        num_threads=0,
        prefetch=0,
    )
    found = {}
    for batch in EvalBatches(dataset, config):
        for i, index in enumerate(batch["image_index"]):
            name = Path(dataset.file_name(int(index))).stem
            found[name] = {key: value[i] for key, value in batch.items()}
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    files = {name: recorder().picture(name) for name in PICTURES}
    return rows_of(coco_folder(tmp_path_factory.mktemp("pictures"), files))


def check_pixels(row, name):
    """Every kept pixel within one of 255 steps, means of rows and columns within a twentieth."""
    height, width = row["size"]
    own = recorder().samples(row["images"][:height, :width].astype(np.float64))
    for kind in ("pil", "fast"):
        want = {part: recorded()[f"{name}/{kind}/{part}"] for part in own}
        np.testing.assert_array_equal(own["size"], want["size"])
        np.testing.assert_allclose(own["grid"], want["grid"], rtol=0, atol=1.001)
        for part in ("rows", "columns"):
            np.testing.assert_allclose(own[part], want[part], rtol=0, atol=0.05)


@pytest.mark.parametrize("name", [name for name in PICTURES if name not in PAST_THE_LIMIT])
def test_size_and_pixels(rows, name):
    check_pixels(rows[name], name)
    height, width = rows[name]["size"]
    own = recorder().samples(rows[name]["images"][:height, :width].astype(np.float64))
    # Pillow's resize is Pillow's.
    np.testing.assert_allclose(own["grid"], recorded()[f"{name}/pil/grid"], rtol=0, atol=0.01)


@pytest.mark.parametrize("name", PICTURES)
def test_boxes_and_labels(rows, name):
    """Clipped, without the empty one and the crowd, as parts of the image."""
    row, want = rows[name], recorded()[f"{name}/boxes"]
    assert len(want) == 3
    assert row["valid"].sum() == 3
    np.testing.assert_allclose(row["boxes"][:3], want, atol=2e-6)
    np.testing.assert_array_equal(row["labels"][:3], recorded()[f"{name}/labels"])


@pytest.mark.parametrize("name", ["landscape", "portrait", "tiny", "turned", "transparent"])
def test_normalised_pixels(rows, name):
    row, points = rows[name], recorder().GRID
    normal = normalize_images(row["images"][None], row["mask"][None], DetrConfig())[0]
    height, width = row["size"]
    y, x = (np.linspace(0, side - 1, points).astype(int) for side in (height, width))
    want = recorded()[f"{name}/normalised"]
    np.testing.assert_allclose(np.asarray(normal)[np.ix_(y, x)], want, atol=1e-5)
    assert np.ptp(want) > 1


def test_mask_and_padding_of_a_batch(tmp_path):
    files = {name: recorder().picture(name) for name in ("landscape", "portrait")}
    found = rows_of(coco_folder(tmp_path, files), buckets=((1088, 1088),), batch_size=2)
    shape = recorded()["batch/shape"]
    want = np.unpackbits(recorded()["batch/mask"], axis=-1, count=shape[2]).astype(bool)
    own = np.stack([found[name]["mask"] for name in files])
    assert not want.all(axis=(1, 2)).any()
    np.testing.assert_array_equal(own[:, : shape[1], : shape[2]], want)
    assert own.sum() == want.sum()  # what is left of the bucket is padding too
    np.testing.assert_array_equal(recorded()["batch/padding"], [0.0])
    for row in found.values():
        normal = normalize_images(row["images"][None], row["mask"][None], DetrConfig())[0]
        assert not np.asarray(normal)[~row["mask"]].any()


@pytest.mark.parametrize("name", PAST_THE_LIMIT)
def test_where_the_long_side_binds_the_original_rule_holds(rows, name):
    """transformers scales the long side to the limit; the original by the rounded short side.

    Published figures are the original's, so its rule is ours; the two differ by rounding.
    """
    height, width = PICTURES[name][:2]
    short = round(1333 * min(height, width) / max(height, width))
    long = int(short * max(height, width) / min(height, width))
    wanted = (short, long) if height < width else (long, short)
    assert tuple(rows[name]["size"]) == wanted == resized_size(height, width, 800, 1333)
    theirs = recorded()[f"{name}/pil/size"]
    assert min(theirs) == short
    assert 0 < max(theirs) - long <= 3


@pytest.mark.parametrize("name", ["grey", "transparent", "palette", "turned", "odd"])
def test_prediction_reads_files_as_evaluation_does(rows, name, tmp_path):
    """``predict`` shares the resize; what is left is how a file is read."""
    path = tmp_path / "picture.png"
    path.write_bytes(recorder().picture(name))
    array = as_array(path)
    size = resized_size(*array.shape[:2], 800, 1333)
    resized = np.asarray(Image.fromarray(array).resize(size[::-1], Image.Resampling.BILINEAR))
    height, width = rows[name]["size"]
    assert size == (height, width)
    np.testing.assert_array_equal(resized, rows[name]["images"][:height, :width])
    np.testing.assert_array_equal(as_array(Image.open(path)), array)


def test_photographs(bccd_root, tmp_path):
    files = {name: (bccd_root / "JPEGImages" / f"{name}.jpg").read_bytes() for name in PHOTOGRAPHS}
    found = rows_of(coco_folder(tmp_path, files, ".jpg"))
    assert set(found) == set(PHOTOGRAPHS)
    for name, row in found.items():
        check_pixels(row, name)
        np.testing.assert_allclose(row["boxes"][:3], recorded()[f"{name}/boxes"], atol=2e-6)


@pytest.mark.parametrize(("family", "kind"), [("detr", "softmax"), ("deformable", "focal")])
def test_postprocessing(family, kind):
    """Scores, classes and boxes in pixels, in transformers' order."""
    given = recorded()
    want = {part: given[f"outputs/{family}/found_{part}"] for part in ("scores", "labels", "boxes")}
    scores, labels, boxes = jax.jit(functools.partial(postprocess, kind=kind))(
        given[f"outputs/{family}/logits"], given[f"outputs/{family}/boxes"], given["outputs/sizes"]
    )
    assert want["scores"].shape == (2, 40 if kind == "softmax" else 100)
    np.testing.assert_array_equal(labels, want["labels"])
    np.testing.assert_allclose(scores, want["scores"], rtol=1e-5)
    np.testing.assert_allclose(boxes, want["boxes"], rtol=1e-5, atol=1e-3)
