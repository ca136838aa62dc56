"""The bit report: totals by hand, published multiply-adds, and that nothing escapes it."""

import collections
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import traverse_util

from aqdetr_jax.models.config import DeformableConfig, DetrConfig
from aqdetr_jax.models.detector import build_detector
from aqdetr_jax.models.detr import Detr
from aqdetr_jax.models.quantized import QConv, QDense
from aqdetr_jax.models.resnet import BackboneConfig, ResNet, resnet_config
from aqdetr_jax.quant.calibrate import site_specs, weight_specs
from aqdetr_jax.quant.policy import Policy, stock_policy
from aqdetr_jax.quant.record import OpRecord, record, recording
from aqdetr_jax.quant.report import bit_report, format_bit_report

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = DetrConfig(
    BackboneConfig("bottleneck", (1, 2), (4, 8), (1, 2), (1, 1), stem_width=4, stem_pool=False),
    num_classes=3,
    num_queries=5,
    num_auxiliary=4,
    dim=16,
    heads=2,
    encoder_layers=2,
    decoder_layers=2,
    ffn=8,
)
PRODUCTS = ("conv", "dense", "scores", "mix")


def image(height, width, batch=1):
    return (
        jax.ShapeDtypeStruct((batch, height, width, 3), jnp.uint8),
        jax.ShapeDtypeStruct((batch, height, width), bool),
    )


@functools.cache
def recorded(policy, config=TINY, size=(16, 24), batch=1):
    """(rows, abstract variables) of one inference."""
    module = build_detector(config, policy)
    inputs = image(*size, batch)
    with recording() as rows:
        variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    if config.num_auxiliary:  # initialisation runs the auxiliary queries too, inference does not
        with recording() as rows:
            jax.eval_shape(module.apply, variables, *inputs)
    return rows, variables


class Toy(nn.Module):
    policy: Policy

    @nn.compact
    def __call__(self, x):
        x = QDense(5, self.policy, name="layer")(x)
        return QDense(2, self.policy, name="class_head")(x)


def test_totals_of_two_layers_by_hand():
    toy = Toy(stock_policy("w4a8"))
    with recording() as rows:
        jax.eval_shape(toy.init, jax.random.key(0), jnp.zeros((3, 7, 6)))
    report = bit_report(rows, batch=3)
    # layer: 30 weights at 4 bits, 5 biases, 5 scales and the input's step; class_head: 12 floats.
    assert report["packed_parts"] == {
        "codes": 15,
        "scales": 4 * 5,
        "biases": 4 * 5,
        "grids": 4,
        "floats": 4 * 12,
    }
    assert report["packed_bytes"] == 15 + 4 * 5 + 4 * 5 + 4 + 4 * 12
    assert report["float_bytes"] == 4 * (35 + 12)
    assert report["macs"] == 7 * (30 + 10)
    assert report["macs_by_bits"] == {"4x8": 0.75, "floatxfloat": 0.25}
    first, last = report["rows"]
    assert (first["path"], first["weight_bits"], first["activation_bits"]) == ("layer", 4, 8)
    assert first["attention_bits"] is None
    assert first["grids"] == "w:s4/channel a:s8"
    assert (last["weight_bits"], last["note"]) == ("float", "output heads stay float")
    text = format_bit_report(report)
    assert "class_head" in text
    assert "75.0%" in text


def test_centred_inputs_cost_two_floats_a_channel():
    sizes = {}
    for center in (False, True):
        toy = Toy(stock_policy("w4a4", grid="centred" if center else "symmetric"))
        with recording() as rows:
            jax.eval_shape(toy.init, jax.random.key(0), jnp.zeros((3, 7, 6)))
        report = bit_report(rows)
        sizes[center] = report["packed_bytes"]
        assert report["rows"][0]["grids"] == "w:s4/channel a:s4" + (" centred" if center else "")
        assert report["rows"][1]["grids"] == ""
    assert sizes[True] == sizes[False] + 2 * 4 * 6


def test_convolution_by_hand():
    conv = QConv(5, (3, 3), stock_policy("w2a3"), strides=2, use_bias=True, name=None)
    with recording() as rows:
        jax.eval_shape(conv.init, jax.random.key(0), jnp.zeros((2, 8, 6, 4)))
    report = bit_report(rows, batch=2)
    assert report["macs"] == 4 * 3 * 9 * 4 * 5
    assert report["packed_bytes"] == 9 * 4 * 5 * 2 // 8 + 4 * 5 + 4 * 5 + 4


def test_shared_operation_is_one_row():
    rows = [OpRecord("norm", "norm", parameters=8)] * 3
    rows += [OpRecord("core", "mix", macs=10), OpRecord("core", "mix", macs=6)]
    report = bit_report(rows)
    assert len(report["rows"]) == 2
    assert report["float_bytes"] == report["packed_bytes"] == 32
    assert report["macs"] == 16


