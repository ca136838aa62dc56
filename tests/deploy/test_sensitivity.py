"""Groups, noise, one program for all bits, and the verb from end to end."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from aqdetr_jax.checkpoint.model_folder import load_model, save_model
from aqdetr_jax.cli import EXIT_STOPPED, main
from aqdetr_jax.data.first import FirstImages
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.deploy.groups import groups_of
from aqdetr_jax.deploy.ledger import Ledger
from aqdetr_jax.deploy.noise import OutputNoise, decibels, noise_ratio
from aqdetr_jax.deploy.switchboard import Switchboard, grids_of
from aqdetr_jax.models.config import DeformableConfig
from aqdetr_jax.models.detector import build_detector, example_input
from aqdetr_jax.parallel.hosts import StopRequest
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.quant.policy import Rule
from aqdetr_jax.quant.record import recording
from aqdetr_jax.quant.report import bit_report
from aqdetr_jax.training.bundles import calibrated_bundle
from aqdetr_jax.training.experiment import load_experiment

pytestmark = pytest.mark.usefixtures("quick_compile")


# --- groups --------------------------------------------------------------------------------------

PATHS = {
    "backbone/stem": "stem",
    "backbone/layer1_0/conv1": "backbone stage 1",
    "backbone/layer1_2/shortcut": "backbone stage 1",
    "backbone/layer11_0/conv2": "backbone stage 11",
    "backbone/layer1_0/residual": "residual sums",
    "backbone/layer1_1/expand": "backbone stage 1",
    "backbone/layer7_0/project": "backbone stage 7",
    "backbone/layer7_0/depthwise": "backbone stage 7 depthwise",
    "backbone/layer2_3/residual": "residual sums",
    "input_proj": "input projection",
    "input_proj_3": "input projection",
    "encoder/layer_0/self_attention/q_proj": "encoder 0 self-attention projections",
    "encoder/layer_0/self_attention/sampling_offsets": "encoder 0 self-attention projections",
    "encoder/layer_0/self_attention/core": "encoder 0 self-attention products",
    "decoder/layer_1/cross_attention/core": "decoder 1 cross-attention products",
    "decoder/layer_1/cross_attention/out_proj": "decoder 1 cross-attention projections",
    "decoder/layer_1/feed_forward/linear2": "decoder 1 FFN",
    "class_head_2": "heads",
    "box_head/layer_0": "heads",
    "decoder/box_head_1/layer_2": "heads",
    "reference_points": "reference_points",
}


def test_groups_by_path():
    groups = groups_of(PATHS)
    assert {path: group.name for group in groups for path in group.paths} == PATHS


def test_a_groups_pattern_finds_its_own_operations_only():
    """As rows of a policy they do not depend on their order."""
    import re

    for group in groups_of(PATHS):
        assert tuple(path for path in PATHS if re.search(group.pattern, path)) == group.paths


# --- noise ---------------------------------------------------------------------------------------


def test_noise_is_over_what_varies():
    """y = 1, 3 varies by 1 about its mean; an error of 0.1 and 0.3 is a tenth of 2 / 2."""
    reference = np.array([[[1.0], [3.0]]])
    found = reference + np.array([[[0.1], [-0.3]]])
    assert noise_ratio(reference, found) == pytest.approx((0.01 + 0.09) / 2)
    # Weights 3 and 1: the mean is 1.5, signal 3 * 0.25 + 2.25 = 3, noise 0.03 + 0.09.
    assert noise_ratio(reference, found, np.array([[3, 1]])) == pytest.approx(0.12 / 3)
    assert decibels(0.01) == pytest.approx(20)
    assert (noise_ratio(reference, reference), decibels(0.0)) == (0.0, None)


def test_fillers_and_order_of_batches():
    rng = np.random.default_rng(0)
    logits, boxes = rng.normal(size=(3, 4, 5)), rng.uniform(size=(3, 4, 4))
    meter = OutputNoise("softmax")
    meter.take(np.array([0, 1]), logits[:2], boxes[:2])
    meter.take(np.array([2, -1]), np.stack([logits[2], logits[0]]), boxes[[2, 0]])
    assert meter.finish() == {"logits_noise": 0.0, "boxes_noise": 0.0}
    meter.take(np.arange(3), logits.astype(np.float32), boxes + np.array([0.1, 0, 0, 0]))
    moved = meter.finish()
    assert moved["logits_noise"] == 0
    odds = np.exp(logits)
    score = (odds / odds.sum(-1, keepdims=True))[..., :-1].max(-1)
    mean = np.average(boxes, axis=(0, 1), weights=score)
    expected = 0.01 * score.sum() / (score[..., None] * (boxes - mean) ** 2).sum()
    assert moved["boxes_noise"] == pytest.approx(expected, rel=1e-5)


def test_proposals_are_compared_by_box():
    rng = np.random.default_rng(1)
    logits, boxes = rng.normal(size=(2, 6, 3)), rng.uniform(size=(2, 6, 4))
    order = rng.permutation(6)
    by_box, by_number = OutputNoise("focal", by_box=True), OutputNoise("focal")
    for meter in (by_box, by_number):
        meter.take(np.arange(2), logits, boxes)
        meter.finish()
        meter.take(np.arange(2), logits[:, order], boxes[:, order])
    assert by_box.finish() == {"logits_noise": 0.0, "boxes_noise": 0.0}
    assert by_number.finish()["logits_noise"] > 0.5


# --- measurements that are kept ------------------------------------------------------------------


def test_a_ledger_goes_on_and_refuses_another(tmp_path):
    path = tmp_path / "s.json"
    first = Ledger(path, {"model": "a", "images": 5})
    first.add("alone", "x", 4, {"AP": 0.5}, 1.0)
    again = Ledger(path, {"model": "a", "images": 5})
    assert again.find("alone", "x", 4) == first.rows[0]
    assert again.find("alone", "x", 8) is None
    with pytest.raises(ValueError, match="measurements with another model, images: choose another"):
        Ledger(path, {"model": "b", "images": 6})
    path.write_text("[1]")
    with pytest.raises(ValueError, match="no measurements of this version"):
        Ledger(path, {})
    with pytest.raises(NotADirectoryError, match="name another with --out"):
        Ledger(path / "s.json", {})


def test_the_first_images_are_a_set():
    whole = open_dataset(tiny.FLOAT.data, train=False)
    part = FirstImages(whole, 4)
    assert len(part) == 4
    truth = part.coco_ground_truth()
    assert [image["id"] for image in truth["images"]] == [whole.image_id(i) for i in range(4)]
    kept = [a for a in whole.coco_ground_truth()["annotations"] if a["image_id"] <= 4]
    assert truth["annotations"] == kept
    np.testing.assert_array_equal(part[3].image, whole[3].image)
    with pytest.raises(IndexError):
        part[4]
    assert part.fingerprint != whole.fingerprint
    assert FirstImages(whole, 99).name == whole.name
    with pytest.raises(ValueError, match="at least 1"):
        FirstImages(whole, 0)


# --- one program for all bits --------------------------------------------------------------------

WEIGHTS_ONLY = Rule(r"feed_forward/linear1", 3, None, None)
DEFORMABLE = dataclasses.replace(
    tiny.FLOAT,
    model=dataclasses.replace(
        tiny.MODEL,
        family="deformable",
        decoder_layers=1,
        deformable=DeformableConfig(levels=2, stages=2, points=2, norm_groups=4),
    ),
    loss=dataclasses.replace(tiny.FLOAT.loss, kind="focal"),
)
CASES = {
    "detr": (
        tiny.FLOAT,
        dict(grid="centred", renormalize=True),
        (
            QuantConfig(),
            QuantConfig("w4a4", rules=(WEIGHTS_ONLY, Rule("decoder/layer_0/", 2, 8, 3))),
        ),
    ),
    "deformable": (
        DEFORMABLE,
        dict(grid="offset", attention_granularity="tensor"),
        (QuantConfig(), QuantConfig("w3a3-attn8")),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_switchboard_is_every_policys_own_model(case):
    config, options, policies = CASES[case]
    teacher = tiny.bundle(config, drawn=False)
    options |= {"calibration_batches": 1}
    train_set = open_dataset(config.data, train=True)
    board = Switchboard(
        dataclasses.replace(config, quant=QuantConfig("w4a4", **options)), teacher, train_set
    )
    image = train_set[0].image[None]
    mask = np.ones(image.shape[:3], bool)
    mask[:, :, 50:] = False
    program = jax.jit(board.bundle.module().apply)
    for policy in policies:
        quant = dataclasses.replace(policy, **options)
        grids = grids_of(board.record(quant))
        assert bool(grids) == quant.quantized
        found = program(board.variables(grids), image, mask)
        own = (
            calibrated_bundle(dataclasses.replace(config, quant=quant), teacher)
            if quant.quantized
            else teacher
        )
        wanted = jax.jit(own.module().apply)(own.variables, image, mask)
        for name in ("logits", "boxes", "memory"):
            np.testing.assert_allclose(
                getattr(found, name), getattr(wanted, name), rtol=2e-5, atol=2e-5, err_msg=name
            )
    assert program._cache_size() == 1
    with pytest.raises(ValueError, match="no quantizer 'nowhere/input'"):
        board.variables({"nowhere/input": board.uniform(4)[0].activation})


# --- the verb ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory, quick_compile):
    """(folder, configuration file) after ``aqdetr sensitivity``, which was stopped once.

    The FFN of the second decoder layer adds nothing, so that no bits can hurt it.
    """
    folder = tmp_path_factory.mktemp("study")
    teacher = tiny.bundle(drawn=False)
    ffn = teacher.variables["params"]["decoder"]["layer_1"]["feed_forward"]["linear2"]
    for value in ffn.values():
        value[:] = 0
    save_model(folder / "teacher", teacher)
    config = tiny.student(folder / "teacher")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_auxiliary=0, auxiliary_groups=1, dropout=0.0),
        auxiliary=tiny.FLOAT.auxiliary,
        distill=tiny.FLOAT.distill,
        train=dataclasses.replace(config.train, steps=1, pictures=0),
    )
    file = tiny.write_config(config, folder / "tiny.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "seen", lambda self, done: done == 3)
        assert main(verb(folder, file)) == EXIT_STOPPED
    shutil.copy(folder / "out" / "sensitivity.json", folder / "stopped.json")
    assert main(verb(folder, file)) == 0
    return folder, file


def verb(folder, file, *more):
    return [
        "sensitivity",
        f"--config={file}",
        f"--model={folder / 'teacher'}",
        f"--out={folder / 'out'}",
        "--images=4",
        "--bits=8,2",
        *more,
    ]


def test_a_study_that_was_stopped_goes_on(study):
    folder, _ = study
    stopped, whole = (
        json.loads((folder / name).read_text())["rows"]
        for name in ("stopped.json", "out/sensitivity.json")
    )
    assert len(stopped) == 3
    assert whole[:3] == stopped
    keys = [(row["kind"], row["group"], str(row["bits"])) for row in whole]
    assert len(set(keys)) == len(keys)


def test_what_is_measured(study):
    folder, file = study
    result = json.loads((folder / "out" / "sensitivity.json").read_text())
    rows = {(r["kind"], r["group"], str(r["bits"])): r for r in result["rows"]}
    names = [group["name"] for group in result["groups"]]
    assert names[0] == "stem"
    assert {"heads", "decoder 1 cross-attention products", "encoder 0 FFN"} <= set(names)
    assert all(("alone", name, bits) in rows for name in names for bits in "82")
    assert ("all but", "stem", "None") in rows
    assert ("all but", "heads", "None") not in rows  # float in the policy
    # Nothing that the decoder's second FFN does can be lost.
    for bits in "82":
        exact = rows["alone", "decoder 1 FFN", bits]
        assert exact["snr_db"] is None
        assert (exact["noise"], exact["AP"]) == (0.0, rows["float", "", "None"]["AP"])
    # More bits, less noise.
    for name in set(names) - {"decoder 1 FFN"}:
        assert 0 < rows["alone", name, "8"]["noise"] < rows["alone", name, "2"]["noise"], name
    # The policy's row is of its own model, compared with the float one.
    config, teacher = load_experiment(str(file)), load_model(folder / "teacher")
    images = open_dataset(config.data, train=False)
    batch = np.stack([images[i].image for i in range(4)])
    meter = OutputNoise("softmax")
    for bundle in (teacher, calibrated_bundle(config, teacher)):
        output = jax.jit(bundle.module().apply)(
            bundle.variables, batch, np.ones(batch.shape[:3], bool)
        )
        meter.take(np.arange(4), output.logits[-1], output.boxes[-1])
        found = meter.finish()
    for name, value in found.items():
        assert rows["policy", "", "None"][name] == pytest.approx(value, rel=1e-3)


def report_of(folder, quant):
    """Bits of the teacher's model under a policy."""
    module = build_detector(load_model(folder / "teacher").config, quant.build())
    with recording() as rows:
        jax.eval_shape(module.init, jax.random.key(0), *example_input((64, 64)))
    return bit_report(rows)


