"""HBM by part, against a buffer assignment written by hand."""

from __future__ import annotations

import pytest

from aqdetr_jax.planning.memory import Memory, argument_names, part_of, read_memory

GIVEN = r"""HloModule jit_step

%region (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0), metadata={op_name="state.ema"}
  ROOT %s = f32[] add(%a, %a)
}

ENTRY %main.1 (x: f32[2], y: f32[2]) -> f32[2] {
  %p2 = u8[2,4]{1,0} parameter(2), sharding={replicated}, metadata={op_name="batch[\'images\']"}
  %p0 = f32[2]{0} parameter(0), metadata={op_name="state.params[\'backbone\'][\'kernel\']"}
  %p1 = f32[2]{0} parameter(1), metadata={op_name="state.opt_state[1].mu[\'kernel\']"}
  %p3 = f32[2]{0} parameter(3), metadata={op_name="teacher_variables[\'params\'][\'kernel\']"}
  %p4 = f32[2]{0} parameter(4), metadata={op_name="state.ema[\'params\'][\'kernel\']"}
  %p5 = s32[] parameter(5), metadata={op_name="state.step"}
  ROOT %o = f32[2]{0} add(%p0, %p1)
}
"""

ASSIGNED = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <26 r @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 4096, parameter 0, shape |u8[2,4]| at ShapeIndex {2}:
allocation 2: size 100, parameter 0, shape |f32[2]| at ShapeIndex {0}, maybe-live-out:
 value: <1 param.75{0} @0> (size=100,offset=0): f32[2]{0:T(128)}
allocation 3: size 200, parameter 0, shape |f32[2]| at ShapeIndex {1}, maybe-live-out:
allocation 4: size 300, parameter 0, shape |f32[2]| at ShapeIndex {3}:
allocation 5: size 400, parameter 0, shape |f32[2]| at ShapeIndex {4}:
allocation 6: size 8, parameter 0, shape |s32[]| at ShapeIndex {5}:
allocation 7: size 50, output shape is |(f32[2], s32[])|, maybe-live-out:
allocation 8: size 60, maybe-live-out:
allocation 9: size 70, constant:
allocation 10: size 1000000, preallocated-temp:
allocation 11: size 240, color 2, preallocated-temp:
allocation 12: size 117440512, color 1, preallocated-temp:
"""


def test_parts():
    names = argument_names(GIVEN.splitlines(keepends=True))
    assert names[0] == "state.params['backbone']['kernel']"
    assert sorted(names) == [0, 1, 2, 3, 4, 5]
    found = read_memory(ASSIGNED.splitlines(keepends=True), names, code=5000)
    assert found == Memory(
        parameters=100,
        optimizer=200,
        average=400,
        teacher=300,
        batch=4096,
        temporaries=1_000_000,
        outputs=50 + 60,
        other=8 + 70,
        code=5000,
    )
    assert found.total == 100 + 200 + 400 + 300 + 4096 + 1_000_000 + 110 + 78 + 5000


def test_arguments_that_are_no_tuple():
    """Programs with few arguments take them one by one."""
    text = "allocation 1: size 40, parameter 3, shape |f32[2]| at ShapeIndex {}:\n"
    assert read_memory([text], {3: "images"}).batch == 40


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("state.params['images']", "parameters"),
        ("state.batch_stats['x']", "parameters"),
        ("variables['params']['x']", "parameters"),
        ("state.opt_state[0].count", "optimizer"),
        ("images", "batch"),
        ("mask", "batch"),
        ("images_of_something", "other"),
        ("state.skipped", "other"),
        ("", "other"),
    ],
)
def test_part_of_an_argument(name, part):
    assert part_of(name) == part


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="no allocation"):
        read_memory(["nothing\n"], {})
