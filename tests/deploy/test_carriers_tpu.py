"""The compiler for TPUs keeps narrow operands narrow."""

import importlib.util

import pytest
from carriers_tpu import cycles, operands_found, rows_of_chip

TEXT = """\
HloModule jit_f, is_scheduled=true

%fused (p: s8[8,16], q: s8[16,4]) -> s32[8,4] {
  %p = s8[8,16]{1,0:T(8,128)(4,1)} parameter(0)
  %q = s8[16,4]{1,0:T(8,128)(4,1)} parameter(1)
  %narrow = s4[16,4]{1,0:T(8,128)(8,1)E(4)} convert(%q)
  ROOT %convolution.1 = s32[8,4]{1,0:T(8,128)} convolution(%p, %narrow), dim_labels=bf_io->bf
}

ENTRY %main (a: s8[8,16], b: s8[16,4]) -> s32[8,4] {
  %a = s8[8,16]{1,0:T(8,128)(4,1)} parameter(0)
  %b = s8[16,4]{1,0:T(8,128)(4,1)} parameter(1)
  %fusion = s32[8,4]{1,0:T(8,128)} fusion(%a, %b), kind=kOutput, calls=%fused, \
backend_config={"estimated_cycles":"1200"}
  ROOT %copy = s32[8,4]{0,1:T(1,128)} copy(%fusion), backend_config={"estimated_cycles":"99"}
}
"""


def test_operands_are_read_where_they_are_multiplied():
    assert operands_found(TEXT.splitlines()) == [("s8", "s4")]
    assert cycles(TEXT.splitlines()) == 1200


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed: pip install 'jax[tpu]'",
)
@pytest.mark.parametrize(("chip", "wanted"), [("v5e", "s4 x s4"), ("tpu7x", "f8e4m3fn x f8e4m3fn")])
def test_four_bits_stay_narrow(chip, wanted):
    rows = [row for row in rows_of_chip(chip, "dense small") if row["chosen"]]
    assert len(rows) == 4
    assert all(row["ok"] for row in rows)
    assert {tuple(row["found"]) for row in rows if "8" not in row["bits"]} == {(wanted,)}
