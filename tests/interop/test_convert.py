"""Foreign checkpoints become model folders: the same function, whatever they were stored as."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from flax import traverse_util
from foreign import (
    ARGS,
    LABELS,
    VARIANTS,
    fixture,
    parity_cases,
    torch_file,
    write_folder,
    write_shards,
)
from PIL import Image
from safetensors.numpy import save_file

import aqdetr_jax
from aqdetr_jax.checkpoint.model_folder import load_model
from aqdetr_jax.checkpoint.transfer import match_classes
from aqdetr_jax.cli import main
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.evaluation.models import evaluate_bundle
from aqdetr_jax.interop import names
from aqdetr_jax.interop.convert import convert
from aqdetr_jax.interop.labels import COCO_NAMES, coco_outputs
from aqdetr_jax.interop.tables import TABLES
from aqdetr_jax.io import read_json
from aqdetr_jax.losses.criterion import LossWeights
from aqdetr_jax.losses.distillation import DistillationWeights
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.detector import build_detector, example_input
from aqdetr_jax.models.resnet import BackboneConfig
from aqdetr_jax.training import initial, setup
from aqdetr_jax.training.config import DistillConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

SIZE = {"size": {"shortest_edge": 96, "longest_edge": 128}}
"""An image rule that leaves the fixtures' pictures as they are."""

BACKBONE = BackboneConfig("bottleneck", (1, 1, 2, 1), (2, 4, 4, 6), stem_width=8)
MODEL = DetrConfig(
    backbone=BACKBONE, dim=32, heads=8, encoder_layers=1, decoder_layers=2, ffn=24, num_queries=9
)
"""A DETR with COCO's 91 classes; its heads are the official number."""


def same_variables(one, other):
    a, b = (traverse_util.flatten_dict(bundle.variables, sep="/") for bundle in (one, other))
    assert set(a) == set(b)
    for path, value in a.items():
        np.testing.assert_array_equal(value, b[path], err_msg=path)


def detr_state(config=MODEL):
    """A random DETR in the naming of facebookresearch/detr."""
    images, mask = example_input((64, 64))
    variables = tiny.random_variables(build_detector(config), images, mask)
    stats = traverse_util.flatten_dict(variables["batch_stats"], sep="/")
    return names.untranslate(tiny.flat(variables), stats, TABLES["detr"]), variables


@pytest.fixture(scope="module")
def detr(tmp_path_factory, quick_compile):
    """(source file, converted folder, what was converted) of a DETR."""
    folder = tmp_path_factory.mktemp("detr")
    state, variables = detr_state()
    source = folder / "detr.pth"
    source.write_bytes(torch_file(state))
    convert(source, folder / "model")
    return source, folder / "model", variables


# --- the same function ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_are_those_that_transformers_computed(name, tmp_path, capsys):
    source = write_folder(tmp_path / "theirs", name)
    (source / "preprocessor_config.json").write_text(json.dumps(SIZE))
    assert main(["convert", str(source), "--to", str(tmp_path / "ours")]) == 0
    assert f"written to {tmp_path / 'ours'}" in capsys.readouterr().out
    detector = aqdetr_jax.load(str(tmp_path / "ours"))
    config = detector.bundle.config
    # Neither changes the function: dropout, and how values are sampled.
    wanted = dataclasses.replace(
        parity_cases.TINY[name], dropout=config.dropout, deformable=config.deformable
    )
    assert config == wanted
    given, want = fixture(name)["input"], fixture(name)["output"]
    module, variables = detector.bundle.module(), detector.bundle.variables
    output = jax.jit(module.apply)(variables, given["images"], given["mask"])
    np.testing.assert_allclose(output.logits, want["logits"], atol=1e-5)
    np.testing.assert_allclose(output.boxes, want["boxes"], atol=1e-5)
    assert np.ptp(want["boxes"]) > 0.1
    if name not in ("detr_dc5", "deformable_plain"):
        return
    # The first image fills its bucket, so that alone it is what it was in the batch.
    found = detector.predict(given["images"][0], threshold=0.0)
    logits = want["logits"][-1, 0].astype(np.float64)
    if config.family == "detr":
        odds = np.exp(logits)
        scores = odds[:, :-1] / odds.sum(-1, keepdims=True)
        labels, scores = scores.argmax(-1), scores.max(-1)
        order = np.argsort(-scores, kind="stable")
        queries, labels = order, labels[order]
    else:
        scores = 1 / (1 + np.exp(-logits.ravel()))
        order = np.argsort(-scores, kind="stable")
        queries, labels = order // 5, order % 5
    np.testing.assert_allclose(found.scores, scores[order], rtol=1e-4)
    np.testing.assert_array_equal(found.labels, labels)
    cx, cy, w, h = want["boxes"][-1, 0][queries].T.astype(np.float64)
    boxes = np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1) * [128, 96, 128, 96]
    np.testing.assert_allclose(found.boxes, np.clip(boxes, 0, [128, 96, 128, 96]), atol=1e-2)
    assert found.names == tuple(LABELS[k] for k in labels)


