"""The reader of PyTorch files against what torch itself reads from them."""

from __future__ import annotations

import ast
import inspect
import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch_bytes as tb

from aqdetr_jax.interop import (
    plain_tree,
    restricted_pickle,
    source,
    torch_arrays,
    torch_file,
    torch_names,
    zip_members,
)
from aqdetr_jax.interop.torch_file import Namespace, TorchFileError, read_torch

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "torch"
NAMES = sorted(path.stem for path in FIXTURES.glob("*.pth"))
FLOATS = struct.pack("<6f", *range(6))


def check(value: Any, expected: Any) -> None:
    """Compares a value with one that experiments/record/torch_files.py described."""
    if not isinstance(expected, dict):
        assert type(value) is type(expected)
        assert value == expected
        return
    ((kind, content),) = expected.items()
    if kind == "array":
        dtype, shape, strides, data = content
        assert type(value) is np.ndarray
        assert value.dtype == np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
        assert value.dtype.isnative
        assert value.shape == tuple(shape)
        assert value.tobytes().hex() == data
        assert not value.flags.writeable
        if value.size:
            used = [k for k, length in enumerate(shape) if length > 1]
            found = [value.strides[k] // value.itemsize for k in used]
            assert found == [strides[k] for k in used]
    elif kind == "namespace":
        assert type(value) is Namespace
        check(value.attributes, content)
    elif kind == "dict":
        assert type(value) is dict
        assert len(value) == len(content)
        for (key, item), (expected_key, expected_item) in zip(value.items(), content, strict=True):
            check(key, expected_key)
            check(item, expected_item)
    elif kind in ("set", "frozenset"):
        assert type(value).__name__ == kind
        assert sorted(value) == content
    elif kind in ("list", "tuple"):
        assert type(value).__name__ == kind
        assert len(value) == len(content)
        for item, expected_item in zip(value, content, strict=True):
            check(item, expected_item)
    elif kind == "bytes":
        assert value == bytes.fromhex(content)
    else:
        assert kind == "float"
        assert type(value) is float
        assert value.hex() == content


@pytest.fixture
def write(tmp_path):
    """Writes bytes to a file and returns its path."""

    def write(data: bytes) -> Path:
        path = tmp_path / "file.pth"
        path.write_bytes(data)
        return path

    return write


def test_fixtures_are_there():
    assert len(NAMES) == 17


@pytest.mark.parametrize("name", NAMES)
def test_reads_what_torch_reads(name):
    expected = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    check(read_torch(FIXTURES / f"{name}.pth"), expected)


@pytest.mark.parametrize("kind", ["zip", "stream"])
def test_shared_storages_stay_shared(kind):
    value = read_torch(FIXTURES / f"views_{kind}.pth")
    for name in ("transposed", "rows", "columns", "window", "expanded", "diagonal", "parameter"):
        assert np.shares_memory(value["base"], value[name]), name
    assert np.shares_memory(value["tied"][0], value["tied"][2])
    assert not np.shares_memory(value["base"], value["tied"][0])


@pytest.mark.parametrize("kind", ["zip", "stream"])
def test_arrays_can_be_computed_with(kind):
    value = read_torch(FIXTURES / f"views_{kind}.pth")
    np.testing.assert_array_equal(
        value["base"] @ value["transposed"], value["base"] @ value["base"].T
    )
    assert value["expanded"].sum() == 0
    assert value["element"] == 23


def test_files_of_python_2(write):
    """Byte strings, long counts, an OrderedDict by its items, and the first _rebuild_tensor."""

    def short(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    memory = (
        tb.group(
            short("storage"),
            tb.name("torch.FloatStorage"),
            short("94"),
            short("cuda:0"),
            tb.number(6),
            b"N",
        )
        + b"Q"
    )
    array = tb.call(
        "torch._utils._rebuild_tensor", memory, b"K\x00", b"K\x03K\x02\x86", b"K\x02K\x01\x86"
    )
    body = tb.call("collections.OrderedDict", b"](](" + short("w") + array + b"ee")
    value = read_torch(write(tb.stream_file(body, {"94": (6, FLOATS)})))
    np.testing.assert_array_equal(value["w"], np.arange(6, dtype=np.float32).reshape(3, 2))


def test_lists_and_tuples_of_every_length(write):
    body = b"(" + b")K\x01\x85K\x01K\x02\x86K\x01K\x02K\x03\x87(NNNNt" + b"t"
    expected = ((), (1,), (1, 2), (1, 2, 3), (None,) * 4)
    assert read_torch(write(tb.zip_file(body))) == expected


def test_containers_are_copied_where_they_are_shared(write):
    first, second = read_torch(write(tb.zip_file(b"(]q\x00K\x01ah\x00t")))
    assert first == second == [1]
    assert first is not second


def test_unused_storages_are_not_read(write):
    """What is dropped may name a storage that is not there; what is used may not."""
    absent = tb.tensor(tb.storage(1 << 40, key="1"), 0, (1,), (1,))
    kept = tb.text("w") + tb.tensor(tb.storage(6), 0, (6,), (1,)) + b"s"
    body = tb.call("collections.OrderedDict") + kept + tb.table(_metadata=absent) + b"b"
    assert read_torch(write(tb.zip_file(body, {"0": FLOATS})))["w"].shape == (6,)
    with pytest.raises(TorchFileError, match="no bytes for the storage 0, which takes 24"):
        read_torch(write(tb.zip_file(body)))


def test_bound_on_bytes_of_arrays():
    path = FIXTURES / "views_zip.pth"
    value = read_torch(path)
    arrays = [*value["tied"], *(array for key, array in value.items() if key != "tied")]
    # Empty dimensions count as 1.
    size = sum(a.itemsize * int(np.prod([max(n, 1) for n in a.shape])) for a in arrays)
    read_torch(path, max_bytes=size)
    with pytest.raises(TorchFileError, match=rf"views_zip\.pth: .*more than {size - 1} bytes"):
        read_torch(path, max_bytes=size - 1)
    with pytest.raises(ValueError, match="negative"):
        read_torch(path, max_bytes=-1)
    read_torch(path, max_bytes=10**40)


def test_bound_on_bytes_of_storages(write):
    """A small view of a large storage costs the storage."""
    body = tb.tensor(tb.storage(1000), 0, (1,), (1,))
    path = write(tb.zip_file(body, {"0": bytes(4000)}))
    read_torch(path, max_bytes=4000)
    with pytest.raises(TorchFileError, match="storages of more than 3999 bytes"):
        read_torch(path, max_bytes=3999)


def test_bound_on_bytes_of_the_pickle(write, monkeypatch):
    path = write(tb.zip_file(b"(" + b"N" * 96 + b"t"))
    monkeypatch.setattr(torch_file, "MAX_PICKLE", 101)
    assert len(read_torch(path)) == 96
    monkeypatch.setattr(torch_file, "MAX_PICKLE", 100)
    with pytest.raises(TorchFileError, match="pickle of more than 100 bytes"):
        read_torch(path)


def test_other_files_are_refused_by_name(write, tmp_path):
    tar = bytearray(1024)
    tar[257:262] = b"ustar"
    cases = {
        b"": "no file of torch.save",
        b"\x89HDF\r\n": "no file of torch.save",
        b"version https://git-lfs.github.com/spec/v1\n": "Git LFS",
        bytes(tar): "tar format",
        tb.zip_file(b"N", members={"a/constants.pkl": b"x"}): "TorchScript",
        tb.zip_file(b"N", members={"b/data.pkl": b"x"}): "not one data.pkl",
        tb.zip_file(b"N", members={"a/version": b"11"}): "version",
        tb.zip_file(b"N", members={"a/version": bytes(100)}): "100 bytes",
        tb.zip_file(b"N", members={"a/byteorder": b"middle"}): "byte order",
        tb.zip_file(b"N") + b"x": "bytes after its end",
        tb.stream_file(b"N", magic=1): "not one of torch.save",
        tb.stream_file(b"N", protocol=1002): "version",
        tb.stream_file(b"N", little=False): "little-endian",
        tb.stream_file(b"N") + b"\n": "1 bytes after its end",
    }
    for data, reason in cases.items():
        with pytest.raises(TorchFileError, match=reason) as error:
            read_torch(write(data))
        assert str(error.value).startswith(str(tmp_path / "file.pth") + ": ")
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        read_torch(tmp_path / "absent.pth")
    with pytest.raises(TorchFileError, match="not a regular file"):
        read_torch(tmp_path)


def test_name_of_the_file_is_whole_and_on_one_line(tmp_path):
    path = tmp_path / ("long" * 50)
    path.write_bytes(b"nothing")
    with pytest.raises(TorchFileError) as error:
        read_torch(path)
    assert str(error.value).startswith(f"{path}: ")
    path = tmp_path / "two\nlines.pth"
    path.write_bytes(b"nothing")
    with pytest.raises(TorchFileError) as error:
        read_torch(path)
    assert "\n" not in str(error.value)


def test_sources_import_nothing_that_could_run_a_file():
    """Neither pickle nor torch nor an importer, and no eval, exec, getattr or ``__import__``."""
    modules = (torch_file, torch_arrays, torch_names, zip_members, plain_tree, restricted_pickle)
    for module in (*modules, source):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names}
                names.add(str(getattr(node, "module", "")).split(".")[0])
                assert not names & {"pickle", "torch", "importlib", "builtins", "subprocess"}
            if isinstance(node, ast.Name):
                assert node.id not in {"eval", "exec", "getattr", "setattr", "__import__"}
