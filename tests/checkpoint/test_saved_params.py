"""Parameters for inference: one folder, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_states import assert_bit_equal, make_state

from aqdetr_jax.checkpoint.params import load_params, save_params
from aqdetr_jax.checkpoint.steps import Checkpoints
from aqdetr_jax.checkpoint.store import CheckpointError
from aqdetr_jax.training.workdir import prepare_workdir
from aqdetr_jax.trees import check_parameters


@pytest.fixture
def params_folder(tmp_path) -> Path:
    save_params(tmp_path / "final", make_state(3).params, {"classes": ["a", "b"], "ap": 0.25})
    return tmp_path / "final"


def test_params_round_trip(params_folder):
    params, metadata = load_params(params_folder)
    expected = make_state(3).params
    assert metadata == {"classes": ["a", "b"], "ap": 0.25}
    assert_bit_equal(params, jax.tree.map(np.asarray, expected))
    check_parameters(params, expected, source="final")
    # Saving again replaces the folder, and leaves nothing beside it.
    save_params(params_folder, make_state(4).params, {})
    assert_bit_equal(load_params(params_folder)[0], jax.tree.map(np.asarray, make_state(4).params))
    assert [path.name for path in params_folder.parent.iterdir()] == ["final"]


def test_a_failed_save_leaves_nothing(params_folder):
    with pytest.raises(TypeError, match="which has no JSON form"):
        save_params(params_folder, make_state(4).params, {"classes": object()})
    assert_bit_equal(load_params(params_folder)[0], jax.tree.map(np.asarray, make_state(3).params))
    assert [path.name for path in params_folder.parent.iterdir()] == ["final"]


def test_params_say_nothing_of_where_they_were_saved(params_folder):
    notes = list(params_folder.rglob("commit_success.txt"))
    assert [note.read_text() for note in notes] == ["committed\n"]
    where = str(params_folder.parent).encode()
    for file in params_folder.rglob("*"):
        assert not file.is_file() or where not in file.read_bytes(), file


def test_params_with_slashes_and_dots_in_names(tmp_path):
    tree = {"a/b": np.ones(2), "a": {"b": np.zeros(3)}, "c.d": np.int32(4)}
    save_params(tmp_path / "p", tree, {})
    loaded, _ = load_params(tmp_path / "p")
    assert loaded["a/b"].shape == (2,)
    assert loaded["a"]["b"].shape == (3,)
    assert loaded["c.d"] == 4


def test_damaged_params_are_refused(params_folder):
    metadata = params_folder / "metadata.json"
    metadata.write_text(json.dumps({"classes": ["b", "a"], "ap": 0.25}))
    with pytest.raises(CheckpointError, match=r"metadata\.json"):
        load_params(params_folder)


def test_wrong_folders_say_what_they_are(params_folder, tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, make_state(1))
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nothing"):
        load_params(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="It holds training checkpoints"):
        load_params(tmp_path / "checkpoints")
    with pytest.raises(FileNotFoundError, match="Model folders inside it: final"):
        load_params(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"should hold manifest\.json"):
        load_params(tmp_path / "empty")
    (tmp_path / "empty" / "detr.pth").write_bytes(b"weights")
    with pytest.raises(FileNotFoundError, match=r"is not a model folder.* aqdetr convert makes"):
        load_params(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"detr\.pth is not .* aqdetr convert makes"):
        load_params(tmp_path / "empty" / "detr.pth")


def test_only_models_and_empty_folders_are_replaced(tmp_path):
    arrays = {"a": np.ones(1)}
    (tmp_path / "empty").mkdir()
    save_params(tmp_path / "empty", arrays, {"name": "first"})
    save_params(tmp_path / "empty", arrays, {"name": "second"})
    assert load_params(tmp_path / "empty")[1] == {"name": "second"}
    run = tmp_path / "run"  # its manifest is another kind's
    with prepare_workdir(run, {}, dataset={}):
        (run / "checkpoints").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    for path in (run, tmp_path / "other", tmp_path / "other" / "thesis.tex"):
        with pytest.raises(FileExistsError, match="is not a model folder, which alone is repl"):
            save_params(path, arrays, {})
    assert sorted(tmp_path.rglob("*")) == before
