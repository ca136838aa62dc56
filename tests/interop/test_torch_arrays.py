"""Tensors that do not lie in their storages, and storages that do not lie in the file."""

from __future__ import annotations

import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import torch_bytes as tb
from hypothesis import given, settings
from hypothesis import strategies as st

from aqdetr_jax.interop.torch_file import TorchFileError, read_torch

FLOATS = struct.pack("<6f", *range(6))


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


SMALL = st.integers(0, 4)


@settings(max_examples=200)
@given(offset=st.integers(0, 7), dims=st.lists(st.tuples(SMALL, SMALL), max_size=4))
def test_a_view_is_read_exactly_if_it_stays_inside(offset, dims, tmp_path_factory):
    """The oracle visits every element."""
    shape, strides = [n for n, _ in dims], [step for _, step in dims]
    data = tb.zip_file(tb.tensor(tb.storage(6), offset, shape, strides), {"0": FLOATS})
    path = tmp_path_factory.mktemp("views", numbered=True) / "file.pth"
    path.write_bytes(data)
    places = np.full(shape, offset)
    for axis, step in enumerate(strides):
        steps = np.arange(shape[axis]) * step
        places = places + steps.reshape(-1, *[1] * (len(shape) - axis - 1))
    if places.max(initial=0) < 6 and (places.size or offset <= 6):
        value = read_torch(path)
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, places.astype(np.float32))
        assert value.shape == tuple(shape)
    else:
        with pytest.raises(TorchFileError, match="leaves its storage"):
            read_torch(path)
