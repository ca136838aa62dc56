"""The choice of bits under a budget: brute force, hand-computed damages, what budgets say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqdetr_jax.deploy import ranking
from aqdetr_jax.deploy.mixed import Budget, choose, damages, parse_budget, smallest_within


@st.composite
def tables(draw):
    bits = draw(st.sets(st.sampled_from([2, 3, 4, 8]), min_size=1))
    noise = st.one_of(st.just(0.0), st.floats(1e-6, 1.0))
    return [
        {b: (b * weights, draw(noise)) for b in bits}
        for weights in draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    ]


@given(tables(), st.integers(0, 900))
def test_the_choice_is_that_of_brute_force(options, capacity):
    def total(bits, part):
        return sum(option[b][part] for option, b in zip(options, bits, strict=True))

    fitting = [bits for bits in itertools.product(*options) if total(bits, 0) <= capacity]
    found = choose(options, capacity)
    if not fitting:
        assert found is None
        return
    assert total(found, 0) <= capacity
    assert total(found, 1) == pytest.approx(min(total(bits, 1) for bits in fitting), abs=1e-12)


def test_equal_noise_takes_the_fewest_bits():
    assert choose([{8: (8, 0.0), 4: (4, 0.0), 2: (2, 0.1)}], 100) == [4]


def test_a_capacity_too_fine_for_the_table_is_kept():
    sizes = {1_000_003: 3.0, 999_983: 5.0, 7: 3.0}
    options = [{8: (8 * size, 1.0), 4: (4 * size, noise)} for size, noise in sizes.items()]
    found = choose(options, 12 * 1_000_003 + 100)
    assert found == [4, 8, 8]  # 4_000_012 + 7_999_864 + 56
    assert choose(options, 4 * (1_000_003 + 999_983 + 7)) == [4, 4, 4]
    assert choose(options, 4 * (1_000_003 + 999_983 + 7) - 1) is None


@given(st.integers(0, 60))
def test_the_smallest_choice_within_a_loss(allowed):
    """The loss is a falling function of the size, so that the threshold is known."""
    options = [{8: (80, 0.1), 4: (40, 1.0), 2: (20, 4.0)}, {8: (8, 0.1), 4: (4, 2.0), 2: (2, 9.0)}]

    def size(bits):
        return sum(option[b][0] for option, b in zip(options, bits, strict=True))

    def lost(bits):
        return 88.0 - size(bits)

    found = smallest_within(options, lost, float(allowed))
    assert lost(found) <= allowed
    frontier = [choose(options, capacity) for capacity in range(22, 89)]
    assert size(found) == min(size(bits) for bits in frontier if lost(bits) <= allowed)


def test_damages():
    rows = {
        8: {"AP": 0.51, "noise": 0.0},
        4: {"AP": 0.45, "noise": 0.2},
        3: {"AP": 0.47, "noise": 0.3},
        2: {"AP": 0.30, "noise": 0.9},
    }
    policy, bits = rows[4], (8, 4, 3, 2)
    found = damages(rows, policy, 4, "noise")
    np.testing.assert_allclose([found[b] for b in bits], [-0.2, 0, 0.1, 0.7], atol=1e-12)
    found = damages(rows, policy, 4, "AP")
    np.testing.assert_allclose([found[b] for b in bits], [-0.06, 0, 0, 0.15], atol=1e-6)
    assert found[3] > found[4]  # by noise, where AP says that fewer bits gain
    # A group of several bits is at none of them: only their order is taken to hold.
    found = damages(rows, {"AP": 0.46, "noise": 0.2}, None, "AP")
    np.testing.assert_allclose([found[b] for b in bits], [-0.05, 0.01, 0.01, 0.16], atol=1e-6)


def test_a_loss_that_cannot_be_kept():
    with pytest.raises(ValueError, match=r"at its most bits 0\.3000 is lost already"):
        smallest_within([{8: (8, 0.1), 4: (4, 1.0)}], lambda bits: 0.3, 0.2)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("921600", Budget("bytes", 921600)),
        ("900KiB", Budget("bytes", 921600)),
        ("1.5 MB", Budget("bytes", 1500000)),
        ("0.02AP", Budget("AP", 0.02)),
    ],
)
def test_budgets(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "AP", "2AP", "0AP", "-5", "5 GB", "1e6", "0", "0.02"[:1]])
def test_what_is_no_budget(text):
    with pytest.raises(ValueError, match=r"write bytes \(921600, 900KiB, 1\.5MB\) or an AP"):
        parse_budget(text)


def test_ranking_and_agreement():
    rows = [
        {"kind": "alone", "group": name, "bits": 4, "AP": ap, "noise": noise}
        for name, ap, noise in (("a", 0.5, 0.1), ("b", 0.3, 0.3), ("c", 0.4, 0.2))
    ]
    found = ranking.ranking(["a", "b", "c"], rows, 4, 0.5)
    assert found["by_ap_loss"] == found["by_snr"] == ["b", "c", "a"]
    assert found["agreement"] == pytest.approx(1)
    rows[0]["AP"], rows[1]["AP"] = 0.3, 0.5
    assert ranking.ranking(["a", "b", "c"], rows, 4, 0.5)["agreement"] == pytest.approx(-1)
    assert ranking.ranking(["a"], rows, 4, 0.5)["agreement"] is None
