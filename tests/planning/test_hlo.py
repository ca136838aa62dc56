"""Sizes of shapes, and the text of instructions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqdetr_jax.planning.hlo import Module, parse_instruction, shape_bytes


@pytest.mark.parametrize(
    ("shape", "hbm", "plain"),
    [
        ("f32[]{:T(128)}", 4, 4),
        # Three channels in lanes of 128: the image gradient of a stem.
        ("f32[8,800,1344,3]{3,2,1,0:T(8,128)}", 8 * 800 * 1344 * 128 * 4, 8 * 800 * 1344 * 3 * 4),
        # The layout's first dimension is the innermost: 8 -> 8 along 0, 3 -> 4 sublanes.
        ("f32[8,800,1344,3]{0,3,2,1:T(4,128)}", 128 * 4 * 1344 * 800 * 4, 8 * 800 * 1344 * 3 * 4),
        ("bf16[10,130]{1,0:T(8,128)(2,1)}", 16 * 256 * 2, 10 * 130 * 2),
        ("pred[5]{0:T(512)}", 512, 5),
        ("f32[2,8]{1,0:T(8,128)S(1)}", 0, 64),
        ("s4[1024,256]{1,0:T(64,128)(8,1)E(4)}", 1024 * 256 // 2, 1024 * 256 // 2),
        ("s4[8,128]{1,0:T(8,128)}", 8 * 128, 8 * 128),
        ("f8e4m3fn[8,128]{1,0}", 8 * 128, 8 * 128),
        ("(f32[2,2]{1,0}, (s32[3]{0}, pred[]), token[])", 16 + 12 + 1, 16 + 12 + 1),
    ],
)
def test_bytes_of_a_shape(shape, hbm, plain):
    assert shape_bytes(shape) == hbm
    assert shape_bytes(shape, hbm=False) == plain


@given(
    sizes=st.lists(st.integers(1, 300), min_size=2, max_size=4),
    order=st.randoms(),
    tile=st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([128, 256])),
)
def test_padding_is_to_whole_tiles(sizes, order, tile):
    """However the dimensions lie, the number of tiles is that of the two innermost ones."""
    layout = list(range(len(sizes)))
    order.shuffle(layout)
    text = (
        f"f32{sizes}".replace(" ", "") + f"{{{','.join(map(str, layout))}:T({tile[0]},{tile[1]})}}"
    )
    tiles = math.ceil(sizes[layout[0]] / tile[1]) * math.ceil(sizes[layout[1]] / tile[0])
    rest = math.prod(sizes[i] for i in layout[2:])
    assert shape_bytes(text) == tiles * tile[0] * tile[1] * rest * 4


def test_an_instruction():
    line = (
        "  ROOT %fusion.7 = (f32[8]{0:T(128)}, bf16[2,4]{1,0:T(8,128)(2,1)S(1)}) "
        "fusion(%a.1, /*index=1*/%b-2), kind=kLoop, calls=%fused.3, "
        "metadata={op_name=\"jit(step)/state.params[\\'x\\']/add\" stack_frame_id=3}\n"
    )
    found = parse_instruction(line)
    assert found is not None
    assert (found.name, found.opcode, found.root) == ("fusion.7", "fusion", True)
    assert found.operands == ("a.1", "b-2")
    assert found.called() == ["fused.3"]
    assert found.op_name == "jit(step)/state.params[\\'x\\']/add"


@pytest.mark.parametrize("line", ["\n", "  // a comment\n", "}\n"])
def test_other_lines_are_no_instructions(line):
    assert parse_instruction(line) is None


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Module(["HloModule x\n", "%f (p: f32[]) -> f32[] {\n", "}\n"])
