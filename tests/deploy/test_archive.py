import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from aqdetr_jax.checkpoint.checksums import _checksum, read_manifest, write_manifest
from aqdetr_jax.deploy.archive import (
    MANIFEST,
    WEIGHTS,
    PackedModelError,
    is_archive,
    read_archive,
    write_archive,
)
from aqdetr_jax.deploy.bits import Codes


def arrays():
    rng = np.random.default_rng(0)
    return {
        "a/kernel": Codes(rng.integers(-8, 8, (3, 3, 5, 7)).astype(np.int8), 4),
        "b/kernel": Codes(rng.integers(-4, 4, (5, 3)).astype(np.int8), 3),
        "a/kernel_step": np.full(7, 0.25, np.float32),
        "b/bias": np.arange(3, dtype=np.int32),
    }


@pytest.fixture
def folder(tmp_path):
    write_archive(tmp_path / "packed", arrays(), {"name": "x"})
    return tmp_path / "packed"


def test_what_is_written_is_read(folder):
    assert is_archive(folder)
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, WEIGHTS]
    found, facts = read_archive(folder)
    assert facts == {"name": "x"}
    assert found.keys() == arrays().keys()
    for name, array in arrays().items():
        if isinstance(array, Codes):
            assert found[name].bits == array.bits
            np.testing.assert_array_equal(found[name].values, array.values)
        else:
            np.testing.assert_array_equal(found[name], array)
    # Two 4-bit codes a byte: 315 codes in 158 bytes; 15 codes of 3 bits in 6.
    stored = load_file(folder / WEIGHTS)
    assert stored["a/kernel"].nbytes == 158
    assert stored["b/kernel"].nbytes == 6


def test_a_truncated_file_and_a_flipped_byte(folder):
    weights = folder / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    with pytest.raises(PackedModelError, match=rf"{WEIGHTS} has {len(whole) - 5} bytes, expected"):
        read_archive(folder)
    for place in (3, len(whole) // 2, len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 1
        weights.write_bytes(changed)
        with pytest.raises(PackedModelError, match=f"{WEIGHTS} is damaged"):
            read_archive(folder)
    weights.unlink()
    with pytest.raises(PackedModelError, match=f"{WEIGHTS} is missing"):
        read_archive(folder)


def test_a_manifest_that_is_damaged_or_of_another_file(folder, tmp_path):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"bits": 4', '"bits": 3'))
    with pytest.raises(PackedModelError, match=f"{MANIFEST} is damaged"):
        read_archive(folder)
    (folder / MANIFEST).write_text(text[:100])
    with pytest.raises(PackedModelError, match="not valid JSON"):
        read_archive(folder)
    write_archive(tmp_path / "other", {"z": np.zeros(3, np.float32)}, {})
    shutil.copy(tmp_path / "other" / MANIFEST, folder / MANIFEST)
    with pytest.raises(PackedModelError, match="bytes, expected"):
        read_archive(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match="no packed model"):
        read_archive(folder)


def rewritten(folder, change=None, state=None):
    """A manifest that is right about its own checksum and files, and wrong otherwise."""
    content = read_manifest(folder / MANIFEST)
    content.pop("files")
    if state is not None:
        (folder / WEIGHTS).write_bytes(save(state))
    write_manifest(folder / MANIFEST, folder, content | (change or {}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2 of the format"),
        ({"format": "other"}, "something else than a packed model"),
        ({"codes": {}}, None),  # the bytes are then plain uint8 arrays: nothing is wrong with those
        ({"codes": []}, "does not describe the codes"),
        ({"codes": {"c": {"bits": 4, "signed": True, "shape": [2]}}}, "lacks c"),
        ({"codes": {"a/kernel": {"bits": 9, "signed": True, "shape": [315]}}}, "a/kernel by no"),
        ({"codes": {"a/kernel": {"bits": 4, "signed": 1, "shape": [315]}}}, "a/kernel by no"),
        ({"codes": {"a/kernel": {"bits": 4, "signed": True, "shape": [-1]}}}, "a/kernel by no"),
        ({"codes": {"a/kernel": {"bits": 4, "signed": True, "shape": [9, 9]}}}, "have 41 of uint8"),
    ],
)
def test_a_manifest_that_says_other_things(folder, change, message):
    rewritten(folder, change)
    if message is None:
        read_archive(folder)
        return
    with pytest.raises(PackedModelError, match=message):
        read_archive(folder)


@pytest.mark.parametrize("files", [5, [WEIGHTS], {WEIGHTS: 5}, {WEIGHTS: {}}, None])
def test_a_manifest_that_lists_no_files(folder, files):
    content = read_manifest(folder / MANIFEST) | {"files": files}
    content["checksum"] = _checksum(content)
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(PackedModelError, match=r"nothing else|no files|expected None"):
        read_archive(folder)


def test_files_elsewhere_are_not_read(folder):
    content = read_manifest(folder / MANIFEST)
    content["files"]["../secret"] = content["files"][WEIGHTS]
    content["checksum"] = _checksum(content)
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(PackedModelError, match="nothing else"):
        read_archive(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a/kernel_step", np.array([0.1, 0.0], np.float32), "not positive"),
        ("a/kernel_step", np.array([0.1, -1.0], np.float32), "not positive"),
        ("a/kernel_step", np.array([np.nan], np.float32), "NaN"),
        ("b/bias", np.array([np.inf], np.float32), "infinity"),
        ("b/bias", np.zeros(2, np.float64), "float64"),
    ],
)
def test_numbers_that_are_no_models(folder, tmp_path, name, value, message):
    with pytest.raises(ValueError, match=rf"{name} .*{message}"):
        write_archive(tmp_path / "new", {name: value}, {})
    assert not (tmp_path / "new").exists()
    rewritten(folder, state=load_file(folder / WEIGHTS) | {name: value})
    with pytest.raises(PackedModelError, match=rf"{name} .*{message}"):
        read_archive(folder)


def test_nothing_else_is_replaced(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        write_archive(tmp_path / "notes", arrays(), {})
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["a.txt"]
    (tmp_path / "model").mkdir()
    write_manifest(tmp_path / "model" / MANIFEST, tmp_path / "model", {"kind": "params"})
    with pytest.raises(FileExistsError):
        write_archive(tmp_path / "model", arrays(), {})