def test_every_way_of_storing_gives_the_same(tmp_path):
    name = "deformable_plain"
    state = fixture(name)["state"]
    plain = write_folder(tmp_path / "plain", name)
    whole = convert(plain, tmp_path / "out").bundle
    same_variables(load_model(tmp_path / "out"), whole)
    sources = [write_shards(tmp_path / "shards", name), write_folder(tmp_path / "bin", name)]
    (sources[1] / "model.safetensors").unlink()
    (sources[1] / "pytorch_model.bin").write_bytes(torch_file(state))
    for file, stream in (("zip.pth", False), ("stream.pth", True)):
        sources.append(tmp_path / file)
        sources[-1].write_bytes(torch_file(state, ARGS, stream=stream))
    for number, source in enumerate(sources):
        found = convert(source, tmp_path / f"out{number}")
        same_variables(found.bundle, whole)
        assert found.bundle.config == whole.config
        assert found.bundle.info["source"]["naming"] == "huggingface_deformable_shared"
    assert whole.class_names == LABELS
    assert found.bundle.class_names == tuple(f"class {i}" for i in range(5))
    assert "names of its 5 classes are not known" in " ".join(found.notes)


def test_half_precision_is_read_as_float32(tmp_path):
    state = fixture("deformable_plain")["state"]
    half = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in state.items()}
    source = write_folder(tmp_path / "half", "deformable_plain", state=half)
    variables = convert(source, tmp_path / "out").bundle.variables
    assert {a.dtype for a in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    want = half["model.level_embed"].astype(np.float32)
    np.testing.assert_array_equal(variables["params"]["level_embed"], want)


@pytest.mark.parametrize("name", VARIANTS)
def test_names_of_the_original_repository_give_the_same(name, tmp_path):
    """Without a word about the variant but the number of heads."""
    want = convert(write_folder(tmp_path / "theirs", name), tmp_path / "want").bundle
    refine = want.config.deformable.box_refine
    table = "deformable_detr" if refine else "deformable_detr_shared"
    if want.config.family == "detr":
        table = "detr"
    stats = traverse_util.flatten_dict(want.variables["batch_stats"], sep="/")
    state = names.untranslate(tiny.flat(want.variables), stats, TABLES[table])
    (tmp_path / "a.pth").write_bytes(torch_file(state, {"nheads": 4, "num_queries": 7}))
    dilation = True if name.endswith("dc5") else None
    found = convert(tmp_path / "a.pth", tmp_path / "found", dilation=dilation)
    same_variables(found.bundle, want)
    assert found.bundle.config == want.config
    assert found.bundle.info["source"]["naming"] == table
    assert any("dilated (DC5)" in note for note in found.notes) == (dilation is None)


def test_a_class_head_that_was_written_once_serves_every_layer(tmp_path):
    """transformers 5 shares it among the layers of a refining model and writes it once."""
    state = fixture("deformable_refine")["state"]
    once = {k: v for k, v in state.items() if "class_embed" not in k or "embed.0." in k}
    assert len(once) < len(state)
    source = write_folder(tmp_path / "theirs", "deformable_refine", state=once)
    params = convert(source, tmp_path / "out").bundle.variables["params"]
    for layer in range(2):
        kernel = params[f"class_head_{layer}"]["kernel"]
        np.testing.assert_array_equal(kernel, state["class_embed.0.weight"].T)


# --- DETR, classes, evaluation --------------------------------------------------------------------


def test_detr_with_cocos_classes(detr):
    source, folder, variables = detr
    bundle = load_model(folder)
    assert bundle.config == MODEL
    same_variables(bundle, dataclasses.replace(bundle, variables=variables))
    assert bundle.class_names == coco_outputs()
    assert bundle.category_ids == tuple(range(91))
    assert len(COCO_NAMES) == len(set(COCO_NAMES.values())) == 80
    assert bundle.input.buckets[:2] == ((800, 1344), (1344, 800))
    assert (bundle.input.short_side, bundle.input.max_size) == (800, 1333)
    assert bundle.info["name"] == "detr_resnet_1_1_2_1"
    report = read_json(folder / "load_report.json")
    assert len(report["loaded"]) == len(jax.tree.leaves(variables))
    assert not report["new"] + report["dropped"] + report["mismatched"]
    assert list(report["source"]["files"]) == [source.name]
    assert len(report["notes"]) == 3  # dilation, heads, names


def test_dilation_is_the_users_word(detr, tmp_path):
    source, folder, _ = detr
    config = convert(source, tmp_path / "dc5", dilation=True).bundle.config
    assert config.backbone.strides == (1, 2, 2, 1)
    assert config.backbone.dilations == (1, 1, 1, 2)
    assert config.backbone.output_stride == 16
    same_variables(load_model(folder), load_model(tmp_path / "dc5"))
    called = tmp_path / "detr-r50-dc5.pth"
    called.write_bytes(source.read_bytes())
    with pytest.raises(ValueError, match=r"is called DC5, but .* give --dilation"):
        convert(called, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_new_class_head(detr, tmp_path):
    source, folder, _ = detr
    made = convert(source, tmp_path / "new", num_classes=4, name="mine")
    head = made.bundle.variables["params"]["class_head"]
    assert head["kernel"].shape == (32, 5)
    assert head["kernel"].std() > 0.01
    assert made.bundle.class_names == tuple(f"class {i}" for i in range(4))
    report = read_json(tmp_path / "new" / "load_report.json")
    assert report["mismatched"] == [
        {"parameter": "class_head/bias", "source": [92], "model": [5]},
        {"parameter": "class_head/kernel", "source": [32, 92], "model": [32, 5]},
    ]
    assert not report["new"]
    assert load_model(tmp_path / "new").info["name"] == "mine"
    kept = convert(source, tmp_path / "kept", num_classes=91).bundle
    same_variables(kept, load_model(folder))


def test_classes_are_evaluated_by_name_whatever_their_order(tiny_teacher):
    """Columns in another order, with a gap between them: the same detections and numbers."""
    teacher = load_model(tiny_teacher)
    head = teacher.variables["params"]["class_head"]
    order = np.roll(np.arange(len(teacher.class_names)), 3)
    columns = [*order[:4], order[0], *order[4:], -1]  # the fifth is a gap, the last "no object"
    kernel, bias = head["kernel"][:, columns], head["bias"][columns]
    kernel[:, 4], bias[4] = 0, -1e4
    params = {**teacher.variables["params"], "class_head": {"kernel": kernel, "bias": bias}}
    class_names = [teacher.class_names[k] for k in order]
    class_names.insert(4, "N/A")
    other = dataclasses.replace(
        teacher,
        config=dataclasses.replace(teacher.config, num_classes=len(class_names)),
        class_names=tuple(class_names),
        category_ids=tuple(range(len(class_names))),
        variables={**teacher.variables, "params": params},
    )
    want, detections = evaluate_bundle(teacher, tiny.FLOAT.data, "tiny", batch_size=8)
    found, others = evaluate_bundle(other, tiny.FLOAT.data, "tiny", batch_size=8)
    assert {**found, "seconds": 0} == {**want, "seconds": 0}
    assert len({r["category_id"] for r in detections.results}) > 1
    for a, b in zip(detections.results, others.results, strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        np.testing.assert_allclose(a["score"], b["score"], rtol=1e-5)
    renamed = dataclasses.replace(other, class_names=("zebra", *other.class_names[1:]))
    with pytest.raises(ValueError, match=r"that the model, with its 11 classes \(zebra, "):
        evaluate_bundle(renamed, tiny.FLOAT.data, "tiny", batch_size=8)


# --- what is trained from it ----------------------------------------------------------------------


def student_of(folder, teacher):
    """A 4-bit student of a converted model, with the classes of the tiny set."""
    model = dataclasses.replace(
        teacher.config, num_classes=0, num_auxiliary=teacher.config.num_queries, dropout=0.0
    )
    loss = LossWeights() if model.family == "detr" else LossWeights(cls=2.0, kind="focal")
    config = tiny.student(folder)
    # Without scales of the channels, so that the kernels are rounded as they are.
    quant = dataclasses.replace(config.quant, equalize=0.0)
    distill = config.distill
    if model.deformable.two_stage:  # the teacher's queries are its own proposals
        distill = DistillConfig(weights=DistillationWeights(encoder=1.0))
    config = dataclasses.replace(config, model=model, loss=loss, quant=quant, distill=distill)
    return tiny.resolved(config)


@pytest.mark.parametrize("name", ["detr", "deformable_plain", "deformable_two_stage"])
def test_low_bit_student_starts_from_it(name, detr, tmp_path):
    """Every float parameter is the source's, every step size comes from them and from data."""
    folder = detr[1]
    if name != "detr":
        folder = tmp_path / "model"
        convert(write_folder(tmp_path / "theirs", name), folder)
    teacher = load_model(folder)
    config = student_of(folder, teacher)
    classes = open_dataset(config.data, train=True).class_names
    assert setup.load_teacher(config) is not None
    source = match_classes(teacher, classes)
    module = setup.build_module(config)
    batches = tiny.batches(config, 1)
    variables, report = initial.initial_variables(config, module, source, batches)
    params, given = tiny.flat(variables), tiny.flat(teacher.variables)
    heads = {path for path in given if path.startswith("class_head")}
    for path in set(given) - heads:
        np.testing.assert_array_equal(params[path], given[path], err_msg=path)
    assert tiny.digest(variables["batch_stats"]) == tiny.digest(teacher.variables["batch_stats"])
    new = {path for path in report.new if not path.endswith("_step")}
    if config.model.deformable.two_stage:
        # The auxiliary queries are proposals, and the proposals' head knows no class by name.
        proposals = f"class_head_{config.model.decoder_layers}"
        kept = {path for path in heads if path.startswith(proposals)}
        assert len(kept) == 2
        for path in kept:
            np.testing.assert_array_equal(params[path][..., 0], given[path][..., 0], err_msg=path)
        assert new == heads - kept
    else:
        assert new == heads | {"auxiliary_queries"}
    steps = [path for path in params if path.endswith("_step")]
    assert len(steps) > 50
    assert all((params[path] > 0).all() for path in steps)
    images, mask = example_input(config.data.buckets[0])
    fresh = tiny.flat(jax.jit(module.init)(jax.random.key(5), images, mask))
    moved = [path for path in steps if not np.array_equal(params[path], fresh[path])]
    assert len(moved) > 0.9 * len(steps)
    # Four bits of normal weights miss a hundredth of their energy, steps of other weights far more.
    kernels = [path for path in steps if path.endswith("/kernel_step") and path[:-5] in given]
    assert len(kernels) > 20
    for path in kernels:
        kernel, step = given[path.removesuffix("_step")], params[path]
        top = 128 if path.startswith(("backbone/stem", "input_proj")) else 8
        rounded = np.round(np.clip(kernel / step, -top, top - 1)) * step
        assert np.square(rounded - kernel).sum() < 0.03 * np.square(kernel).sum(), path


def test_backbone_starts_a_detector(tmp_path):
    """A ResNet named as torchvision's, with its classifier and counters, which are dropped."""
    _, variables = detr_state()
    wanted = {k: v for k, v in tiny.flat(variables).items() if k.startswith("backbone/")}
    stats = traverse_util.flatten_dict(variables["batch_stats"], sep="/")
    state = names.untranslate(wanted, stats, TABLES["torchvision_resnet"])
    state |= {"fc.weight": np.ones((10, 24), np.float32), "fc.bias": np.ones(10, np.float32)}
    state["bn1.num_batches_tracked"] = np.array(3)
    save_file(state, tmp_path / "resnet.safetensors")
    made = convert(tmp_path / "resnet.safetensors", tmp_path / "out")
    assert sorted(made.report.dropped) == ["bn1.num_batches_tracked", "fc.bias", "fc.weight"]
    assert "3 dropped (batch norms' counters, fc.bias, fc.weight)" in made.summary()
    bundle = load_model(tmp_path / "out")
    assert bundle.config.backbone == BACKBONE
    with pytest.raises(ValueError, match="is a backbone"):
        bundle.module()
    config = tiny.resolved(dataclasses.replace(tiny.FLOAT, model=MODEL, init_from="out"))
    values, report = initial.initial_variables(config, setup.build_module(config), bundle, ())
    assert set(report.loaded) == set(wanted)
    for path, value in wanted.items():
        np.testing.assert_array_equal(tiny.flat(values)[path], value)
    assert tiny.digest(values["batch_stats"]) == tiny.digest(variables["batch_stats"])
    with pytest.raises(ValueError, match="without a head for --num-classes"):
        convert(tmp_path / "resnet.safetensors", tmp_path / "never", num_classes=3)


def test_predict_command_takes_it(detr, tmp_path, capsys):
    state, _ = detr_state()
    source = tmp_path / "theirs"
    source.mkdir()
    table = TABLES["huggingface_detr"]
    params, stats = names.translate(state, TABLES["detr"])
    save_file(names.untranslate(params, stats, table), source / "model.safetensors")
    config = {"model_type": "detr", "encoder_attention_heads": 8, "dilation": False}
    (source / "config.json").write_text(json.dumps(config))
    (source / "preprocessor_config.json").write_text(json.dumps({"size": 64, "max_size": 64}))
    assert main(["convert", str(source), "--to", str(tmp_path / "ours")]) == 0
    same_variables(load_model(tmp_path / "ours"), load_model(detr[1]))
    picture = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save(picture)
    arguments = ["predict", str(picture), f"--model={tmp_path / 'ours'}", "--threshold=0"]
    assert main([*arguments, f"--out={tmp_path / 'found'}"]) == 0
    assert "9 objects" in capsys.readouterr().out
    found = read_json(tmp_path / "found" / "photo.detections.json")
    assert {d["name"] for d in found["detections"]} <= set(coco_outputs())
