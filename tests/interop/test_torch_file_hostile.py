"""Files made to harm: nothing in them runs, and none costs more than its size allows."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import sys
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch_bytes as tb

from aqdetr_jax.interop import plain_tree, restricted_pickle, torch_file, zip_members
from aqdetr_jax.interop.torch_file import Namespace, TorchFileError, read_torch

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "torch"
FLOATS = struct.pack("<6f", *range(6))


@pytest.fixture
def refuse(tmp_path):
    """Checks that a file is refused for a reason, in one line, quickly and with little memory."""

    def refuse(data: bytes, reason: str) -> None:
        path = tmp_path / "file.pth"
        path.write_bytes(data)
        began = time.process_time()
        tracemalloc.start()
        try:
            with pytest.raises(TorchFileError, match=reason) as error:
                read_torch(path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < len(str(path)) + 300
        # Containers of the pickle, and of the result, take about 200 bytes for one in the file.
        assert peak < 500_000 + 1500 * min(len(data), 10_000) + 250 * len(data)
        assert time.process_time() - began < 5

    return refuse


@pytest.fixture
def accept(tmp_path):
    """Reads a file that looks odd and is in order."""

    def accept(data: bytes):
        path = tmp_path / "file.pth"
        path.write_bytes(data)
        return read_torch(path)

    return accept


# Running code.


class Runs:
    """Pickles as a call of os.system."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


SYSTEM = f"c{os.system.__module__}\nsystem\n".encode()


@pytest.mark.parametrize("form", ["pickle2", "pickle4", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"])
@pytest.mark.parametrize("kind", ["zip", "stream"])
def test_nothing_is_executed(form, kind, tmp_path, refuse):
    marker = tmp_path / "marker"
    command = f"touch {marker}"
    argument = tb.text(command)
    body = {
        "pickle2": pickle.dumps(Runs(command), 2)[2:-1],
        "pickle4": pickle.dumps(Runs(command), 4)[2:-1],
        "INST": b"(" + argument + b"i" + SYSTEM[1:],
        "OBJ": b"(" + SYSTEM + argument + b"o",
        "NEWOBJ": SYSTEM + argument + b"\x85\x81",
        "NEWOBJ_EX": SYSTEM + argument + b"\x85}\x92",
    }[form]
    # The file is what it seems: Python's own reader runs it.
    if form in ("pickle2", "pickle4", "INST", "OBJ"):
        pickle.loads(tb.program(body))
        assert marker.exists()
        marker.unlink()
    reason = "opcode INST" if form == "INST" else r"refuses to call \w+\.system: only tensors and"
    made = tb.zip_file if kind == "zip" else tb.stream_file
    refuse(made(body), reason)
    refuse(made(tb.table(model=b"}", args=body)), reason)
    assert not marker.exists()


@pytest.mark.parametrize("part", range(5))
def test_no_pickle_of_the_stream_is_trusted(part, tmp_path, refuse):
    marker = tmp_path / "marker"
    parts = [pickle.dumps(value, 2) for value in (tb.MAGIC, 1001, {"little_endian": True}, 0, [])]
    parts[part] = pickle.dumps(Runs(f"touch {marker}"), 2)
    refuse(b"".join(parts), "refuses to call")
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        *("builtins.eval", "builtins.exec", "builtins.getattr", "builtins.__import__"),
        *("__builtin__.eval", "builtins.compile", "builtins.open", "builtins.object"),
        *("builtins.dict", "builtins.bytearray", "builtins.complex", "builtins.range"),
        *("pickle.loads", "copyreg._reconstructor", "functools.partial", "operator.attrgetter"),
        *("torch.load", "torch.storage._load_from_bytes", "torch.hub.load", "torch._utils.eval"),
        *("torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_qtensor"),
        *("torch._tensor._rebuild_from_type_v2", "torch.jit._pickle.build_intlist"),
        *("torch.nn.modules.linear.Linear", "torch.FloatTensor", "torch.ComplexFloatStorage"),
        *("numpy.core.multiarray._reconstruct", "numpy.dtype", "pathlib.PosixPath"),
        *("collections.OrderedDict.__class__", "collections.defaultdict", "codecs.encode"),
        *("argparse.Namespace.__init__.__globals__", "argparse.ArgumentParser"),
        *("aqdetr_jax.interop.torch_file.read_torch", "torch_file.Namespace", "."),
    ],
)
def test_names_outside_the_list_are_refused(name, refuse):
    full = "refuses to call " + name.replace(".", r"\.")
    refuse(tb.zip_file(tb.call(name, b"N")), full)
    module, _, last = name.rpartition(".")
    # Named by parts that are put on the stack, and by what was remembered of them.
    refuse(tb.zip_file(tb.text(module) + tb.text(last) + b"\x93"), full)
    parts = tb.text(module) + b"q\x05" + tb.text(last) + b"\x94h\x05h\x01\x93\x87"
    refuse(tb.zip_file(parts), full)


