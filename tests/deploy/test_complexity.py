"""Counts against published and closed-form values, the packed bytes against the parameters."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest
import tiny
from test_packed import CASES, deployed

from aqdetr_jax.cli import main
from aqdetr_jax.deploy.archive import read_archive
from aqdetr_jax.deploy.bits import Codes
from aqdetr_jax.deploy.complexity import (
    GROUPS,
    complexity_of_config,
    complexity_of_model,
    format_complexity,
)
from aqdetr_jax.deploy.packed import write_packed
from aqdetr_jax.deploy.published import MEAN_SIZE, Q_DETR_R50, as_papers_count
from aqdetr_jax.models.config import DeformableConfig, DetrConfig
from aqdetr_jax.models.detector import build_detector, deployed_ops, record_ops
from aqdetr_jax.quant.record import OpRecord
from aqdetr_jax.quant.report import PACKED_PARTS, packed_parts
from aqdetr_jax.quant.spec import QuantSpec, packed_size
from aqdetr_jax.training.assemble import variables_of
from aqdetr_jax.training.experiment import load_experiment


@functools.cache
def counted(name: str, size: tuple[int, int] | None = MEAN_SIZE):
    return complexity_of_config(load_experiment(name), size)


# --- published -----------------------------------------------------------------------------------

# Learnable, trained in the official recipe, with scale and bias of frozen norms, whole state:
# closed forms; the trained ones of DETR-R50 and of Deformable DETR stand in public logs.
# GFLOPs: as published, means over the first 100 images of val2017.
OFFICIAL = {
    "coco:r50": (41_524_768, 41_302_368, 41_577_888, 41_631_008, 86),
    "coco:r50-dc5": (41_524_768, 41_302_368, 41_577_888, 41_631_008, 187),
    "coco:r101": (60_464_672, 60_242_272, 60_570_016, 60_675_360, 152),
    "coco:r101-dc5": (60_464_672, 60_242_272, 60_570_016, 60_675_360, 253),
    "coco_deformable:r50": (40_069_665, 39_847_265, None, 40_175_905, 173),
    "coco_deformable:r50-single": (34_066_593, 33_844_193, None, 34_172_833, 78),
    "coco_deformable:r50-dc5": (34_066_593, 33_844_193, None, 34_172_833, 128),
    "coco_deformable:r50-refine": (40_849_660, 40_627_260, None, 40_955_900, 173),
    "coco_deformable:r50-two-stage": (41_181_529, 40_959_129, None, 41_287_769, 173),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_models(name):
    learnable, trained, weights, state, flops = OFFICIAL[name]
    made = counted(f"{name},float")
    found = made["parameters"]
    assert (found["learnable"], found["trained"], found["state"]) == (learnable, trained, state)
    assert weights in (None, found["weights"])
    assert found["grids"] == 0
    assert made["papers"]["flops"] / 1e9 == pytest.approx(flops, rel=0.03)
    assert sum(part["macs"] for part in made["groups"]) == made["macs"]
    assert sum(part["packed_bytes"] for part in made["groups"]) == made["packed_bytes"]


def test_multiply_adds_of_a_fixed_size_by_part():
    made = counted("coco:r50,float", (800, 1066))
    assert made["macs"] / 1e9 == pytest.approx(81.17, abs=0.005)
    groups = {part["group"]: part["macs"] / 1e9 for part in made["groups"]}
    expected = {
        "backbone": 69.98,
        "projections": 0.45,
        "encoder": 8.90,
        "decoder": 1.83,
        "heads": 0.02,
        "embeddings": 0.0,
    }
    assert groups == pytest.approx(expected, abs=0.005)


def test_largest_image_is_the_default():
    made = counted("coco:r50,float", None)
    assert (made["height"], made["width"]) == (800, 1333)
    assert made["macs"] / 1e9 == pytest.approx(101.59, abs=0.005)


def test_deformable_of_a_fixed_size():
    made = counted("coco_deformable:r50,float", (800, 1066))
    assert made["papers"]["flops"] / 1e9 == pytest.approx(165.51, abs=0.05)


def test_a_low_bit_model_is_its_float_model_with_grids():
    low, plain = counted("coco:r50,w4a4"), counted("coco:r50,float")
    assert low["macs"] == plain["macs"]
    for key in ("learnable", "weights", "state"):
        assert low["parameters"][key] == plain["parameters"][key]
    assert low["parameters"]["trained"] == low["parameters"]["learnable"]  # nothing is held
    assert low["float_bytes"] == plain["float_bytes"] == 4 * 41_631_008
    assert low["float_bytes"] / low["packed_bytes"] > 7
    # Folded norms: of four vectors of 26,560 channels one is left.
    assert plain["float_bytes"] - plain["packed_bytes"] == 3 * 4 * 26_560
    assert plain["packed_parts"]["floats"] == plain["packed_bytes"]
    assert "a packed file is a float file" in format_complexity(plain)


# --- Q-DETR's way of counting --------------------------------------------------------------------


def test_rule_of_size_and_ops_by_hand():
    weight, signed = QuantSpec(4, granularity="channel"), QuantSpec(4)
    rows = [
        OpRecord("a", "dense", weight, signed, parameters=110, kernel_size=100, macs=800),
        OpRecord("backbone/stem", "conv", QuantSpec(2), QuantSpec(3), kernel_size=60, macs=1600),
        OpRecord("c", "dense", weight, None, kernel_size=8, macs=50),
        OpRecord("d", "scores", None, QuantSpec(8), QuantSpec(8), macs=400),
        OpRecord("d", "mix", None, QuantSpec(2), QuantSpec(2), macs=320),
        OpRecord("e", "dense", kernel_size=10, macs=7),
        OpRecord("f", "mix_samples", None, signed, signed, macs=10**6),
    ]
    found = as_papers_count(DetrConfig(dim=32), rows, numbers=300)
    assert found["bits"] == 4
    bits = 108 * 4 + 60 * 2 + (300 - 168) * 32
    assert found["size_mib"] == bits / 8 / 2**20
    assert found["flops"] == 800 + 1600 + 50 + 400 + 320 + 7
    assert found["real_flops"] == 57
    assert found["ops"] == 57 + 800 / 8 + 1600 / 16 + 400 / 4 + 320 / 32
    assert found["ops_if_stem_float"] == found["ops"] + 1500
    assert found["published"] is None


@pytest.mark.parametrize(
    ("policy", "bits"),
    [("float", 32), ("w8a8", 8), ("w4a4-attn8", 4), ("w3a3-attn8", 3), ("w2a2-attn8", 2)],
)
def test_beside_the_printed_values(policy, bits):
    papers = counted(f"coco:r50,{policy}")["papers"]
    size, ops = Q_DETR_R50[bits]
    assert papers["bits"] == bits
    assert papers["published"] == {"size_mb": size, "ops_g": ops}
    # Its network has a little more; everything in it counts as quantized.
    assert size - 0.6 < papers["size_if_all_mib"] < size
    assert papers["size_if_all_mib"] <= papers["size_mib"] < papers["size_if_all_mib"] + 2
    assert papers["ops_if_stem_float"] / 1e9 == pytest.approx(ops, rel=0.03)
    assert papers["ops"] / 1e9 < ops


def test_printed_sizes_are_multiples():
    """What the document says of them."""
    size = Q_DETR_R50[32][0]
    assert Q_DETR_R50[8][0] == pytest.approx(size / 4, abs=0.005)
    assert Q_DETR_R50[4][0] == pytest.approx(size / 8, abs=0.0051)
    for bits in (3, 2):
        assert 0 < Q_DETR_R50[bits][0] / size - bits / 32 < 0.001


# --- packed bytes --------------------------------------------------------------------------------

SMALL = dataclasses.replace(tiny.MODEL, num_classes=5)


@pytest.mark.parametrize("case", CASES)
def test_packed_parts_are_those_of_the_file(case, tmp_path):
    """Counted from the arrays that a packed model holds, each by what it is."""
    model = deployed(case)
    write_packed(tmp_path / "model", model)
    arrays, _ = read_archive(tmp_path / "model")
    expected = dict.fromkeys(PACKED_PARTS, 0)
    for name, array in arrays.items():
        if isinstance(array, Codes):
            expected["codes"] += packed_size(array.values.size, array.bits)
        elif name.endswith("/scale") and isinstance(arrays.get(name[:-5] + "kernel"), Codes):
            expected["scales"] += array.nbytes
        elif array.dtype == np.int32:
            expected["biases"] += array.nbytes
        elif name.endswith(("_step", "/shift", "/spread")):
            expected["grids"] += array.nbytes
        else:
            expected["floats"] += array.nbytes
    made = complexity_of_model(tmp_path / "model", (32, 32))
    assert made["packed_parts"] == expected
    assert made["packed_bytes"] == sum(expected.values())
    files = sum(file.stat().st_size for file in (tmp_path / "model").iterdir())
    assert f"{files:,} bytes" in format_complexity(made)


def test_parts_of_single_operations_by_hand():
    channel, grid = QuantSpec(3, granularity="channel"), QuantSpec(4)
    integer = OpRecord("a", "dense", channel, grid, parameters=38, kernel_size=35, channels=5)
    # 105 bits are 14 bytes.
    assert packed_parts(integer) == dict(codes=14, scales=20, biases=20, grids=4, floats=0)
    weights = dataclasses.replace(integer, activation=None)
    assert packed_parts(weights) == dict(codes=14, scales=20, biases=0, grids=0, floats=20)
    inputs = dataclasses.replace(integer, weight=None, centred=7)
    assert packed_parts(inputs) == dict(codes=0, scales=0, biases=0, grids=60, floats=160)
    heads = QuantSpec(4, signed=False, granularity="head", zero_point=True)
    core = OpRecord("c", "scores", activation=heads, other=grid, heads=8, macs=5)
    assert packed_parts(core) == dict(codes=0, scales=0, biases=0, grids=4 * (8 + 1), floats=0)
    norm = OpRecord("n", "norm", parameters=20, folds=True)
    assert sum(packed_parts(norm).values()) == 0


# --- what is deployed ----------------------------------------------------------------------------


def test_heads_of_the_last_layer_only():
    """DETR's heads take all layers at once, Deformable DETR's are called for each."""
    deformable = DeformableConfig(levels=2, norm_groups=4)
    for family in ("detr", "deformable"):
        config = dataclasses.replace(SMALL, family=family, deformable=deformable)
        module = build_detector(config)
        rows = record_ops(module, variables_of(module, (64, 64)), (64, 64))
        macs = [
            sum(row.macs for row in found if row.path == "class_head")
            for found in (rows, deployed_ops(rows, config))
        ]
        assert macs[1] == config.num_queries * config.dim * config.class_outputs
        assert macs[0] == config.decoder_layers * macs[1]


# --- configurations, models, the command ---------------------------------------------------------


def test_every_family_and_task():
    """No operation is outside the table, whatever the family and the task."""
    known = [name for name, _ in GROUPS]
    for name in ("shapes_w4a4", "shapes_teacher:deformable", "shapes_pretrain", "bccd"):
        made = counted(name, (128, 128))
        groups = {part["group"]: part for part in made["groups"]}
        assert list(groups) == [name for name in known if name in groups]
        numbers = sum(part["parameters"] for part in groups.values())
        assert 4 * numbers == made["float_bytes"]
        idle = made["parameters"]["state"] - numbers  # of the first two of three refined layers
        assert idle == (2 * (144 + 1) * 10 if name.endswith("deformable") else 0)


def test_model_folder_counts_as_its_configuration():
    made = complexity_of_model("packaged:shapes_teacher")
    config = counted("shapes_teacher", None)
    assert (made["height"], made["width"]) == (128, 128)
    for key in ("macs", "packed_parts", "groups", "operations"):
        assert made[key] == config[key]
    assert "trained" not in made["parameters"]


def test_command_writes_what_it_prints(tmp_path, capsys):
    file = tmp_path / "out.json"
    size = ("--height=96", "--width=64")
    words = ("--config=shapes_w4a4", "quant.policy=w3a3", *size, f"--json={file}", "--operations")
    assert main(["complexity", *words]) == 0
    said = capsys.readouterr().out
    made = json.loads(file.read_text())
    assert (made["height"], made["width"], made["policy"]) == (96, 64, "w3a3")
    assert f"{made['packed_bytes']:,}" in said
    assert f"{made['parameters']['learnable']:,} learnable" in said
    for row in made["operations"]:
        assert row["path"][:58] in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--config=coco:r50,w4a4", "--height=0", "--width=64"), "must be positive"),
        (("--config=coco:r50,w4a4", "--height=64"), "give both, or neither"),
        (("--config=coco:r50,w4a4", "--height=31", "--width=64"), "at least 32 pixels"),
        (("--config=coco_deformable:r50,w4a4", "--height=90", "--width=63"), "at least 64 pixels"),
        (("--config=coco:r50,w4a4", "model.widht=3"), "no key 'widht'"),
        (("--config=coco:r50,w4a4", "optimizer.lr=1"), "config.optimizer.lr has no effect"),
        (("--config=coco:r50,w4a4", "model.num_auxiliary=7"), "only in training"),
        (("--config=coco:r50,w9a9",), "unknown quantization policy"),
        (("--config=custom", "data.root=/nowhere"), "model.num_queries"),
        (("--config=nothing",), "nothing"),
        (("--model=packaged:shapes_teacher", "model.dim=8"), "counted as it was saved"),
        (("--model=nowhere",), "nowhere"),
    ],
)
def test_what_cannot_be_counted(words, said, capsys):
    assert main(["complexity", *words]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert said in lines[0]
