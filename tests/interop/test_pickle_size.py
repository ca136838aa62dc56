"""Pickles that are small and would cost much: none costs more than its size allows."""

from __future__ import annotations

import struct

import pytest
import torch_bytes as tb

from aqdetr_jax.interop import pickle_values, plain_tree, restricted_pickle


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


def test_long_texts_are_no_keys(accept, refuse):
    """Two that are equal but not the same are compared to their end, whenever one is set."""
    most = tb.text("x" * pickle_values.MAX_KEY_LENGTH)
    more = tb.text("x" * (pickle_values.MAX_KEY_LENGTH + 1))
    assert len(accept(tb.zip_file(b"}" + most + b"Ns"))) == 1
    refuse(tb.zip_file(b"}" + more + b"Ns"), "more than 1024 characters")
    refuse(tb.zip_file(b"}B\xff\xff\x00\x00" + bytes(0xFFFF) + b"Ns"), "more than 1024 char")
    refuse(tb.zip_file(tb.storage(1, key="x" * 2000)), "more than 1024 characters")


def test_numbers_as_keys_are_few(accept, refuse, monkeypatch):
    """Their hashes are known: smaller numbers can be chosen to collide as well."""
    for module in (restricted_pickle, plain_tree):
        monkeypatch.setattr(module, "MAX_NUMBER_KEYS", 300)
    many = b"(" + b"".join(tb.number(k) for k in range(301))
    pairs = b"(" + b"".join(tb.number(k) + b"N" for k in range(301)) + b"u"
    listed = b"](" + b"".join(tb.number(k) + b"N\x86" for k in range(301)) + b"e"
    for body in (
        *(b"}" + pairs, b"\x8f" + many + b"\x90", many + b"\x91"),
        tb.call("builtins.set", b"]" + many + b"e"),
        tb.call("collections.OrderedDict", listed),
        tb.call("collections.Counter", b"}" + pairs),
        b"}" + b"".join(b"G" + struct.pack(">d", k) + b"Ns" for k in range(301)),
    ):
        refuse(tb.zip_file(body), "more than 300 numbers as keys")
    # Counted over the whole pickle, and once more where the result repeats them.
    few = b"}(" + b"".join(tb.number(k) + b"N" for k in range(200)) + b"u"
    assert len(accept(tb.zip_file(few))) == 200
    refuse(tb.zip_file(b"(" + few + few + b"t"), "numbers as keys")
    refuse(tb.zip_file(b"(" + few + b"q\x00h\x00t"), "holds more than 300 numbers as keys")


def test_the_memo_is_in_order(accept, refuse):
    """Its numbers are the file's choice as well; Python 2 began at 1."""
    assert accept(tb.zip_file(b"K\x07q\x01h\x01\x86"))[1] == 7
    assert accept(tb.zip_file(b"K\x07q\x00q\x01h\x01\x86"))[1] == 7
    refuse(tb.zip_file(b"K\x07q\x02"), "out of order")
    refuse(tb.zip_file(b"K\x07r\xff\xff\xff\x7f"), "out of order")


def test_integers_that_collide_are_no_keys(refuse):
    """Multiples of 2 ** 61 - 1 have the same hash; a dict of them takes quadratic time."""
    keys = b"".join(tb.number(k * (2**61 - 1)) + b"N" for k in range(1, 2000))
    refuse(tb.zip_file(b"}(" + keys + b"u"), "61 bits")