def test_naming_a_module_does_not_import_it(tmp_path, monkeypatch, refuse):
    (tmp_path / "imported_by_name.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    refuse(tb.zip_file(tb.name("imported_by_name.thing")), "imported_by_name")
    assert "imported_by_name" not in sys.modules


def test_odd_names_make_one_line(refuse):
    refuse(tb.zip_file(tb.text("o\ns") + tb.text("sys\x1b[0mtem") + b"\x93"), r"o\\ns\.sys\\x1b")
    refuse(tb.zip_file(tb.text("o" * 10_000) + tb.text("s") + b"\x93"), r"ooo\.\.\.")
    refuse(tb.zip_file(b"K\x01K\x02\x93"), "by something else than text")
    refuse(tb.zip_file(b"c\xff\nx\n"), "not ASCII")
    refuse(tb.zip_file(b"c" + b"o" * 300 + b"\nx\n"), "a name that does not end")


def test_calls_of_what_is_no_function(refuse):
    ordered = tb.name("collections.OrderedDict")
    refuse(tb.zip_file(b"})R"), "calls something that is no function")
    refuse(tb.zip_file(tb.text("os.system") + b")R"), "no function")
    refuse(tb.zip_file(ordered + b"]R"), "no function")
    refuse(tb.zip_file(ordered + b")R)R"), "no function")
    refuse(tb.zip_file(tb.call("torch.FloatStorage", b"K\x01")), "no parts")
    refuse(tb.zip_file(tb.call("torch.float32")), "no parts")
    refuse(tb.zip_file(ordered), r"holds collections\.OrderedDict itself")
    refuse(tb.zip_file(tb.name("torch.FloatStorage")), "itself")


@pytest.mark.parametrize(
    "name",
    [
        *("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"),
        *("torch.Size", "torch.device", "OrderedDict", "Counter", "Namespace"),
        *("_codecs.encode", "builtins.bytes", "builtins.set", "builtins.frozenset"),
    ],
)
def test_arguments_of_calls_are_checked(name, refuse):
    (full,) = (key for key in torch_file.NAMES if key.endswith(name) and "__builtin__" not in key)
    odd = [b"N", b"K\x01", b"}", tb.text("x"), b"](K\x01e", tb.group(b"N"), tb.storage(1)]
    for arguments in ([b"N"] * 9, [b"K\x01"], [b"N"], [b"N"] * 3, [b"N"] * 6, odd, odd[:6]):
        refuse(tb.zip_file(tb.call(full, *arguments)), "arguments that are not its own|metadata")
    refuse(tb.zip_file(tb.call("_codecs.encode", tb.text("大"), tb.text("latin1"))), "not its own")
    refuse(tb.zip_file(tb.call("_codecs.encode", tb.text("x"), tb.text("rot13"))), "not its own")


def test_state_of_objects(accept, refuse):
    namespace = tb.call("argparse.Namespace")
    ordered = tb.call("collections.OrderedDict")
    assert accept(tb.zip_file(namespace + tb.table(lr=b"K\x01") + b"b")) == Namespace({"lr": 1})
    assert accept(tb.zip_file(ordered + tb.table(_metadata=b"N") + b"b")) == {}
    for name in ("__class__", "__dict__", "__reduce__", "move_to_end"):
        state = tb.table(**{name: tb.name("argparse.Namespace")})
        refuse(tb.zip_file(ordered + state + b"b"), "other than _metadata")
    for name in ("__class__", "__dict__"):
        refuse(tb.zip_file(namespace + tb.table(**{name: b"}"}) + b"b"), "or begins with __")
    # The attribute comes after the state is set.
    late = b"(" + namespace + b"}q\x00bh\x00" + tb.text("__class__") + b"}st"
    refuse(tb.zip_file(late), "begins with __")
    refuse(tb.zip_file(namespace + b"}K\x01Nsb"), "no text")
    twice = namespace + 2 * (tb.table(x=b"N") + b"b")
    refuse(tb.zip_file(twice), "of type Attributes")
    refuse(tb.zip_file(namespace + b"N}\x86b"), "something else than a dict")
    refuse(tb.zip_file(b"}" + tb.table(x=b"N") + b"b"), "of type dict")
    refuse(tb.zip_file(tb.name("argparse.Namespace") + b"}b"), "of type Global")
    array = tb.tensor(tb.storage(6), 0, (6,), (1,))
    refuse(tb.zip_file(array + b"}b", {"0": FLOATS}), "of type Tensor")


def test_opcodes_outside_the_list(refuse):
    for opcode, name in (
        *((b"\x82\x01", "EXT1"), (b"\x83\x01\x00", "EXT2"), (b"\x84\x01\x00\x00\x00", "EXT4")),
        *((b"Pname\n", "PERSID"), (b"NN0", "POP"), (b"(1", "POP_MARK"), (b"N2", "DUP")),
        *((b"I1\n", "INT"), (b"L1L\n", "LONG"), (b"F1\n", "FLOAT"), (b"S'x'\n", "STRING")),
        *((b"Vx\n", "UNICODE"), (b"(d", "DICT"), (b"(l", "LIST"), (b"Np0\n", "PUT")),
        *((b"\x96" + bytes(8), "BYTEARRAY8"), (b"\x97", "NEXT_BUFFER"), (b"\xff", "0xff")),
    ):
        refuse(tb.zip_file(opcode), rf"the opcode {name},")
    refuse(tb.zip_file(b"\x80\x06N"), "protocol 6")
    refuse(tb.zip_file(b"\x80\x00N"), "protocol 0")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not there"),
        (b"t", "lacks a mark"),
        (b"N(", "not there"),
        (b"NN", "in the middle"),
        (b"(N", "in the middle|not there"),
        (b"N\x86", "not there"),
        (b"](a", "not there"),
        (b"h\x00", "never remembered"),
        (b"(q\x00", "not there"),
        (b"Na", "not there"),
        (b"NNa", "wrong type NoneType"),
        (b"}Na", "wrong type dict"),
        (b")Na", "wrong type tuple"),
        (b"](NNu", "wrong type list"),
        (b"}(Nu", "without a value"),
        (b"](N\x90", "wrong type list"),
        (b"}]Ns", "key of type list"),
        (b"})Ns", "key of type tuple"),
        (b"\x8f()\x90", "key of type tuple"),
        (b"(]\x91", "key of type list"),
        (tb.call("builtins.set", b"])a"), "key of type tuple"),
        (b"}" + tb.number(1 << 61) + b"Ns", "61 bits"),
        (b"\x8a\x41" + bytes(65), "65 bytes"),
        (b"\x8b\xff\xff\xff\xff", "4294967295 bytes"),
        (b"X\x10\x00\x00\x00short", "cut short"),
        (b"\x8d" + b"\xff" * 8, "cut short"),
        (b"B\xff\xff\xff\xff", "cut short"),
        (b"\x95" + b"\xff" * 8 + b"N", "cut short"),
        (b"X\x01\x00\x00\x00\xff", "not UTF-8"),
        (b"X\x03\x00\x00\x00\xed\xa0\x80", "not UTF-8"),
        (b"NQ", "persistent id"),
        (tb.group(tb.text("module"), b"N", b"N", b"N", b"N") + b"Q", "persistent id"),
        (tb.storage(6, kind="torch.Size"), "persistent id"),
        (tb.storage(6, stream=True), "persistent id"),
        (tb.storage(-1), "sizes"),
        (b"(" + tb.storage(1) + tb.storage(2) + b"t", "two sizes"),
        (b"(" + tb.storage(1) + tb.storage(1, kind="torch.IntStorage") + b"t", "two sizes"),
    ],
)
def test_programs_that_make_no_sense(body, reason, refuse):
    refuse(tb.zip_file(body), reason)