def test_recording_nests_and_ends():
    with recording() as outer:
        with recording() as inner:
            record(OpRecord("x", "norm"))
        record(OpRecord("y", "norm"))
    record(OpRecord("z", "norm"))
    assert [r.path for r in inner] == ["x"]
    assert [r.path for r in outer] == ["y"]


@pytest.mark.parametrize("name", ["float", "w4a4", "w2a2-attn8"])
def test_every_product_of_the_model_is_in_the_report(name):
    rows, variables = recorded(stock_policy(name))
    module = Detr(TINY, stock_policy(name))
    jaxpr = jax.make_jaxpr(module.apply)(variables, *image(16, 24))
    counted = tiny.primitives(jaxpr.jaxpr)
    kinds = collections.Counter(row.kind for row in rows)
    assert counted["conv_general_dilated"] == kinds["conv"] == 1 + 4 + 7 + 1
    assert counted["dot_general"] == kinds["dense"] + kinds["scores"] + kinds["mix"]
    # encoder 2 x (4 + 2), decoder 2 x (8 + 2), heads 1 + 3; three attentions a layer pair
    assert kinds["dense"] == 12 + 20 + 4
    assert kinds["scores"] == kinds["mix"] == kinds["softmax"] == 2 + 4
    assert {"norm", "add", "position", "embedding"} <= set(kinds)


@pytest.mark.parametrize(
    "options",
    [{}, {"grid": "zero_point"}, {"grid": "offset"}, {"attention_granularity": "tensor"}],
)
def test_every_step_size_belongs_to_a_row_and_the_reverse(options):
    rows, variables = recorded(stock_policy("w4a4", **options))
    paths = set(traverse_util.flatten_dict(variables["params"], sep="/"))
    steps = {path for path in paths if path.endswith("_step")}
    assert steps == {f"{path}_step" for path in {**site_specs(rows), **weight_specs(rows)}}
    zeros = {path for path in paths if path.endswith("_zero")}
    wanted = {f"{path}_zero" for path, spec in site_specs(rows).items() if spec.zero_point}
    assert zeros == wanted
    assert bool(zeros) == (options.get("grid") == "zero_point")
    offsets = {path for path in paths if path.endswith("_offset")}
    assert offsets == {f"{path}_offset" for path, spec in site_specs(rows).items() if spec.offset}
    assert bool(offsets) == (options.get("grid") == "offset")


def test_bits_of_the_rows_follow_the_policy():
    rows, _ = recorded(stock_policy("w4a3-attn2"))
    table = {(row["path"], row["kind"]): row for row in bit_report(rows)["rows"]}
    for (path, kind), row in table.items():
        bits = (row["weight_bits"], row["activation_bits"], row["attention_bits"])
        if kind == "add":
            assert bits == (None, 8 if path.startswith("backbone") else "float", None)
        elif kind not in PRODUCTS:
            assert bits == (None, None, None)
        elif path.startswith(("class_head", "box_head")):
            assert bits == ("float", "float", None)
        elif path in ("backbone/stem", "input_proj"):
            assert bits == (8, 8, None)
        elif kind in ("scores", "mix"):
            assert bits == (None, None, 2)
        else:
            assert bits == (4, 3, None)
    grids = {path: row["grids"] for (path, _), row in table.items()}
    # Signed where values can be negative, unsigned after a ReLU and for probabilities.
    assert grids["backbone/stem"] == "w:s8/channel a:s8"
    # A block's input is unsigned, a convolution of it is not.
    assert grids["backbone/layer2_0/residual"] == "a:s8 b:s8"
    assert grids["backbone/layer2_1/residual"] == "a:s8 b:u8"
    assert grids["backbone/layer1_0/conv2"] == "w:s4/channel a:u3"
    assert grids["encoder/layer_0/feed_forward/linear1"] == "w:s4/channel a:s3"
    assert grids["encoder/layer_0/feed_forward/linear2"] == "w:s4/channel a:u3"
    assert table["encoder/layer_0/self_attention/core", "mix"]["grids"] == "a:u2/head b:s2/head"
    assert table["encoder/layer_0/self_attention/core", "scores"]["grids"] == "a:s2/head b:s2/head"


