"""What a source says of its model is checked before it is used, whatever it is."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqdetr_jax.interop import labels, preprocessing, variant

SEEN = {
    "block": "bottleneck",
    "depths": (3, 4, 6, 3),
    "widths": (64, 128, 256, 512),
    "stem_width": 64,
    "stem_kernel": 7,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "ffn": 1024,
    "pre_norm": False,
    "classes": 91,
    "levels": 4,
    "dim": 256,
    "stages": 3,
    "samples": 32,
    "box_refine": True,
    "two_stage": True,
}
"""What the parameters of the official two-stage model show."""

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.integers()
    | st.floats()
    | st.sampled_from(
        [1, 6, 8, 16, 32, 256, 300, 1024, "resnet50", "relu", "sine", "deformable_detr"]
    )
    | st.text(max_size=200),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
"""Values of JSON."""

PLAIN = st.integers(1, 8) | st.sampled_from([True, False])


any_of = settings(max_examples=300, derandomize=True)
"""No test depends on the time that the machine takes, nor on the day."""


@contextlib.contextmanager
def one_line():
    """An error is a ValueError of one line that names the source."""
    message = None
    try:
        yield
    except ValueError as error:
        message = str(error)
    if message is not None:
        assert message.startswith("source: ")
        assert "\n" not in message
        assert len(message) < 500


CONFIG_KEYS = [
    *(key for _, key in variant.CONFIG_JSON),
    *(key for key, _ in variant.ONLY_CONFIG_JSON),
    *("backbone", "num_queries", "two_stage_num_proposals", "backbone_config"),
]
ARGUMENT_KEYS = [
    *(key for _, key in variant.ARGS),
    *(key for key, _ in variant.ONLY_ARGS),
    *("backbone", "position_embedding"),
]
BACKBONE_KEYS = [*(key for key, _ in variant.ONLY_BACKBONE), "depths", "output_stride"]


def check(declared, where):
    with one_line():
        facts = variant.declared_facts(declared, where, "deformable", "source")
        facts, _ = variant.agreed_facts(SEEN, facts, where, "deformable", None, "source")
        for fact, value in facts.items():
            if fact in variant.FLAGS:
                assert type(value) is bool
            elif fact not in ("block", "depths", "widths"):
                assert type(value) is int
                assert 1 <= value <= variant.MAX_DECLARED
        assert facts["heads"] * facts["points"] == 32


@any_of
@given(st.dictionaries(st.sampled_from(CONFIG_KEYS), VALUES | PLAIN, max_size=5), st.data())
def test_any_config_json(declared, data):
    if data.draw(st.booleans()):
        odd = st.dictionaries(st.sampled_from(BACKBONE_KEYS), VALUES, max_size=3)
        declared["backbone_config"] = data.draw(odd)
    check({"model_type": "deformable_detr", **declared}, "config.json")


@any_of
@given(st.dictionaries(st.sampled_from(ARGUMENT_KEYS), VALUES | PLAIN, max_size=5))
def test_any_arguments(declared):
    check(declared, "args")


@pytest.mark.parametrize("value", [np.ones(3), np.ones(()), b"x", {1}, object()])
def test_arguments_that_are_no_plain_values(value):
    for key in ARGUMENT_KEYS:
        with one_line():
            variant.declared_facts({key: value}, "args", "deformable", "source")


@any_of
@given(VALUES | st.dictionaries(st.sampled_from(["0", "1", "2", "01", "-1"]), VALUES))
def test_any_names_of_classes(value):
    with one_line():
        found = labels.class_names({"id2label": value}, 2, "source")
        assert found is None or (len(found) == 2 and all(name.isprintable() for name in found))


RULE_KEYS = (
    *("do_resize", "do_rescale", "do_normalize", "resample", "rescale_factor", "size"),
    *("max_size", "image_mean", "image_std"),
)
SIZES = st.fixed_dictionaries({"shortest_edge": VALUES | PLAIN, "longest_edge": VALUES | PLAIN})


@any_of
@given(st.dictionaries(st.sampled_from(RULE_KEYS), VALUES | SIZES | PLAIN, max_size=4))
def test_any_rule_of_images(declared):
    with one_line():
        rule = preprocessing.image_rule(declared, "source")
        if declared.get("do_resize") is False:
            assert (rule.short_side, rule.long_side) == (None, None)
        else:
            assert 1 <= rule.short_side <= rule.long_side <= preprocessing.MAX_SIDE
        assert rule.mean is None or np.isfinite(rule.mean).all()
        assert rule.std is None or min(rule.std) > 0


def test_rules_of_images_that_transformers_writes():
    official = {
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "format": "coco_detection",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": 1333, "shortest_edge": 800},
    }
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert preprocessing.image_rule(official, "source") == (800, 1333, mean, std)
    old = {"size": 600, "max_size": 1000, "image_mean": [0.5, 0.5, 1]}
    assert preprocessing.image_rule(old, "source") == (600, 1000, (0.5, 0.5, 1.0), None)
    assert preprocessing.image_rule({}, "source") == (800, 1333, None, None)
    as_they_are = {"do_resize": False, "size": {"shortest_edge": 800}}
    assert preprocessing.image_rule(as_they_are, "source") == (None, None, None, None)


SHAPES = {
    "backbone/stem/kernel": (7, 7, 3, 64),
    **{
        f"backbone/layer{s}_{b}/conv1/kernel": (1, 1, 64, 64 << s) for s in (1, 2) for b in range(2)
    },
    **{
        f"{part}/layer_{n}/feed_forward/linear1/kernel": (256, 1024)
        for part in ("encoder", "decoder")
        for n in range(2)
    },
    "encoder/layer_0/self_attention/attention_weights/kernel": (256, 128),
    **{f"input_proj_{n}/kernel": (1, 1, 512, 256) for n in range(4)},
    "level_embed": (4, 256),
    "query_embed": (300, 512),
    "class_head/kernel": (256, 91),
}


@any_of
@given(
    st.sampled_from(list(SHAPES)),
    st.lists(st.integers(0, 5) | st.integers(0, 10**9), max_size=5).map(tuple) | st.none(),
    st.sampled_from(["", "1", "7", "999999999"]),
)
def test_any_shapes(path, shape, number):
    """A shape changed or lost, a number in a path changed: no model grows beyond its names."""
    shapes = dict(SHAPES)
    old = shapes.pop(path)
    head, _, tail = path.partition("_")
    if number and tail[:1].isdigit():
        shapes[f"{head}_{number}{tail[1:]}"] = old
    elif shape is not None:
        shapes[path] = shape
    with one_line():
        facts = variant.seen_facts(shapes, "deformable", "source")
        assert len(facts["depths"]) + sum(facts["depths"]) <= 2 * len(shapes)
        assert facts["encoder_layers"] + facts["decoder_layers"] + facts["levels"] <= len(shapes)