# Size.


def layers(first: bytes, layer: bytes, levels: int) -> bytes:
    """Opcodes of 2 ** levels parts: each layer holds the one below twice ("?" names it)."""
    body = first + b"q\x00"
    for level in range(levels):
        body += layer.replace(b"?", b"h" + bytes([level])) + b"q" + bytes([level + 1])
    return b"(" + body + b"t"


NAMESPACE = tb.call("argparse.Namespace")
LAYERS = {
    "tuple": (b")", b"(??t"),
    "list": (b"]", b"](??e"),
    "dict": (b"}", b"}(K\x01?K\x02?u"),
    "ordered": (b"}", tb.call("collections.OrderedDict") + b"(K\x01?K\x02?u"),
    "namespace": (NAMESPACE, NAMESPACE + b"}(" + tb.text("a") + b"?" + tb.text("b") + b"?ub"),
    "size": (b")", tb.call("torch.Size", b"(??t")),
    "mixed": (b")", b"](??e}(K\x01?K\x02?u\x86"),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("levels", [20, 60])
def test_containers_that_share_endlessly(kind, levels, refuse):
    refuse(tb.zip_file(layers(*LAYERS[kind], levels)), "when shared ones are repeated|deeper than")
    refuse(tb.stream_file(layers(*LAYERS[kind], levels)), "when shared ones are rep|deeper than")


def test_shared_containers_that_are_dropped_cost_nothing(accept):
    hidden = tb.call("collections.OrderedDict") + tb.table(_metadata=layers(*LAYERS["tuple"], 100))
    assert accept(tb.zip_file(hidden + b"b")) == {}


@pytest.mark.parametrize(
    "body",
    [
        b"]q\x00h\x00a",
        b"}q\x00K\x01h\x00s",
        b"]q\x00h\x00\x85a",
        b"]q\x00(h\x00h\x00h\x00e",
        NAMESPACE + b"q\x00}" + tb.text("me") + b"h\x00sb",
        tb.call("collections.OrderedDict") + b"q\x00K\x01h\x00s",
        b"]q\x00}K\x01h\x00s\x85a",
    ],
)
def test_containers_that_hold_themselves(body, refuse):
    refuse(tb.zip_file(body), "in themselves|are repeated")


def test_depth(accept, refuse):
    most = plain_tree.MAX_DEPTH
    value = accept(tb.zip_file(b"]" * most + b"a" * (most - 1)))
    for _ in range(most - 1):
        (value,) = value
    assert value == []
    refuse(tb.zip_file(b"]" * (most + 1) + b"a" * most), f"deeper than {most}")
    # So deep that recursive code would fail, in this reader or when the memory is given back.
    refuse(tb.zip_file(b")" + b"\x85" * 100_000), "deeper than")
    refuse(tb.zip_file(b"]" * 90_000 + b"a" * 89_999), "deeper than")


def test_bounds_of_the_interpreter(monkeypatch, accept, refuse):
    monkeypatch.setattr(restricted_pickle, "MAX_OPCODES", 1000)
    assert len(accept(tb.zip_file(b"(" + b"N" * 996 + b"t"))) == 996
    refuse(tb.zip_file(b"(" + b"N" * 997 + b"t"), "more than 1000 opcodes")
    monkeypatch.setattr(restricted_pickle, "MAX_STACK", 100)
    assert len(accept(tb.zip_file(b"(" + b"N" * 100 + b"t"))) == 100
    refuse(tb.zip_file(b"(" + b"N" * 101 + b"t"), "more than 100 values on its stack")
    monkeypatch.setattr(restricted_pickle, "MAX_MEMO", 10)
    assert accept(tb.zip_file(b"N" + b"\x94" * 10)) is None
    refuse(tb.zip_file(b"N" + b"\x94" * 11), "remembers more than 10")
    refuse(tb.zip_file(b"N" + b"".join(b"r" + struct.pack("<I", k) for k in range(11))), "than 10")
    most = restricted_pickle.MAX_MARKS
    refuse(tb.zip_file(b"(" * (most + 1)), f"more than {most} open marks")


def test_the_unchanged_bounds_hold(refuse):
    refuse(tb.zip_file(b"N" * 100_001), "values on its stack")


def test_values_of_the_result(monkeypatch, accept, refuse):
    monkeypatch.setattr(plain_tree, "MAX_VALUES", 50)
    assert len(accept(tb.zip_file(b"(" + b"N" * 49 + b"t"))) == 49
    refuse(tb.zip_file(b"(" + b"N" * 50 + b"t"), "more than 50 values")


def test_calls_that_copy_again_and_again(refuse):
    """Three opcodes make a copy of a value that was remembered."""
    many = b"](" + b"".join(b"K" + bytes([k]) for k in range(250)) + b"e"
    for function, value in (
        ("builtins.set", many),
        ("builtins.frozenset", many),
        (
            "collections.Counter",
            b"}(" + b"".join(b"K" + bytes([k]) + b"N" for k in range(250)) + b"u",
        ),
        ("collections.OrderedDict", b"](" + b"K\x01N\x86" * 250 + b"e"),
        ("_codecs.encode", tb.text("x" * 250) + tb.text("latin1")),
    ):
        remembered = tb.name(function) + b"q\x00(" + value + b"tq\x01"
        body = b"(" + remembered + b"h\x00h\x01R" * 500 + b"t"
        refuse(tb.zip_file(body), "copies more values than it has bytes")


def test_integers_that_collide_are_no_keys(refuse):
    """Multiples of 2 ** 61 - 1 have the same hash; a dict of them takes quadratic time."""
    keys = b"".join(tb.number(k * (2**61 - 1)) + b"N" for k in range(1, 2000))
    refuse(tb.zip_file(b"}(" + keys + b"u"), "61 bits")


# Tensors.


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (0, (3, 2), (2, 2)),
        (0, (2, 3), (4, 1)),
        (6, (), ()),
        (6, (1,), (1,)),
        (7, (0,), (1,)),
        (-1, (1,), (1,)),
        (0, (-1,), (1,)),
        (5, (2,), (-1,)),
        (0, (-1, -6), (1, 1)),
        (0, (2,), (1, 1)),
        (0, (2, 3), (1,)),
        (0, (1,) * 33, (1,) * 33),
        (0, (2,), (1 << 62,)),
        (0, (2,), (1 << 200,)),
        (1 << 63, (1,), (1,)),
        (0, (1 << 62,), (1,)),
        (0, (1 << 62,), (0,)),
        (0, (1 << 40,), (0,)),
        (0, (1 << 200,), (0,)),
        (0, (1 << 33, 1 << 33), (0, 0)),
        (0, (0, 1 << 62), (1, 1)),
        (0, (1 << 31, 1 << 31, 0), (0, 0, 0)),
    ],
)
@pytest.mark.parametrize("kind", ["zip", "stream"])
def test_tensors_outside_their_storage(offset, shape, strides, kind, refuse):
    if kind == "zip":
        data = tb.zip_file(tb.tensor(tb.storage(6), offset, shape, strides), {"0": FLOATS})
    else:
        body = tb.tensor(tb.storage(6, stream=True), offset, shape, strides)
        data = tb.stream_file(body, {"0": (6, FLOATS)})
    refuse(data, "leaves its storage|no number from 0 on|dimensions|arrays of more than")