def test_multiply_adds_are_per_image():
    one = bit_report(recorded(stock_policy("w4a4"))[0])
    three = bit_report(recorded(stock_policy("w4a4"), batch=3)[0], batch=3)
    assert one["macs"] == three["macs"]
    assert one["packed_bytes"] == three["packed_bytes"]
    assert sum(one["macs_by_bits"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("backbone", "size", "total", "parts"),
    [
        (
            resnet_config("resnet50"),
            (800, 1066),
            81.17,
            {"backbone": 69.98, "input_proj": 0.45, "encoder": 8.90, "decoder": 1.83},
        ),
        (resnet_config("resnet50"), (800, 1333), 101.59, {}),
        (resnet_config("resnet101"), (800, 1066), 144.62, {}),
        (resnet_config("resnet50", dc5=True), (800, 1066), 173.17, {}),
    ],
)
def test_multiply_adds_of_detr(backbone, size, total, parts):
    rows, _ = recorded(Policy(), DetrConfig(backbone), size)
    report = bit_report(rows)
    groups = collections.Counter()
    for row in report["rows"]:
        groups[row["path"].split("/")[0]] += row["macs"] / 1e9
    for name, macs in parts.items():
        assert groups[name] == pytest.approx(macs, abs=0.006)
    # The table counts the heads once; the model runs them on all six decoder layers.
    heads = groups["class_head"] + groups["box_head"]
    assert report["macs"] / 1e9 - heads * 5 / 6 == pytest.approx(total, abs=0.011)
    assert report["macs"] / 1e9 == pytest.approx(total, rel=0.01)


DEFORMABLE = DetrConfig(
    family="deformable", num_queries=300, ffn=1024, deformable=DeformableConfig()
)


def test_multiply_adds_of_deformable_detr():
    """17 821 tokens; four multiply-adds a channel for a bilinear sample, as the papers count.

    They take the attention weight into the four; here it is a quantized product of its own.
    """
    rows, _ = recorded(Policy(), DEFORMABLE, (800, 1066))
    report = bit_report([row for row in rows if row.kind != "mix_samples"])
    more = bit_report(rows)["macs"] - report["macs"]
    assert more == 8 * 16 * 32 * 6 * (17821 + 300)
    groups = collections.Counter()
    for row in report["rows"]:
        groups[row["path"].split("/")[0]] += row["macs"] / 1e9
    assert groups["encoder"] == pytest.approx(82.34, abs=0.01)
    assert groups["decoder"] == pytest.approx(9.02, abs=0.01)
    heads = groups["class_head"] + groups["box_head"]
    assert report["macs"] / 1e9 - heads * 5 / 6 == pytest.approx(165.51, abs=0.05)


def test_deformable_sites_belong_to_rows_and_the_reverse():
    rows, variables = recorded(stock_policy("w4a4"), DEFORMABLE, (128, 160))
    paths = set(traverse_util.flatten_dict(variables["params"], sep="/"))
    steps = {path for path in paths if path.endswith("_step")}
    assert steps == {f"{path}_step" for path in {**site_specs(rows), **weight_specs(rows)}}
    table = {(row["path"], row["kind"]): row for row in bit_report(rows)["rows"]}
    core = "decoder/layer_0/cross_attention/core"
    assert table[core, "mix_samples"]["attention_bits"] == 4
    assert table[core, "mix_samples"]["grids"] == "a:u4/head b:s4/head"
    assert table[core, "sampling"]["activation_bits"] == "float"
    assert table["reference_points", "dense"]["weight_bits"] == "float"
    assert table["reference_points", "dense"]["note"] == "coordinates stay float"
    for level in range(4):
        assert table[f"input_proj_{level}", "conv"]["weight_bits"] == 8


def test_only_levels_made_of_the_backbone_are_unsigned():
    """The first level beyond the backbone is made of its last ReLU, the others of a group norm."""
    config = dataclasses.replace(DEFORMABLE, deformable=DeformableConfig(levels=5))
    rows, _ = recorded(stock_policy("w4a4"), config, (128, 160))
    table = {row["path"]: row["grids"] for row in bit_report(rows)["rows"]}
    found = [table[f"input_proj_{level}"] for level in range(5)]
    assert found == ["w:s8/channel a:u8"] * 4 + ["w:s8/channel a:s8"]


def test_rows_of_the_proposals():
    deformable = DeformableConfig(box_refine=True, two_stage=True)
    config = dataclasses.replace(DEFORMABLE, num_queries=50, deformable=deformable)
    rows, _ = recorded(stock_policy("w3a2"), config, (128, 160))
    table = {row["path"]: row for row in bit_report(rows)["rows"]}
    for path in ("proposal_proj", "query_proj"):
        assert (table[path]["weight_bits"], table[path]["activation_bits"]) == (3, 2)
    # Scores and boxes of the proposals are the last pair of heads, at every token.
    tokens = sum(h * w for h, w in ((16, 20), (8, 10), (4, 5), (2, 3)))
    for path, macs in (("class_head_6", 256 * 91), ("box_head_6/layer_2", 256 * 4)):
        assert table[path]["weight_bits"] == table[path]["activation_bits"] == "float"
        assert table[path]["macs"] == tokens * macs
    assert "reference_points" not in table


def test_multiply_adds_of_the_backbone():
    module = ResNet(resnet_config("resnet50"))
    with recording() as rows:
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert bit_report(rows)["macs"] / 1e9 == pytest.approx(4.087, abs=0.001)


def test_size_of_detr():
    rows, _ = recorded(Policy(), DetrConfig(), (800, 1066))
    # All numbers of the state dict: four vectors a batch norm, query embedding included.
    assert bit_report(rows)["float_bytes"] == 4 * 41_631_008
    rows, _ = recorded(stock_policy("w4a4"), DetrConfig(), (800, 1066))
    packed = bit_report(rows)["packed_bytes"] / 2**20
    assert 19.8 < packed < 23  # 19.8 MiB if everything had 4 bits