def test_the_choice_keeps_the_budget_and_is_written_as_a_configuration(study):
    folder, file = study
    result = json.loads((folder / "out" / "sensitivity.json").read_text())
    choice, given_ = result["choice"], load_experiment(str(file))
    mixed = load_experiment(str(folder / "out" / "mixed.json"))
    assert mixed.init_from == str(folder / "teacher")
    assert (
        dataclasses.replace(mixed, name=given_.name, quant=given_.quant, init_from=given_.init_from)
        == given_
    )
    assert choice["bits"]["decoder 1 FFN"] == 2  # no noise at any bits: the fewest
    assert not {"heads", "encoder 0 self-attention products"} & set(choice["bits"])
    packed, policy = (report_of(folder, quant) for quant in (mixed.quant, given_.quant))
    assert packed["packed_bytes"] == choice["bytes"] <= choice["policy_bytes"]
    assert choice["policy_bytes"] == policy["packed_bytes"]
    by_path = {row["path"]: row for row in packed["rows"]}
    for group in result["groups"]:
        if group["chosen_bits"]:
            weights = {by_path[p]["weight_bits"] for g in groups_of(by_path) for p in g.paths
                       if g.name == group["name"]}  # fmt: skip
            assert weights == {group["chosen_bits"]}


def test_the_chosen_policy_trains(study):
    folder, _ = study
    command = ["train", f"--config={folder / 'out' / 'mixed.json'}", f"--workdir={folder / 'run'}"]
    assert main(command) == 0
    bits = json.loads((folder / "run" / "bit_report.json").read_text())
    choice = json.loads((folder / "out" / "sensitivity.json").read_text())["choice"]
    assert bits["packed_bytes"] == choice["bytes"]