def test_odd_tensors_that_are_in_order(accept):
    for shape, strides, expected in (
        ((3, 2), (0, 5), [[0, 5]] * 3),
        ((1, 2), (1 << 200, 1), [[0, 1]]),
        ((2, 0), (1 << 200, 1), [[], []]),
        ((), (), 0),
    ):
        value = accept(tb.zip_file(tb.tensor(tb.storage(6), 0, shape, strides), {"0": FLOATS}))
        np.testing.assert_array_equal(value, np.array(expected, np.float32))


def test_tensors_of_no_numbers(refuse):
    for place in (
        b"N))",
        b"K\x00K\x01\x85N",
        b"\x88))",
        b"K\x00\x88\x85K\x01\x85",
        b"K\x00N\x85K\x01\x85",
        b"G" + bytes(8) + b"))",
    ):
        body = tb.call("torch._utils._rebuild_tensor", tb.storage(6), place)
        refuse(tb.zip_file(body, {"0": FLOATS}), "no number|not its own")


def test_views_that_are_made_again_and_again(accept, refuse):
    """A view costs a few bytes of the file and counts as an array of its own."""
    body = b"(" + tb.tensor(tb.storage(6), 0, (1 << 20,), (0,)) + b"q\x00" + b"h\x00" * 3000 + b"t"
    refuse(tb.zip_file(body, {"0": FLOATS}), "arrays of more than")
    body = body.replace(b"h\x00" * 3000, b"h\x00" * 300)
    tracemalloc.start()
    value = accept(tb.zip_file(body, {"0": FLOATS}))
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert len(value) == 301


