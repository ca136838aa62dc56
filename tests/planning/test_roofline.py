"""Times and schedules, against arithmetic done by hand."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqdetr_jax.planning.chips import KINDS
from aqdetr_jax.planning.roofline import evaluations_of, roofline, schedule, sent_bytes
from aqdetr_jax.planning.search import MOST, largest_batch
from aqdetr_jax.planning.traffic import Collective, Program

EMPTY = Program(0, 0, 0, {}, [], [], [])


def collective(kind: str, size: int, group: int = 4, times: int = 1) -> Collective:
    return Collective(kind, size, group, times, "", 1, "")


def test_bytes_that_a_chip_sends():
    """A ring of n sends each of n parts n - 1 times; an all-reduce goes round twice."""
    assert sent_bytes([collective("all-reduce", 400)], 4) == 2 * 300
    assert sent_bytes([collective("all-gather", 400, times=5)], 4) == 5 * 300
    assert sent_bytes([collective("reduce-scatter", 400, group=2)], 4) == 200
    assert sent_bytes([collective("collective-permute", 400)], 4) == 400
    assert sent_bytes([collective("all-reduce", 400, group=0)], 8) == 2 * 350
    assert sent_bytes([], 4) == 0


def test_the_longest_time_is_the_step_s():
    kind = KINDS["v5e"]
    program = dataclasses.replace(
        EMPTY, traffic=int(819e9), collectives=[collective("all-reduce", int(200e9))]
    )
    times = roofline(program, flops=98.5e12, kind=kind, devices=4)
    assert (times.arithmetic, times.memory) == (0.5, 1.0)
    assert times.interconnect == pytest.approx(1.5)
    assert (times.seconds, times.bound) == (times.interconnect, "interconnect")
    alone = roofline(dataclasses.replace(program, collectives=[]), 98.5e12, kind, 4)
    assert (alone.seconds, alone.bound) == (1.0, "memory")


def test_a_device_has_its_share_of_a_chip():
    kind = KINDS["tpu7x"]
    times = roofline(dataclasses.replace(EMPTY, traffic=int(7380e9)), 2307e12, kind, 8)
    assert (times.arithmetic, times.memory) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("steps", "every", "count"), [(100, 0, 1), (100, 40, 3), (100, 50, 2), (100, 200, 1)]
)
def test_evaluations(steps, every, count):
    assert evaluations_of(steps, every) == count


def test_schedule():
    """3 600 steps of 1 s and 3 s by turns; 2 evaluations of 5 000 images, 64 at a time."""
    found = schedule(
        steps=3600,
        eval_every=1800,
        train_seconds=[1.0, 3.0],
        eval_seconds=[0.5],
        eval_images=5000,
        eval_rows=64,
        chips=16,
    )
    assert found.training_hours == 2.0
    assert found.evaluation_hours == pytest.approx(2 * 79 * 0.5 / 3600)
    assert found.chip_hours == pytest.approx(16 * (2.0 + 79 / 3600))


@given(most=st.integers(0, 2 * MOST), base=st.integers(0, 50), bend=st.floats(0.8, 1.2))
def test_search_finds_the_largest_batch(most, base, bend):
    """For any program that grows with its batch, whatever curve it grows by."""
    asked: list[int] = []

    def needed(rows: int) -> int:
        asked.append(rows)
        return int(base + 1000 * rows**bend)

    limit = int(base + 1000 * most**bend) if most else base + 999
    assert largest_batch(needed, limit) == min(most, MOST)
    assert len(asked) == len(set(asked))


@given(most=st.integers(1, 1000))
def test_search_of_a_straight_line_asks_little(most):
    asked: list[int] = []

    def needed(rows: int) -> int:
        asked.append(rows)
        return 700 + 1000 * rows

    assert largest_batch(needed, 700 + 1000 * most + 500) == most
    assert len(asked) <= 5
