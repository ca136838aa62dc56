"""Pickles made to harm: nothing in them runs."""

from __future__ import annotations

import os
import pickle
import struct
import sys

import pytest
import torch_bytes as tb
from hypothesis import given, settings
from hypothesis import strategies as st

from aqdetr_jax.interop import torch_file
from aqdetr_jax.interop.torch_file import Namespace, TorchFileError, read_torch

FLOATS = struct.pack("<6f", *range(6))


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
        *("numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.load", "pathlib.Path"),
        *("numpy.core.multiarray.scalar.__self__", "pathlib.os.system", "struct.unpack"),
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
    parts = tb.text(module) + b"q\x01" + tb.text(last) + b"q\x02h\x01h\x02\x93\x87"
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
        *("_rebuild_parameter_with_state", "numpy.dtype", "numpy.core.multiarray.scalar"),
        *("pathlib.PosixPath", "pathlib.PureWindowsPath"),
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


def number_type(code: str, order: str = "<", *, state: bytes | None = None) -> bytes:
    """A type of NumPy, as protocol 2 has it."""
    made = tb.call("numpy.dtype", tb.text(code), b"\x89", b"\x88")
    whole = tb.group(b"K\x03", tb.text(order), b"N", b"N", b"N", *[tb.number(-1)] * 2, b"K\x00")
    return made + (whole if state is None else state) + b"b"


def numpy_number(kind: bytes, data: bytes) -> bytes:
    return tb.call("numpy._core.multiarray.scalar", kind, b"C" + bytes([len(data)]) + data)


def test_numbers_of_numpy(accept, refuse):
    big = numpy_number(number_type("u8", ">"), b"\0" * 7 + b"\5")
    assert accept(tb.zip_file(big)) == 5
    half = numpy_number(number_type("f2"), struct.pack("<e", -0.5))
    assert accept(tb.zip_file(half)) == -0.5
    yes = accept(tb.zip_file(numpy_number(number_type("b1", "|"), b"\1")))
    assert yes is True
    refuse(tb.zip_file(numpy_number(number_type("f8"), bytes(7))), "7 bytes, whose type is f8")
    for code in ("O", "V8", "U1", "c8", "M8", "f16", "f8,f8", "x" * 999):
        refuse(tb.zip_file(numpy_number(number_type(code), bytes(8))), "no plain number")
    for state in (b"N", b"}", b")", tb.group(b"K\x03", tb.text("=")), tb.text("<")):
        refuse(tb.zip_file(number_type("f8", state=state)), "none of a plain number")
    # Fields and an object to build them of.
    fields = tb.group(b"K\x03", tb.text("<"), b"N", b")", b"}", *[b"K\x00"] * 3)
    refuse(tb.zip_file(number_type("f8", state=fields)), "none of a plain number")
    refuse(tb.zip_file(number_type("f8")), "itself")


def test_paths_become_text(accept):
    for kind, parts, text in (
        ("PosixPath", ("/", "runs", "a b"), "/runs/a b"),
        ("PosixPath", ("runs", "..", "a"), "runs/../a"),
        ("PurePosixPath", (), "."),
        ("PosixPath", ("/",), "/"),
        ("WindowsPath", ("C:\\", "runs", "a"), "C:\\runs\\a"),
    ):
        for module in ("pathlib", "pathlib._local"):
            body = tb.call(f"{module}.{kind}", *map(tb.text, parts))
            assert accept(tb.zip_file(body)) == text


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


def test_frames(accept):
    for body in (b"\x95" + struct.pack("<Q", 2) + b"N", b"\x95" + struct.pack("<Q", 1) + b"N"):
        assert accept(tb.zip_file(body)) is None
    # Writers put large values between frames.
    value = [b"x" * 100_000, "y" * 100_000, list(range(50_000))]
    assert accept(tb.zip_file(pickle.dumps(value, 4)[2:-1])) == value
    with pytest.raises(TorchFileError, match="behind the last"):
        accept(tb.stream_file(b"\x95" + struct.pack("<Q", 4) + b"N"))


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
        (b"\x95" + struct.pack("<Q", 3) + b"N", "cut short"),
        (b"\x95" + struct.pack("<Q", 2) + b"M\x01\x02", "frame that ends inside"),
        (b"\x95" + struct.pack("<Q", 11) + (b"\x95" + struct.pack("<Q", 2)) + b"N", "inside ano"),
        (b"\x95" + bytes(8) + b"N", "empty one"),
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


KEYS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.binary(max_size=8),
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False),
    st.none(),
)
SCALARS = KEYS | st.booleans() | st.integers(-(2**511), 2**511 - 1)
VALUES = st.recursive(
    SCALARS | st.sets(KEYS, max_size=4) | st.frozensets(KEYS, max_size=4),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=5)
    ),
    max_leaves=30,
)


def typed(value):
    """A value in which 1, 1.0 and True differ, as do the kinds of containers."""
    if isinstance(value, dict):
        return [(typed(key), typed(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [typed(item) for item in value]
    if isinstance(value, set | frozenset):
        return type(value), sorted(map(repr, value))
    return repr(value)


@settings(max_examples=150)
@given(value=VALUES, protocol=st.integers(2, 5))
def test_reads_what_pickle_writes(value, protocol, tmp_path_factory):
    path = tmp_path_factory.mktemp("pickles", numbered=True) / "file.pth"
    path.write_bytes(tb.zip_file(pickle.dumps(value, protocol)[2:-1]))
    assert typed(read_torch(path)) == typed(value)