def test_negated_tensors_are_refused(refuse):
    place = [b"K\x00", b"K\x01\x85", b"K\x01\x85", b"\x89", b"}"]
    for metadata in (tb.table(neg=b"\x88"), b"K\x00", b"]"):
        body = tb.call("torch._utils._rebuild_tensor_v2", tb.storage(6), *place, metadata)
        refuse(tb.zip_file(body, {"0": FLOATS}), "metadata")


def test_storages_are_compared_with_the_file(refuse):
    body = tb.tensor(tb.storage(6), 0, (6,), (1,))
    refuse(tb.zip_file(body), "no bytes for the storage 0")
    refuse(tb.zip_file(body, {"0": FLOATS[:-1]}), "23 bytes for the storage 0, which takes 24")
    refuse(tb.zip_file(body, {"0": FLOATS + b"\0"}), "25 bytes")
    refuse(tb.zip_file(body, {"00": FLOATS}), "no bytes")
    giant = tb.tensor(tb.storage(1 << 62), 0, (1,), (1,))
    refuse(tb.zip_file(giant, {"0": FLOATS}), "storages of more than")
    refuse(tb.zip_file(tb.storage(1 << 30), {"0": FLOATS}), "24 bytes for the storage")
    refuse(tb.zip_file(tb.storage(1 << 500), {"0": FLOATS}), "arrays of more than")
    up = tb.tensor(tb.storage(6, key="../data.pkl"), 0, (6,), (1,))
    refuse(tb.zip_file(up, {"0": FLOATS}), "no bytes")
    bools = tb.storage(2, kind="torch.BoolStorage")
    refuse(tb.zip_file(bools, {"0": b"\x01\x02"}), "neither 0 nor 1")


