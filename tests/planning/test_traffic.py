"""What a program moves, against sums worked out by hand."""

from __future__ import annotations

from pathlib import Path

from aqdetr_jax.planning.traffic import read_program

LOOP = (Path(__file__).parents[1] / "fixtures" / "loop.hlo.txt").read_text()
"""A small program as XLA prints them, written by hand: two loops, what starts and ends apart."""

PADDED = 8 * 128 * 4
"""f32[3,100] in tiles of 8 x 128."""

SCALAR = 4


def read(text: str):
    return read_program(text.splitlines(keepends=True))


def test_instructions_are_those_of_entry_and_loop_bodies():
    program = read(LOOP)
    assert program.entry_instructions == 18
    assert program.instructions == 18 + 8 + 4


def test_loops_run_as_often_as_their_condition_says():
    counted, searched = read(LOOP).loops
    assert (counted.name, counted.trips, counted.depth) == ("while.1", 5, 0)
    assert counted.op_name == "jit(step)/while"
    assert (searched.name, searched.trips) == ("while.2", None)


def test_a_note_of_the_compiler_goes_before_the_condition():
    noted = 'body=%body.1, backend_config={"known_trip_count":{"n":"7"}}'
    program = read(LOOP.replace("body=%body.1", noted))
    assert program.loops[0].trips == 7


def test_a_counter_that_does_not_meet_a_constant_is_unknown():
    program = read(LOOP.replace("direction=LT", "direction=NE"))
    assert program.loops[0].trips is None


def test_hbm_traffic():
    """Every instruction that moves something, in the order of the text.

    In the loop, five times: the counter (4 bytes in HBM twice; its sum is in another memory), the
    fusion (a padded array in and out), the all-reduce (its operand; the result is on the chip).
    Outside: the asynchronous slice what it fetches, the copy its end in HBM, the conversion its
    result, the gather both its sides and its operand again, the update twice what it inserts (which
    is on the chip and so nothing).
    """
    loop = 5 * (2 * SCALAR + 2 * PADDED + PADDED)
    fetched = 16 * 256 * 4
    copied = 64 * 256 * 4
    half = 64 * 256 * 2
    gathered = half + (half + 4 * half)
    program = read(LOOP)
    assert program.traffic == loop + fetched + copied + half + gathered
    assert program.by_opcode == {
        "fusion": 5 * 2 * PADDED,
        "all-gather-start": gathered,
        "copy-start": copied,
        "convert": half,
        "all-reduce": 5 * PADDED,
        "async-start": fetched,
        "add": 5 * 2 * SCALAR,
    }
    assert program.largest[0].opcode == "all-gather-start"
    assert sum(found.bytes for found in program.largest) == program.traffic


def test_collectives():
    program = read(LOOP)
    by_kind = {found.kind: found for found in program.collectives}
    inside, outside = by_kind["all-reduce"], by_kind["all-gather"]
    assert (inside.bytes, inside.group, inside.times) == (3 * 100 * 4, 2, 5)
    assert (inside.loop, inside.op_name) == ("while.1", "jit(step)/while/body/reduce_sum")
    assert (outside.bytes, outside.group, outside.times) == (256 * 256 * 2, 4, 1)
    assert (outside.loop, outside.arrays) == ("", 1)
    assert (program.collectives_in_loops, program.all_reduces_in_loops) == (1, 1)


def test_a_collective_inside_an_asynchronous_computation_is_found():
    text = LOOP.replace(
        "ROOT %part = f32[16,256]{1,0:T(8,128)S(1)} slice(%a), slice={[0:16], [0:256]}",
        "ROOT %part = f32[16,256]{1,0:T(8,128)S(1)} reduce-scatter(%a), dimensions={0}, "
        "replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}, to_apply=%plus",
    )
    found = next(c for c in read(text).collectives if c.kind == "reduce-scatter")
    assert (found.bytes, found.group, found.loop) == (64 * 256 * 4, 8, "")


def test_a_nested_loop_multiplies():
    inner = LOOP.replace(
        "  %sum = f32",
        "  %while.3 = (s32[]{:T(128)}, f32[3,100]{1,0:T(8,128)}) while(%p), "
        "condition=%condition.1, body=%inner\n  %sum = f32",
    ).replace(
        "%condition.1 (q",
        """%inner (p3: (s32[], f32[3,100])) -> (s32[], f32[3,100]) {
  %p3 = (s32[]{:T(128)}, f32[3,100]{1,0:T(8,128)}) parameter(0)
  %y = f32[3,100]{1,0:T(8,128)} get-tuple-element(%p3), index=1
  ROOT %negated = f32[3,100]{1,0:T(8,128)} negate(%y)
}

%condition.1 (q""",
        1,
    )
    program = read(inner)
    assert program.by_opcode["negate"] == 25 * 2 * PADDED
    assert [loop.depth for loop in program.loops if loop.name == "while.3"] == [1]


def test_branches_of_a_conditional_count():
    text = LOOP.replace(
        "  %half = bf16",
        "  %chosen = f32[3,100]{1,0:T(8,128)} conditional(%zero, %small, %small), "
        "branch_computations={%first, %second}\n  %half = bf16",
    ).replace(
        "ENTRY ",
        """%first (p4: f32[3,100]) -> f32[3,100] {
  %p4 = f32[3,100]{1,0:T(8,128)} parameter(0)
  ROOT %n4 = f32[3,100]{1,0:T(8,128)} negate(%p4)
}

%second (p5: f32[3,100]) -> f32[3,100] {
  %p5 = f32[3,100]{1,0:T(8,128)} parameter(0)
  ROOT %n5 = f32[3,100]{1,0:T(8,128)} negate(%p5)
}

ENTRY """,
    )
    assert read(text).by_opcode["negate"] == 2 * 2 * PADDED
