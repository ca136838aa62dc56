"""Trained and deployed networks, quantizer by quantizer."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from test_network import bundle, tiny_models

from aqdetr_jax.deploy.compare import Comparison, NetworkComparer, model_codes
from aqdetr_jax.deploy.freeze import freeze
from aqdetr_jax.deploy.jax_operations import aligned

pytestmark = pytest.mark.usefixtures("quick_compile")

CASES = {
    "detr-w4a4": ("detr", "w4a4", {}),
    "detr-w8a8": ("detr", "w8a8", {}),
    "detr-w2a2": ("detr", "w2a2", {"grid": "centred", "renormalize": True}),
    "detr-attn8": ("detr", "w4a4-attn8", {"attention_granularity": "tensor"}),
    "detr-qdetr": ("detr", "w4a4", {"grid": "offset", "align_queries": True}),
    "plain-w3a3": ("plain", "w3a3", {"grid": "zero_point", "renormalize": True}),
    "two_stage-w4a4": ("two_stage", "w4a4", {"grid": "centred", "align_queries": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_codes_of_training_and_of_deployment(case):
    name, policy, options = CASES[case]
    model = bundle(name, policy, **options)
    network = freeze(model)
    images, mask = tiny_models.batch()
    logits, boxes, codes = model_codes(model)(model.variables, images, mask)
    comparer, comparison = NetworkComparer(network), Comparison()
    # Every quantizer of the trained model is in the deployed network, and no other.
    assert comparer.sites(images, mask) == codes.keys()
    comparer.add(comparison, images, mask, codes, (logits, boxes))
    spread = [len(np.unique(code)) for code in codes.values()]
    assert np.median(spread) > 2  # (dead codes would be equal whatever happens)
    different = {k: v for k, v in comparison.sites.items() if v.different}
    assert comparison.different <= 2e-4 * comparison.codes, different
    assert all(site.largest <= 1 for site in different.values()), different
    # Integer sums on their way to the next grid: not one.
    assert not any(site.startswith("backbone/layer") for site in different), different
    assert comparison.logits < 1e-3
    assert comparison.boxes < 1e-4


def test_a_wrong_code_is_counted_where_it_arises():
    model = bundle("detr", "w4a4")
    network = freeze(model)
    images, mask = tiny_models.batch()
    logits, boxes, codes = model_codes(model)(model.variables, images, mask)
    site = "encoder/layer_0/feed_forward/linear1/input"
    wrong = {**codes, site: codes[site].at[0, 0, :3].add(2)}
    comparer, comparison = NetworkComparer(network), Comparison()
    comparer.add(comparison, images, mask, wrong, (logits, boxes))
    assert comparison.sites[site].different >= 3
    assert comparison.sites[site].largest >= 2
    # Three inputs of a token's hidden units have moved, and only they see it.
    others = {k for k, v in comparison.sites.items() if v.different} - {site}
    assert others <= {"encoder/layer_0/feed_forward/linear2/input"}
    # A score that is no number is not forgotten.
    for scores in (logits.at[0, 0, 0].set(np.nan), logits):
        comparer.add(comparison, images, mask, codes, (scores, boxes))
        assert np.isnan(comparison.logits)
    assert comparison.boxes < 1e-4


def test_layouts():
    maps = jnp.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)  # [B, H, S, D]
    rows = maps.transpose(0, 2, 1, 3).reshape(2, 4, 18)
    np.testing.assert_array_equal(aligned(maps, rows.shape), rows)
    np.testing.assert_array_equal(aligned(rows, maps.shape), maps)
    np.testing.assert_array_equal(aligned(jnp.stack([maps * 0, maps]), maps.shape), maps)
    np.testing.assert_array_equal(aligned(maps, (2, 3, 24)), maps.reshape(2, 3, 24))