def test_storages_of_the_stream_are_compared_with_the_file(refuse):
    body = tb.tensor(tb.storage(6, stream=True), 0, (6,), (1,))
    refuse(tb.stream_file(body), "lacks the storage 0")
    refuse(tb.stream_file(body, {"0": (5, FLOATS)}), "5 elements")
    refuse(tb.stream_file(body, {"0": (-1, FLOATS)}), "-1 elements")
    refuse(tb.stream_file(body, {"0": (6, FLOATS[:-1])}), "cut short")
    refuse(tb.stream_file(body, {"0": (6, FLOATS), "1": (6, FLOATS)}), "no tensor uses")
    giant = tb.storage(1 << 61, stream=True)
    refuse(tb.stream_file(giant, {"0": (1 << 61, FLOATS)}), "cut short")
    whole = tb.stream_file(body, {"0": (6, FLOATS)})
    keys = pickle.dumps(["0"], 2)
    for other in (["0", "0"], {"0": 1}, [0], [None]):
        refuse(whole.replace(keys, pickle.dumps(other, 2)), "list")


# Zip files.


def test_names_of_members(refuse):
    for name in (
        *("../up", "a/../../up", "/etc/passwd", "a\\b", "C:/x", "a//b", "a/./b", "x\ny", ".."),
    ):
        refuse(tb.zip_file(b"N", members={name: b""}), "forbidden name")


def test_duplicate_names(refuse):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refuse(tb.zip_file(b"N", members={"a/data.pkl": b"x"}), "two members of the name a/data.p")


def test_compressed_members(accept, refuse):
    body = tb.tensor(tb.storage(6), 0, (6,), (1,))
    data = tb.zip_file(body, {"0": FLOATS}, method=zipfile.ZIP_DEFLATED)
    np.testing.assert_array_equal(accept(data), np.arange(6, dtype=np.float32))
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        refuse(tb.zip_file(body, {"0": FLOATS}, method=method), "unknown compression")
    bomb = tb.zip_file(
        tb.storage(10_000_000, kind="torch.ByteStorage"),
        {"0": bytes(10_000_000)},
        method=zipfile.ZIP_DEFLATED,
    )
    refuse(bomb, f"inflate to more than {zip_members.MAX_INFLATION} times")


def patched(data: bytes, name: bytes, at: int, value: bytes) -> bytes:
    """A zip file with a field changed in the list of members; ``at`` counts from the entry."""
    place = data.rindex(name) - zip_members.ENTRY.size + at
    return data[:place] + value + data[place + len(value) :]


