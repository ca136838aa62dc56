"""Sources that mislead before a single parameter of theirs is read."""

from __future__ import annotations

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import torch_bytes as tb
from foreign import torch_file
from safetensors.numpy import save, save_file

from aqdetr_jax.interop import checkpoints
from aqdetr_jax.interop.checkpoints import read_checkpoint

ONE = np.ones(3, np.float32)


def safetensors_file(kind: str, shape: list[int], data: bytes, name: str = "a") -> bytes:
    """One array under a type of our choice."""
    header = {name: {"dtype": kind, "shape": shape, "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refused(path, *reasons: str) -> None:
    with pytest.raises(ValueError, match=r"^.+$") as error:
        read_checkpoint(path)
    for reason in (*reasons, str(path)):
        assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 400


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_what_is_no_file_is_not_opened(suffix, tmp_path):
    """To open a pipe would wait for ever, and a device has no end."""
    pipe = tmp_path / f"pipe{suffix}"
    os.mkfifo(pipe)
    refused(pipe, "is not a regular file")
    device = tmp_path / f"device{suffix}"
    device.symlink_to("/dev/zero")
    refused(device, "is not a regular file")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_larger_than_any_detector_are_not_read(suffix, tmp_path):
    path = tmp_path / f"sparse{suffix}"
    with path.open("wb") as file:
        file.truncate(checkpoints.MAX_BYTES + 1)
    refused(path, "has more than 8589934592 bytes")


def test_arrays_are_bounded_by_their_file(tmp_path):
    """A tensor can be of any size without memory of its own; to use it takes that memory."""
    path = tmp_path / "expanded.pth"
    memory = struct.pack("<2f", 1, 2)
    for count in (100, 1 << 20):
        body = tb.table(model=tb.table(a=tb.tensor(tb.storage(2), 0, (count, 2), (0, 1))))
        path.write_bytes(tb.zip_file(body, {"0": memory}))
        size = path.stat().st_size
        if 8 * count <= checkpoints.MAX_GROWTH * size:
            assert read_checkpoint(path).state["a"].shape == (100, 2)
        else:
            refused(path, f"has arrays of more than {checkpoints.MAX_GROWTH * size} bytes")


def test_names_are_few_short_and_printable(tmp_path, monkeypatch):
    for name, said in (("a\nb", r"'a\nb'"), ("\x1b[2J", r"'\x1b[2J'"), ("n" * 201, "nnn...")):
        for suffix, data in (
            (".pth", torch_file({name: ONE})),
            (".safetensors", save({name: ONE})),
        ):
            path = tmp_path / f"odd{suffix}"
            path.write_bytes(data)
            refused(path, f"of the name {said}" if "..." not in said else said)
    monkeypatch.setattr(checkpoints, "MAX_PARAMETERS", 5)
    state = {f"a{k}": ONE for k in range(6)}
    for suffix, data in ((".pth", torch_file(state)), (".safetensors", save(state))):
        path = tmp_path / f"many{suffix}"
        path.write_bytes(data)
        refused(path, "holds 6 arrays; a detector has at most 5")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    index = {}
    for part in (0, 3):
        file = f"model-{part}.safetensors"
        save_file({f"a{k}": ONE for k in range(part, part + 3)}, folder / file)
        index |= {f"a{k}": file for k in range(part, part + 3)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    refused(folder, "holds 6 arrays")


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_folders_of_several_files(kind, tmp_path):
    """Both kinds of shards, one of them in half precision."""
    (tmp_path / "config.json").write_text("{}")
    stem, suffix = kind.split(".")
    parts = {"00001": {"a": ONE, "b": 2 * ONE}, "00002": {"c": np.array([0.1, 70000.0])}}
    index = {}
    for part, state in parts.items():
        name = f"{stem}-{part}-of-00002.{suffix}"
        half = {k: v.astype(np.float16) if part == "00001" else v for k, v in state.items()}
        content = save(half) if suffix == "safetensors" else torch_file(state)
        (tmp_path / name).write_bytes(content)
        index |= dict.fromkeys(state, name)
    (tmp_path / f"{kind}.index.json").write_text(json.dumps({"weight_map": index}))
    found = read_checkpoint(tmp_path)
    assert found.settings_from == "config.json"
    assert list(found.hashes) == sorted(set(index.values()))
    for state in parts.values():
        for name, array in state.items():
            assert found.state[name].dtype == np.float32
            np.testing.assert_array_equal(found.state[name], array.astype(np.float32))


def test_types_of_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    values = np.array([0.5, -2.0, 448.0])
    for kind, dtype in (("F16", "f2"), ("F32", "f4"), ("F64", "f8"), ("BF16", ml_dtypes.bfloat16)):
        path.write_bytes(safetensors_file(kind, [3], values.astype(dtype).tobytes()))
        found = read_checkpoint(path).state["a"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, values)
    for kind, size in (("F8_E4M3", 1), ("F8_E5M2", 1), ("F8_E8M0", 1), ("C64", 8), ("U16", 2)):
        path.write_bytes(safetensors_file(kind, [3], bytes(3 * size)))
        refused(path, f"a is of the type {kind}, which is not read: save it as F32")
    for kind in ("F33", "F3\n3", "x" * 100_000):
        path.write_bytes(safetensors_file(kind, [3], bytes(12)))
        refused(path, "is no safetensors file, or is damaged")
    for shape in ([4], [-1], [2**62, 4]):
        path.write_bytes(safetensors_file("F32", shape, bytes(12)))
        refused(path, "is no safetensors file, or is damaged")
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refused(path, "is no safetensors file, or is damaged")


def test_paths_stand_on_one_line(tmp_path):
    for name in ("two\nlines.pth", "two\nlines"):
        with pytest.raises(
            ValueError, match=r"two\\nlines.*: has a line break or the like"
        ) as error:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)
