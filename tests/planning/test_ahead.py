"""The compiler's process: what is read of it, how it is ended, and what its failures say."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest
import tiny

from aqdetr_jax.planning.ahead import Case, compile_ahead, last_words
from aqdetr_jax.planning.chips import parse_slice
from aqdetr_jax.planning.resolve import read_facts, resolve

LOOP = Path(__file__).parents[1] / "fixtures" / "loop.hlo.txt"
ASSIGNED = (
    "allocation 1: size 4096, parameter 0, shape |u8[2,4]| at ShapeIndex {0}:\n"
    "allocation 2: size 1000, preallocated-temp:\n"
)
GIVEN = """ENTRY %main (x: u8[2,4]) -> u8[2,4] {
  %p = u8[2,4]{1,0} parameter(0), metadata={op_name="images"}
}
"""
HEAD = """
import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[3])
dump = folder / "dump"
Path(PID).write_text(str(os.getpid()))
case = json.loads((folder / "case.json").read_text())
assert case["topology"] == "v5e:2x2" and case["bucket"] == [64, 64]
assert f"--xla_dump_to={dump}" in os.environ["XLA_FLAGS"]
"""
DUMP = f"""
stem = dump / "module_0003.jit_step.cl_1"
def put(end, text):
    stem.with_name(stem.name + end).write_text(text)
put(".before_optimizations.txt", {GIVEN!r})
put(".after_optimizations.txt", {LOOP.read_text()!r})
put(".after_optimizations-buffer-assignment.txt", {ASSIGNED!r})
put(".after_optimizations-memory-usage-report.txt", "Total bytes\\n")
"""


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Lets a script stand in for the process that compiles; asserts that nothing is left of it."""
    monkeypatch.setattr("aqdetr_jax.planning.ahead.check_libtpu", lambda: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    script = tmp_path / "python"

    def stand_in(body: str) -> None:
        first = f"#!{sys.executable}\nPID = {str(tmp_path / 'pid')!r}\n"
        script.write_text(first + HEAD + body)
        script.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(script))

    yield stand_in
    assert not any((tmp_path / "temporary").iterdir())
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def case(kind="eval") -> Case:
    place = parse_slice("v5e:2x2")
    return Case(resolve(read_facts(tiny.FLOAT, place), place).config, place, (64, 64), kind)


def test_fast_ends_the_compiler_once_buffers_are_assigned(child):
    child(DUMP + "time.sleep(3600)\n")
    start = time.monotonic()
    found = compile_ahead(case(), fast=True)
    assert time.monotonic() - start < 3000  # it was not waited for
    assert (found.memory.batch, found.memory.temporaries, found.memory.code) == (4096, 1000, None)
    assert found.program.instructions == 30
    assert (found.fits, found.complete) == (True, False)


def test_whole_compilation_knows_the_code_too(child):
    child(DUMP + '(folder / "done.json").write_text(json.dumps({"code_bytes": 77}))\n')
    found = compile_ahead(case(), fast=False)
    assert (found.memory.code, found.memory.total, found.complete) == (77, 4096 + 1000 + 77, True)


def test_what_does_not_fit_is_no_error(child):
    """XLA assigns buffers first and refuses then: how much is missing is known."""
    body = DUMP.replace("size 1000", f"size {20 * 2**30}")
    child(body + '(folder / "done.json").write_text(json.dumps({"error": "Ran out"}))\n')
    found = compile_ahead(case(), fast=False)
    assert not found.fits
    assert found.memory.temporaries == 20 * 2**30


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        (
            '(folder / "done.json").write_text(json.dumps({"refused": "mesh.model=2 cannot"}))',
            ValueError,
            "mesh.model=2 cannot",
        ),
        (
            DUMP + '(folder / "done.json").write_text(json.dumps({"error": "INTERNAL: why"}))',
            RuntimeError,
            "INTERNAL: why",
        ),
        (
            'os.write(1, b"F1127 emitter.cc] Check failed: window\\n@ 0x7\\n@ 0x8")\nos.abort()',
            RuntimeError,
            "Check failed: window",
        ),
        ('raise TypeError("what is wrong")', RuntimeError, "TypeError: what is wrong"),
    ],
    ids=["placement", "compiler", "abort", "python"],
)
def test_failures_are_told_in_their_own_words(child, body, kind, text):
    child(body + "\n")
    with pytest.raises(kind) as caught:
        compile_ahead(case(), fast=False)
    assert text in str(caught.value)
    assert "0x7" not in str(caught.value)


def test_last_words_without_a_reason():
    assert last_words("a\nb\nc\nd\ne\nf\n") == "b\nc\nd\ne\nf"
    assert last_words("") == ""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed: pip install 'jax[tpu]'",
)
def test_a_step_compiles_for_a_slice():
    """Chips send gradients alone, once; what the state takes is known beforehand.

    A slice of 64, where XLA would gather the attention maps of the whole batch for their layout.
    """
    place = parse_slice("v5p:4x4x4")
    model = dataclasses.replace(tiny.MODEL, decoder_layers=1)
    facts = read_facts(dataclasses.replace(tiny.FLOAT, model=model), place)
    config = resolve(facts, place, 1).config
    found = compile_ahead(Case(config, place, (64, 64), "train"), fast=True)
    assert found.fits
    memory, collectives = found.memory, found.program.collectives
    assert {(c.kind, c.group, c.loop) for c in collectives} == {("all-reduce", 64, "")}
    assert sum(c.bytes for c in collectives) < memory.parameters < 64 * 2 * 64 * 64 * 4
    # AdamW: two moments of every parameter that is trained.
    assert memory.parameters < memory.optimizer < 2.1 * memory.parameters
    assert 0 < memory.parameters <= memory.average
    assert memory.batch > 64 * 64 * 3
    assert found.program.traffic > memory.parameters + memory.optimizer