def test_lists_of_members_that_lie(refuse):
    body = tb.storage(400, kind="torch.ByteStorage")
    data = tb.zip_file(body, {"0": bytes(range(200)) * 2, "1": b"1"}, method=zipfile.ZIP_DEFLATED)
    name = b"a/data/0"
    for size in (0, 1, 399, 401, 4000):
        refuse(patched(data, name, 24, struct.pack("<I", size)), "another size|storage 0, which")
    for size in (200, 399, 401):
        # The pickle and the list of members agree; the member holds another number of bytes.
        lie = tb.storage(size, kind="torch.ByteStorage")
        other = tb.zip_file(lie, {"0": bytes(range(200)) * 2}, method=zipfile.ZIP_DEFLATED)
        refuse(patched(other, name, 24, struct.pack("<I", size)), "another size than it declares")
    refuse(patched(data, name, 24, b"\xf0\xff\xff\xff"), "inflate to more")
    refuse(patched(data, name, 20, b"\xf0\xff\xff\xff"), "overlap")
    refuse(patched(data, name, 16, b"\x01\x02\x03\x04"), "checksum")
    refuse(patched(data, name, 8, b"\x01\x00"), "encrypted")
    refuse(patched(data, name, 8, b"\x00\x20"), "encrypted")
    refuse(patched(data, name, 10, b"\x00\x00"), "two sizes")
    refuse(patched(data, name, 10, b"\x63\x00"), "unknown compression 99")
    refuse(patched(data, name, 24, b"\xff\xff\xff\xff"), "sizes are missing")
    refuse(patched(data, name, 34, b"\x01\x00"), "several")
    refuse(patched(data, name, 42, b"\x00\x00\x00\x00"), "overlap")
    refuse(patched(data, name, 46, b"a/data/9"), "no bytes for the storage")
    refuse(patched(data, name, 46, b"a/data/1"), "two members")
    refuse(patched(data, b"a/data/1", 42, b"\x01\x00\x00\x00"), "overlap|corrupt")


def test_members_that_share_their_bytes(refuse):
    """The overlapping kind of bomb: many entries of the list lead to one member."""
    data = tb.zip_file(b"N", {"0": b"x" * 100})
    begin = data.index(b"PK\x01\x02")
    directory, end = data[begin:-22], data[-22:]
    entry = directory[directory.rindex(b"PK\x01\x02") :]
    entries = b"".join(entry.replace(b"data/0", b"data/%d" % k) for k in range(1, 10))
    directory += entries
    end = end[:8] + struct.pack("<HHI", 11, 11, len(directory)) + end[16:]
    refuse(data[:begin] + directory + end, "overlap")


def test_the_member_itself_contradicts_the_list(refuse):
    data = tb.zip_file(tb.storage(24, kind="torch.ByteStorage"), {"0": FLOATS})
    own = data.index(b"a/data/0")
    refuse(data[:own] + b"a/data/7" + data[own + 8 :], "two names")
    refuse(data[: own - 30] + b"XXXX" + data[own - 26 :], "corrupt header")
    refuse(data[: own - 22] + b"\x08\x00" + data[own - 20 :], "corrupt header")
    refuse(data[: own - 2] + b"\xff\x00" + data[own:], "overlaps the next|outside")
    flipped = bytearray(data)
    flipped[data.index(FLOATS) + 5] ^= 1
    refuse(bytes(flipped), "checksum")


def test_many_members(monkeypatch, refuse):
    monkeypatch.setattr(zip_members, "MAX_MEMBERS", 10)
    refuse(tb.zip_file(b"N", {str(k): b"" for k in range(10)}), "more than 10 members")


