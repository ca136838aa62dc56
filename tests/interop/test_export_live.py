"""transformers loads what ``aqdetr export`` writes, and runs equal (needs torch).

Collected only with ``AQDETR_PARITY=live`` (``make test-parity``).
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import transformers
from flax import traverse_util
from PIL import Image

import aqdetr_jax
from aqdetr_jax.checkpoint.model_folder import load_model, save_model
from aqdetr_jax.cli import main
from aqdetr_jax.data.transforms import resized_size
from aqdetr_jax.interop.convert import convert
from aqdetr_jax.interop.huggingface import unsupported
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.heads import normalize_images
from aqdetr_jax.models.resnet import resnet_config
from experiments.parity import cases as parity_cases
from experiments.parity import export as parity_export
from experiments.parity import models as parity_models

ATOL = 1e-5
DC5 = resnet_config("resnet50", dc5=True)

MODELS: dict[str, DetrConfig] = {
    **{name: c for name, c in parity_cases.TINY.items() if not unsupported(c)},
    # timm, with which transformers dilates, has no tiny ResNet.
    **{
        f"{name}_r50": dataclasses.replace(parity_cases.TINY[name], backbone=DC5)
        for name in ("detr_dc5", "deformable_dc5")
    },
}

each = pytest.mark.parametrize("name", MODELS)
pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    # Of torch and transformers themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@functools.cache
def batch():
    return parity_cases.batch()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, quick_compile):
    """A function of a model's name: (bundle, folder of ours, exported folder, their model)."""

    @functools.cache
    def make(name):
        config, folder = MODELS[name], tmp_path_factory.mktemp(name)
        theirs = parity_models.build(config)
        state = {key: value.numpy().copy() for key, value in theirs.state_dict().items()}
        rows = parity_cases.table_of(config)
        bundle = parity_export.bundle_of(config, batch(), state, rows)
        save_model(folder / "ours", bundle)
        assert (
            main(
                [
                    "export",
                    "--format=huggingface",
                    f"--model={folder / 'ours'}",
                    f"--to={folder / 'theirs'}",
                ]
            )
            == 0
        )
        return bundle, folder / "ours", folder / "theirs", theirs

    return make


def assert_close(found, want):
    for key, value in want.items():
        assert found[key].shape == value.shape
        np.testing.assert_allclose(found[key], value, rtol=0, atol=ATOL, err_msg=key)
        assert np.ptp(value) > 0.1


@each
def test_float_models_run_equal(exported, name):
    bundle, _, folder, theirs = exported(name)
    loaded = parity_export.load(folder)
    assert type(loaded) is type(theirs)
    found = parity_export.outputs(loaded, batch())
    assert_close(found, parity_export.outputs(theirs, batch()))
    assert_close(found, parity_export.our_outputs(bundle, batch()))


@each
def test_the_configuration_is_that_of_transformers_own_model(exported, name):
    _, _, folder, theirs = exported(name)
    found = transformers.AutoConfig.from_pretrained(folder).to_dict()
    want = theirs.config.to_dict()
    # What is of a file, and what only trains.
    other = {"_name_or_path", "architectures", "dtype", "id2label", "label2id", "class_cost"}
    other |= {"use_pretrained_backbone", "use_timm_backbone", "backbone", "auxiliary_loss"}
    other |= {"dropout", "attention_dropout", "activation_dropout", "transformers_version"}
    if MODELS[name].backbone is DC5:  # the other model is no timm's
        other |= {"backbone_config", "dilation"}
        assert found["backbone_config"]["output_stride"] == 16
    for key in (found.keys() | want.keys()) - other:
        assert found.get(key) == want.get(key), key


@each
def test_what_transformers_saves_again_becomes_ours_again(exported, name, tmp_path):
    """Its own spelling of names and configuration, heads that it ties written once."""
    _, ours, folder, _ = exported(name)
    parity_export.load(folder).save_pretrained(tmp_path / "saved")
    transformers.AutoImageProcessor.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "again")
    want, found = load_model(ours), load_model(tmp_path / "again")
    for field in ("input", "class_names", "category_ids"):
        assert getattr(found, field) == getattr(want, field)
    a, b = (traverse_util.flatten_dict(x.variables, sep="/") for x in (want, found))
    assert a.keys() == b.keys()
    for path, value in a.items():
        np.testing.assert_array_equal(b[path], value, err_msg=path)


@each
def test_fake_quantized_models_run_equal(exported, name, tmp_path):
    """4-bit weights: our quantized forward, and transformers' float one of the exported values."""
    bundle = exported(name)[0]
    student = parity_export.with_four_bits(bundle)
    save_model(tmp_path / "ours", student)
    command = [
        "export",
        "--format=huggingface",
        f"--model={tmp_path / 'ours'}",
        f"--to={tmp_path / 'theirs'}",
    ]
    assert main([*command, "--fake-quantized"]) == 0
    found = parity_export.outputs(parity_export.load(tmp_path / "theirs"), batch())
    want = parity_export.our_outputs(student, batch())
    assert_close(found, want)
    unrounded = parity_export.our_outputs(bundle, batch())
    assert np.abs(unrounded["logits"] - want["logits"]).max() > 0.01


@pytest.mark.parametrize("name", ["detr_bottleneck", "deformable_two_stage"])
def test_image_processor_and_pipeline(exported, name):
    """From a picture to boxes, by transformers' pipeline and by ours."""
    _, ours, folder, _ = exported(name)
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8))
    picture = coarse.resize((307, 211), Image.Resampling.BICUBIC)
    detector = aqdetr_jax.load(ours)
    rule = detector.bundle.input
    height, width = resized_size(211, 307, rule.short_side, rule.max_size)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))[None]
    own = normalize_images(resized, np.ones(resized.shape[:3], bool), detector.bundle.config)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    theirs = processor(images=picture, return_tensors="np")["pixel_values"]
    # It resizes with torchvision: within one step of 255.
    pixels = np.asarray(own).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(theirs, pixels, rtol=0, atol=1.001 / 255 / 0.224)
    detect = transformers.pipeline("object-detection", model=str(folder), image_processor=processor)
    found = detect(picture, threshold=0.0)
    want = detector.predict(np.asarray(picture), threshold=0.0)
    count = len(found)
    scores = np.array([row["score"] for row in found])
    assert count > 5
    np.testing.assert_allclose(np.sort(scores)[::-1], want.scores[:count], atol=0.02)
    best = found[int(scores.argmax())]
    assert best["label"] == want.names[0]
    box = [best["box"][key] for key in ("xmin", "ymin", "xmax", "ymax")]
    np.testing.assert_allclose(box, want.boxes[0], atol=4)
