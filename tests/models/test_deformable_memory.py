"""Deformable DETR on less memory: recomputing layers and samples, bfloat16 products."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util
from tiny_models import DEFORMABLE, PLAIN, batch, model, variables_of

from aqdetr_jax.models.deformable_attention import DeformableAttention
from aqdetr_jax.models.detector import build_detector
from aqdetr_jax.models.dropout import drawing, row_keys
from aqdetr_jax.models.quantized import OBSERVED
from aqdetr_jax.quant.policy import stock_policy
from aqdetr_jax.quant.record import recording

pytestmark = pytest.mark.usefixtures("quick_compile")


KINDS = (False, True, "samples")


def test_recomputing_changes_neither_outputs_nor_gradients():
    """With dropout, auxiliary queries, and quantizers, whose steps have gradients too."""
    variables, given = variables_of("two_stage", "w4a4"), batch()
    found = []
    for kind in KINDS:
        config = dataclasses.replace(DEFORMABLE["two_stage"], decoder_layers=1, remat=kind)
        module = build_detector(config, stock_policy("w4a4"))

        def loss(params, module=module):
            with drawing(row_keys(jax.random.key(1), len(given[0]))):
                out = module.apply(
                    {**variables, "params": params}, *given, train=True, auxiliary=True
                )
            seen = (out.logits, out.boxes, out.auxiliary_boxes, out.proposal_logits)
            seen += (out.encoder_attention[0].locations, out.encoder_attention[0].scores)
            return sum(jnp.mean(jnp.square(x)) for x in seen)

        found.append(jax.jit(jax.value_and_grad(loss))(variables["params"]))
    value, gradient = found[0][0], tiny.flat({"params": found[0][1]})
    for again, recomputed in found[1:]:
        np.testing.assert_allclose(again, value, rtol=1e-6)
        recomputed = tiny.flat({"params": recomputed})
        for path, wanted in gradient.items():
            atol = 1e-5 * np.abs(wanted).max() + 1e-7
            np.testing.assert_allclose(recomputed[path], wanted, rtol=0, atol=atol, err_msg=path)
    assert np.all(gradient["encoder/layer_0/self_attention/core/samples_step"] != 0)
    assert np.all(gradient["encoder/layer_0/self_attention/core/probs_step"] != 0)


def test_recomputing_is_recorded_and_calibrated_alike():
    variables, given = variables_of("plain", "w4a4"), batch()
    rows, samples = [], []
    for kind in KINDS:
        config = dataclasses.replace(PLAIN, remat=kind)
        module = build_detector(config, stock_policy("w4a4"))
        with recording() as found:
            jax.eval_shape(lambda v, m=module: m.apply(v, *given), variables)
        rows.append(found)
        observer = build_detector(config, stock_policy("w4a4", arithmetic="observe"))
        _, seen = jax.jit(lambda v, m=observer: m.apply(v, *given, mutable=[OBSERVED]))(variables)
        samples.append(traverse_util.flatten_dict(seen[OBSERVED], sep="/"))
    assert rows[0] == rows[1] == rows[2]
    for again in samples[1:]:
        assert again.keys() == samples[0].keys()
        for path, wanted in samples[0].items():
            np.testing.assert_allclose(again[path], wanted, atol=1e-5, err_msg=path)


def test_sampling_again_keeps_no_samples():
    """What is kept for the backward pass: not the samples, nor the neighbours they are made of."""
    shapes, queries = ((16, 16), (8, 8)), 320
    arrays = [
        jax.ShapeDtypeStruct(shape, np.float32) for shape in ((1, queries, 32), (1, queries, 2, 2))
    ]
    valid = np.ones((1, queries), bool)
    samples = 4 * queries * 32 * 2 * 4  # bytes: queries x channels x levels x points
    kept = {}
    for method, remat in (("gather", False), ("gather", True), ("auto", True)):
        layer = DeformableAttention(32, 2, 2, 4, stock_policy("w4a4"), method, remat)

        def apply(x, reference, m=layer):
            return m.init_with_output(jax.random.key(0), x, reference, x, valid, shapes)[0][0]

        pullback = jax.eval_shape(lambda *x, f=apply: jax.vjp(f, *x)[1], *arrays)
        sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback)]
        kept[method, remat] = sum(sizes)
        assert (max(sizes) >= samples) != remat
    assert kept["gather", False] > 5 * samples
    assert max(kept["gather", True], kept["auto", True]) < samples


def test_sampling_is_repeated_once():
    """Recomputed layers reuse what their samples made, instead of sampling a third time."""
    variables, given = variables_of("plain", "w4a4"), batch()
    gathers = []
    for kind in KINDS:
        config = dataclasses.replace(PLAIN, remat=kind)
        config = dataclasses.replace(
            config, deformable=dataclasses.replace(config.deformable, sampling="gather")
        )
        module = build_detector(config, stock_policy("w4a4"))

        def loss(params, module=module):
            return jnp.mean(module.apply({**variables, "params": params}, *given).logits)

        counted = tiny.primitives(jax.make_jaxpr(jax.grad(loss))(variables["params"]).jaxpr)
        gathers.append(counted["gather"])
        assert counted["scatter-add"] == gathers[0]
    # Four neighbours on three levels, in one layer of the encoder and two of the decoder.
    assert gathers == [36, 72, 72]


def test_only_deformable_models_have_samples():
    with pytest.raises(ValueError, match="remat='samples' is of deformable attention"):
        dataclasses.replace(tiny.MODEL, remat="samples")


def test_bfloat16_carries_features_and_no_coordinates():
    variables, given = variables_of("plain"), batch()
    want = model("plain")(variables, *given)
    module = build_detector(dataclasses.replace(PLAIN, dtype="bfloat16"))
    found = jax.jit(module.apply)(variables, *given)
    for x in (found.boxes, found.logits, found.decoder_cross_attention[1].locations):
        assert x.dtype == jnp.float32
    distance = np.abs(found.boxes - want.boxes)
    assert 1e-6 < distance.max() < 0.03
    # What no feature enters is not rounded: learned reference points, and the offsets' bias.
    still = jax.tree.map(np.copy, variables)
    still["params"]["decoder"]["layer_0"]["cross_attention"]["sampling_offsets"]["kernel"][:] = 0
    first, second = (
        f(still, *given).decoder_cross_attention[0].locations
        for f in (model("plain"), jax.jit(module.apply))
    )
    np.testing.assert_allclose(second, first, atol=1e-6)
