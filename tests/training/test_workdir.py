from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest

from aqdetr_jax.provenance import git_commit
from aqdetr_jax.training import workdir as workdir_module
from aqdetr_jax.training.config_tools import load_config_file
from aqdetr_jax.training.workdir import WorkdirError, prepare_workdir

CONFIG = ml_collections.ConfigDict(
    {"seed": 7, "train": {"steps": 10, "size": (4, 5)}, "eval": {"every": 2}}
)


def changed(**values):
    config = ml_collections.ConfigDict(CONFIG.to_dict())
    for key, value in values.items():
        group, name = key.split("__")
        config[group][name] = value
    return config


def manifest(path: Path) -> dict:
    return json.loads((path / "manifest.json").read_text())


def test_new_folder_has_configuration_and_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/opt/bin/aqdetr", "train", "--workdir=w"])
    with prepare_workdir(tmp_path / "a" / "w", CONFIG, dataset={"sha256": "abc"}) as prepared:
        assert not prepared.resumed
        assert prepared.changes == []
        path = prepared.path
    written = load_config_file(str(path / "config.json"))
    assert written.to_dict() == {
        "seed": 7,
        "train": {"steps": 10, "size": (4, 5)},
        "eval": {"every": 2},
    }
    content = manifest(path)
    assert content["seed"] == 7
    assert content["dataset"] == {"sha256": "abc"}
    (start,) = content["starts"]
    assert start["command"] == ["aqdetr", "train", "--workdir=w"]
    assert start["versions"]["jax"] == jax.__version__
    assert start["versions"]["numpy"] == np.__version__
    assert {"python", "flax", "optax", "orbax-checkpoint", "aqdetr-jax"} <= set(start["versions"])
    assert (start["devices"], start["processes"]) == (1, 1)
    assert start["commit"] == git_commit()
    assert str(Path(__file__).resolve().parents[2]) not in json.dumps(content)


def test_same_command_again_resumes(tmp_path):
    prepare_workdir(tmp_path, CONFIG, dataset="d").release()
    with prepare_workdir(tmp_path, CONFIG, dataset="d") as prepared:
        assert prepared.resumed
        assert prepared.changes == []
    assert len(manifest(tmp_path)["starts"]) == 2
    with pytest.raises(WorkdirError, match="already holds a run"):
        prepare_workdir(tmp_path, CONFIG, resume=False)
    with pytest.raises(WorkdirError, match="trained on other data"):
        prepare_workdir(tmp_path, CONFIG, dataset="e")


def test_before_anything_is_trained_everything_may_change(tmp_path):
    prepare_workdir(tmp_path, CONFIG, dataset="d").release()
    other = changed(train__steps=20)
    prepare_workdir(tmp_path, other, dataset="e", changeable=("*",)).release()
    assert manifest(tmp_path)["dataset"] == "e"
    with pytest.raises(WorkdirError, match="trained on other data"):
        prepare_workdir(tmp_path, other, dataset="d")


def test_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(workdir_module, "_lock_descriptor", refuse)
    with pytest.raises(WorkdirError, match=r"No locks available.*must support file locks"):
        prepare_workdir(tmp_path, CONFIG)


def test_allowed_changes_are_recorded(tmp_path):
    prepare_workdir(tmp_path, CONFIG).release()
    with prepare_workdir(tmp_path, changed(train__steps=20, eval__every=5)) as prepared:
        assert prepared.resumed
        assert prepared.changes == ["eval.every: 2 -> 5", "train.steps: 10 -> 20"]
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 20
    assert manifest(tmp_path)["starts"][1]["changes"] == prepared.changes


def test_other_configuration_is_refused_with_its_differences(tmp_path):
    prepare_workdir(tmp_path, CONFIG).release()
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(WorkdirError) as caught:
        prepare_workdir(tmp_path, changed(train__size=(4, 6), train__steps=20, eval__new=1))
    text = str(caught.value)
    assert "another configuration:\n  train.size: [4, 5] -> [4, 6]\nUse the old values" in text
    assert "train.steps:" not in text
    assert (tmp_path / "config.json").read_bytes() == before
    assert len(manifest(tmp_path)["starts"]) == 1
    # The refused start has let go of the lock.
    prepare_workdir(tmp_path, CONFIG).release()
    with pytest.raises(WorkdirError, match=r"train\.steps: 10 -> 20"):
        prepare_workdir(tmp_path, changed(train__steps=20), changeable=())


def test_lock_keeps_a_second_process_out_and_dies_with_its_owner(tmp_path):
    source = (
        "import sys, time\nfrom pathlib import Path\n"
        "from aqdetr_jax.training.workdir import _lock\n"
        "_lock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", source, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(WorkdirError) as caught:
            prepare_workdir(tmp_path, CONFIG)
        assert f"is using the work directory {tmp_path} (process {child.pid} on " in str(
            caught.value
        )
    finally:
        child.kill()
        child.communicate()
    with prepare_workdir(tmp_path, CONFIG), pytest.raises(WorkdirError, match="another process"):
        prepare_workdir(tmp_path, CONFIG)
    prepare_workdir(tmp_path, CONFIG).release()


def test_damaged_files_and_a_file_in_place_of_the_folder(tmp_path):
    prepare_workdir(tmp_path / "w", CONFIG).release()
    (tmp_path / "w" / "manifest.json").write_text("{}")
    with pytest.raises(WorkdirError, match="not a run's manifest"):
        prepare_workdir(tmp_path / "w", CONFIG)
    (tmp_path / "w" / "manifest.json").write_text("{")
    with pytest.raises(WorkdirError, match=r"cannot resume: .*manifest\.json"):
        prepare_workdir(tmp_path / "w", CONFIG)
    (tmp_path / "w" / "config.json").write_text("{")
    with pytest.raises(WorkdirError, match=r"cannot resume: .*config\.json"):
        prepare_workdir(tmp_path / "w", CONFIG)
    (tmp_path / "f").write_text("")
    with pytest.raises(WorkdirError, match="is a file"):
        prepare_workdir(tmp_path / "f", CONFIG)