def test_the_report(study):
    folder, _ = study
    text = (folder / "out" / "report.html").read_text()
    assert "Sensitivity of tiny_student" in text
    assert "decoder 1 cross-attention products" in text
    with Image.open(folder / "out" / "sensitivity.png") as picture:
        assert picture.width > 1000


def test_again_it_measures_nothing_and_takes_another_budget(study, capsys):
    folder, file = study
    path = folder / "out" / "sensitivity.json"
    before = json.loads(path.read_text())["rows"]
    now = json.loads(path.read_text())["choice"]["bytes"]
    assert main(verb(folder, file, "--budget=100")) == 1
    assert "with every group at its fewest bits the model takes" in capsys.readouterr().err
    assert main(verb(folder, file, f"--budget={now - 1}")) == 0
    after = json.loads(path.read_text())
    assert after["choice"]["bytes"] < now
    assert after["rows"][: len(before)] == before
    assert [row["kind"] for row in after["rows"][len(before) :]] == ["mixed"]
    assert after["rows"][-1]["noise"] > 0  # compared with the float model's outputs, made anew


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--images=5",), "holds measurements with another images"),
        (("--bits=8,9",), "candidate bits are of (2, 3, 4, 5, 6, 7, 8), got (9, 8)"),
        (("--bits=four",), "candidate bits are written 8,4,3,2; got 'four'"),
        (("--budget=small",), "a budget of 'small' is none"),
        (("quant.policy=float",), "tiny_student quantizes nothing"),
        (("quant.align_queries=True",), "set --config.quant.align_queries=False"),
        (("model.dim=16", "model.heads=2"), "is not the model of the checkpoint"),
    ],
)
def test_what_cannot_be_is_one_line(study, capsys, more, message):
    folder, file = study
    if any(text.startswith("model.") for text in more):
        more = (*more, f"--out={folder / 'other'}")
    assert main(verb(folder, file, *more)) == 1
    assert message in capsys.readouterr().err
    assert not (folder / "other").exists()
