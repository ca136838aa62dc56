"""Damaged files: each is refused in one line, or read, within its size."""

from __future__ import annotations

import contextlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from counted_steps import bound, counted

from aqdetr_jax.interop import torch_file
from aqdetr_jax.interop.torch_file import TorchFileError, read_torch

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "torch"


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

    def noted(file, size):
        allocated.append(size)
        return fill(file, size)

    monkeypatch.setattr(torch_file, "_fill", noted)
    read = 0
    messages = []
    for _ in range(2500):
        data = mutated(whole, rng)
        path.write_bytes(data)
        allocated.clear()
        with counted() as steps:
            try:
                read_torch(path)
                read += 1
            except TorchFileError as error:
                messages.append(str(error))
        assert steps() < bound(data)
        assert sum(allocated) <= len(data)
    assert read
    assert messages
    assert all(text.startswith(f"{path}: ") and "\n" not in text for text in messages)


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
