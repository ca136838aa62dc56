from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
import tiny

from aqdetr_jax.checkpoint.model_folder import model_checksum, save_model
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.training import places
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


def files(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in ("config.json", "manifest.json")}


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
    with pytest.raises(WorkdirError, match="trained on other data"):
        prepare_workdir(tmp_path, CONFIG, dataset="e")


# --- the same data and models at another place ----------------------------------------------------

PLACES = {
    "init_from": "a/teacher",
    "distill": {"teacher": ""},
    "data": {"root": "", "train_images": "a/images", "train_annotations": "a/train.json"},
}
MOVED = {
    "init_from": "b/teacher",
    "distill": {"teacher": ""},
    "data": {"root": "", "train_images": "b/images", "train_annotations": "b/train.json"},
}
DATA = {"train": "1f", "eval": "2e"}


def prepared(path, config, dataset=DATA, teacher="abc", **options):
    models = {"init_from": teacher}
    with prepare_workdir(
        path, config, dataset=dataset, models=models, teacher="init_from", **options
    ) as folder:
        return folder.changes


def test_the_same_data_and_models_at_another_place_are_the_same_run(tmp_path):
    prepared(tmp_path, PLACES)
    assert manifest(tmp_path)["models"] == {"init_from": "abc"}
    changes = prepared(tmp_path, MOVED)
    assert changes == [
        "init_from: 'a/teacher' -> 'b/teacher'",
        "data.train_images: 'a/images' -> 'b/images'",
        "data.train_annotations: 'a/train.json' -> 'b/train.json'",
    ]
    assert json.loads((tmp_path / "config.json").read_text()) == MOVED
    assert manifest(tmp_path)["starts"][1]["changes"] == changes
    assert prepared(tmp_path, MOVED) == []


def test_other_data_at_another_place_are_refused(tmp_path):
    prepared(tmp_path, PLACES)
    before = files(tmp_path)
    with pytest.raises(
        WorkdirError,
        match=r"other data at another place \(data\.train_images: 'a/images' -> 'b/images'; ",
    ):
        prepared(tmp_path, MOVED, {"train": "1f", "eval": "33"})
    other = {**PLACES, "data": {**MOVED["data"], "buckets": 3}}
    with pytest.raises(WorkdirError, match=r":\n  data\.buckets: .absent. -> 3\n"):
        prepared(tmp_path, other)
    assert files(tmp_path) == before


def test_another_teacher_is_refused_wherever_it_lies(tmp_path):
    prepared(tmp_path, PLACES)
    with pytest.raises(WorkdirError, match="init_from: 'a/teacher' -> 'b/teacher'"):
        prepared(tmp_path, MOVED, teacher="abd")
    with pytest.raises(WorkdirError, match="init_from: 'a/teacher' -> 'b/teacher'"):
        prepared(tmp_path, MOVED, teacher=None)
    with pytest.raises(WorkdirError, match=r"another teacher than .* config\.init_from"):
        prepared(tmp_path, PLACES, teacher="abd")
    prepared(tmp_path, PLACES, teacher=None)  # that it is not there is said when it is read


def test_a_model_that_is_not_read_again_may_have_changed(tmp_path):
    models = {"init_from": "abc"}
    prepare_workdir(tmp_path, PLACES, dataset=DATA, models=models).release()
    prepare_workdir(tmp_path, PLACES, dataset=DATA, models={"init_from": "x"}).release()
    with pytest.raises(WorkdirError, match="init_from: 'a/teacher' -> 'b/teacher'"):
        prepare_workdir(tmp_path, MOVED, dataset=DATA, models={"init_from": "x"})


def test_paths_stay_where_nothing_is_recorded_of_what_they_lead_to(tmp_path):
    """As in a folder whose manifest was lost."""
    prepared(tmp_path, PLACES)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(WorkdirError, match=r"init_from: .*\n  data\.train_images: .*\n  data"):
        prepared(tmp_path, MOVED)


def test_a_model_has_one_checksum_wherever_it_lies(tiny_teacher, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_teacher, run / "model")
    checksum = model_checksum(tiny_teacher)
    assert checksum == model_checksum(run) == model_checksum(run / "model")
    assert checksum not in (None, model_checksum("packaged:shapes_teacher"))
    assert model_checksum(tmp_path / "nothing") is model_checksum("packaged:nothing") is None
    save_model(run / "model", tiny.bundle(seed=1))
    assert model_checksum(run) not in (None, checksum)


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

    monkeypatch.setattr(places, "_lock_descriptor", refuse)
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


def test_a_run_of_another_version_has_no_old_values_to_use(tmp_path):
    """A key that came, or went, is no value that a user could give."""
    prepare_workdir(tmp_path, CONFIG).release()
    for config, change in (
        (changed(train__new=1), r"train\.new: \(absent\) -> 1"),
        ({"seed": 7, "train": {"steps": 10}, "eval": {"every": 2}}, r"\[4, 5\] -> \(absent\)"),
    ):
        with pytest.raises(WorkdirError, match=f"{change}\nIt goes on with that version") as caught:
            prepare_workdir(tmp_path, config)
        assert f"commit {git_commit()}" in str(caught.value)
        assert "Use the old values" not in str(caught.value)


def test_lock_keeps_a_second_process_out_and_dies_with_its_owner(tmp_path):
    source = (
        "import sys\nfrom pathlib import Path\n"
        "from aqdetr_jax.training.places import lock_file\n"
        "kept = lock_file(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", source, str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
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
    (tmp_path / "w" / "manifest.json").unlink()
    (tmp_path / "w" / "config.json").write_text("{")
    with pytest.raises(WorkdirError, match=r"cannot resume: .*config\.json"):
        prepare_workdir(tmp_path / "w", CONFIG)
    (tmp_path / "f").write_text("")
    with pytest.raises(WorkdirError, match="is a file"):
        prepare_workdir(tmp_path / "f", CONFIG)
