"""What the tests here share: a converted model, PyTorch files read from bytes, and limits."""

from __future__ import annotations

import tracemalloc

import pytest
from counted_steps import bound, counted
from foreign import write_folder

from aqdetr_jax.interop.convert import convert
from aqdetr_jax.interop.torch_file import TorchFileError, read_torch


@pytest.fixture
def refuse(tmp_path):
    """Checks that a file is refused for a reason, in one line, in few steps and little memory."""

    def refuse(data: bytes, reason: str) -> None:
        path = tmp_path / "file.pth"
        path.write_bytes(data)
        tracemalloc.start()
        try:
            with pytest.raises(TorchFileError, match=reason) as error, counted() as steps:
                read_torch(path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < len(str(path)) + 300
        # Containers of the pickle, and of the result, take about 200 bytes for one in the file.
        assert peak < 500_000 + 1500 * min(len(data), 10_000) + 250 * len(data)
        assert steps() < bound(data)

    return refuse


@pytest.fixture
def accept(tmp_path):
    """Reads a file that looks odd and is in order."""

    def accept(data: bytes):
        path = tmp_path / "file.pth"
        path.write_bytes(data)
        return read_torch(path)

    return accept


@pytest.fixture(scope="module")
def converted(tmp_path_factory, quick_compile):
    """Folder of ours with the parameters of a recorded DETR of transformers."""
    folder = tmp_path_factory.mktemp("converted")
    convert(write_folder(folder / "theirs", "detr_basic"), folder / "ours")
    return folder / "ours"