def test_zip64(accept, refuse):
    """The form for large files, as in their list of members, around a small one."""
    data = tb.zip_file(tb.storage(24, kind="torch.ByteStorage"), {"0": FLOATS})
    begin = data.index(b"PK\x01\x02")
    name = data.rindex(b"a/data/0")
    (start,) = struct.unpack_from("<I", data, name - 4)
    extra = struct.pack("<2H3Q", 1, 24, 24, 24, start)
    full = b"\xff" * 4
    entry = bytearray(data[name - 46 : name])
    entry[20:28] = full * 2
    entry[30:32] = struct.pack("<H", len(extra))
    entry[42:46] = full
    directory = data[begin : name - 46] + bytes(entry) + b"a/data/0" + extra
    length = len(directory)
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, length, begin)
    place = struct.pack("<4sLQL", b"PK\x06\x07", 0, begin + length, 1)
    end = b"PK\x05\x06" + bytes(4) + b"\xff" * 12 + bytes(2)
    whole = data[:begin] + directory + record + place + end
    assert accept(whole).tobytes() == FLOATS
    for old, new in (
        (b"PK\x06\x06", b"PK\x06\x00"),
        (b"PK\x06\x07", b"PK\x06\x00"),
        (place, struct.pack("<4sLQL", b"PK\x06\x07", 0, 1 << 60, 1)),
        (extra, struct.pack("<2H3Q", 1, 24, 1 << 60, 1 << 60, start)),
        (extra, struct.pack("<2H3Q", 1, 24, 24, 24, 1 << 60)),
        (extra, struct.pack("<2H3Q", 1, 8, 24, 24, start)),
        (extra, struct.pack("<2H3Q", 1, 99, 24, 24, start)),
        (extra, struct.pack("<2H3Q", 2, 24, 24, 24, start)),
        (record, record[:24] + struct.pack("<2Q", 1 << 40, 1 << 40) + record[40:]),
        (record, record[:40] + struct.pack("<2Q", 1 << 62, begin)),
        (record, record[:40] + struct.pack("<2Q", length, 1 << 62)),
    ):
        assert whole.count(old) == 1
        refuse(whole.replace(old, new), "corrupt|cut short|overlap|inflate|members")


# Damage.


@pytest.mark.parametrize("name", ["views_zip", "views_stream", "deflated_zip"])
def test_cut_at_every_byte(name, tmp_path):
    whole = (FIXTURES / f"{name}.pth").read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(whole)
    read_torch(path)
    # From the end: cutting a file is cheaper than writing it.
    with path.open("r+b") as file:
        for length in reversed(range(len(whole))):
            file.truncate(length)
            with pytest.raises(TorchFileError, match=r"^\S*cut\.pth: .+$"):
                read_torch(path)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """``data`` with one to four bytes changed, removed, inserted or copied from elsewhere."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        place, length = int(rng.integers(len(changed))), int(rng.integers(1, 9))
        match rng.integers(5):
            case 0:
                changed[place] = rng.integers(256)
            case 1:
                changed[place] ^= 1 << int(rng.integers(8))
            case 2:
                del changed[place : place + length]
            case 3:
                changed[place:place] = rng.bytes(length)
            case _:
                source = int(rng.integers(len(changed)))
                changed[place : place + length] = changed[source : source + length]
    return bytes(changed)


@pytest.mark.parametrize("name", ["views_zip", "unchecked_zip", "views_stream", "dtypes_stream"])
def test_random_damage(name, tmp_path, monkeypatch):
    """2500 files each; no checksum protects the contents of ``unchecked`` and of the streams."""
    whole = (FIXTURES / f"{name}.pth").read_bytes()
    rng = np.random.default_rng(NAMES_OF_DAMAGE.index(name))
    path = tmp_path / "damaged.pth"
    allocated = []
    fill = torch_file._fill

    def counted(file, size):
        allocated.append(size)
        return fill(file, size)

    monkeypatch.setattr(torch_file, "_fill", counted)
    read = 0
    messages = []
    began = time.process_time()
    for _ in range(2500):
        data = mutated(whole, rng)
        path.write_bytes(data)
        allocated.clear()
        try:
            read_torch(path)
            read += 1
        except TorchFileError as error:
            messages.append(str(error))
        assert sum(allocated) <= len(data)
    assert read
    assert messages
    assert all(text.startswith(f"{path}: ") and "\n" not in text for text in messages)
    assert time.process_time() - began < 60


NAMES_OF_DAMAGE = ("views_zip", "unchecked_zip", "views_stream", "dtypes_stream")


@pytest.mark.parametrize("name", ["training_stream", "protocol4_stream", "protocol5_zip"])
def test_memory_of_damaged_files(name, tmp_path):
    whole = (FIXTURES / f"{name}.pth").read_bytes()
    rng = np.random.default_rng(7)
    path = tmp_path / "damaged.pth"
    tracemalloc.start()
    try:
        for _ in range(40):
            path.write_bytes(mutated(whole, rng))
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(TorchFileError):
                read_torch(path)
            assert tracemalloc.get_traced_memory()[1] - before < 50 * len(whole) + 500_000
    finally:
        tracemalloc.stop()
