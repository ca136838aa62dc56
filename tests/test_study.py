"""The studies' bookkeeping: rows kept one by one, shared by commands that run at once; no run."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import pathlib
import shutil
import sys
import threading

import choices_shapes
import distill_shapes
import jax
import main_shapes
import numpy as np
import positives_shapes
import pytest
import schedules_shapes
import study
import study_pictures
import tiny

from aqdetr_jax.checkpoint.model_folder import load_model, save_model
from aqdetr_jax.checkpoint.steps import Checkpoints
from aqdetr_jax.training.experiment import load_experiment

ROWS = tuple(study.Row(f"row{i}", "shapes_quickstart", facts={"seed": i}) for i in range(6))


@pytest.fixture
def started(tmp_path, monkeypatch):
    """``started(*words)`` runs the study of ``ROWS``; what was made, in order, is its attribute."""
    made = []
    monkeypatch.setattr(study, "MANIFESTS", tmp_path / "manifests")
    monkeypatch.setattr(study.signal, "signal", lambda *_: None)  # not of the main thread only

    def run(*words, rows=ROWS):
        argv = ["study", f"--work={tmp_path}", f"--out={tmp_path / 'out.json'}", *words]
        monkeypatch.setattr(sys, "argv", argv)
        study.run_study("rows", rows, "rows")
        file = tmp_path / "out.json"
        return json.loads(file.read_text())["rows"] if file.is_file() else []

    def make(row, folder, overrides, child):
        made.append(row.name)
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "manifest.json").write_text("{}")
        (folder / "manifest.json").write_text(f"{row.name} of {folder}")
        return {"name": row.name, "AP": 0.5}

    monkeypatch.setattr(study, "made_row", make)
    run.made = made
    return run


def test_rows_are_made_once_and_kept_with_their_manifest(started, tmp_path):
    assert [row["name"] for row in started("--only=row3")] == ["row3"]
    assert len(started()) == len(ROWS)
    assert started.made == ["row3", *(row.name for row in ROWS if row.name != "row3")]
    for row in ROWS:
        assert (tmp_path / "manifests" / "rows" / f"{row.name}.json").read_text() == (
            f"{row.name} of DIR/{row.name}"
        )


def test_a_manifest_names_no_folder_of_this_machine(started, tmp_path, monkeypatch):
    def make(row, folder, overrides, child):
        folder.mkdir()
        (folder / "manifest.json").write_text(f"{folder} {overrides}")
        return {"name": row.name, "AP": 0.5}

    monkeypatch.setattr(study, "made_row", make)
    started("--only=row1", f"data.root={tmp_path}x/set", "seed=1")
    kept = (tmp_path / "manifests" / "rows" / "row1.json").read_text()
    assert kept == "DIR/row1 ('data.root=FOLDER', 'seed=1')"


def test_a_rows_time_is_of_all_its_starts(tmp_path):
    lines = [{"step": 20, "time/step": 5.0, "time/start": 2.0}, {"step": 20, "eval/AP": 0.5}]
    lines += [{"step": 40, "time/step": 4.0, "time/start": 1.5, "time": 9.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    assert study.run_seconds(tmp_path) == 12.5
    assert study.run_seconds(tmp_path / "calibrated") == 0


def test_of_a_calibrated_row_the_models_description_is_kept(started, tmp_path, monkeypatch):
    def make(row, folder, overrides, child):
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "metadata.json").write_text("description")
        return {"name": row.name, "AP": 0.5}

    monkeypatch.setattr(study, "made_row", make)
    started("--only=row1")
    assert (tmp_path / "manifests" / "rows" / "row1.json").read_text() == "description"


def test_a_study_says_what_is_done(started, capsys):
    started("--only=row2")
    started("--list")
    said = capsys.readouterr().out.splitlines()
    assert said.count("missing  row1") == 1
    assert said.count("done     row2") == 1
    assert started.made == ["row2"]


def test_two_commands_share_the_rows(started, monkeypatch):
    both = threading.Barrier(2)
    make = study.made_row

    def at_once(*arguments):
        if arguments[0].name in ("row0", "row1"):
            both.wait(60)  # each of the two has one in hand
        return make(*arguments)

    monkeypatch.setattr(study, "made_row", at_once)
    kept = []
    commands = [threading.Thread(target=lambda: kept.append(started())) for _ in range(2)]
    for command in commands:
        command.start()
    for command in commands:
        command.join()
    assert sorted(started.made) == [row.name for row in ROWS]
    assert max(len(rows) for rows in kept) == len(ROWS)


def test_a_failed_row_can_be_made_again(started, monkeypatch):
    make = study.made_row

    def fails(*_):
        raise SystemExit("broken")

    monkeypatch.setattr(study, "made_row", fails)
    with pytest.raises(SystemExit, match="broken"):
        started()
    monkeypatch.setattr(study, "made_row", make)
    assert len(started()) == len(ROWS)


def test_pictures_show_means_and_losses_by_class():
    def row(method, bits, seed, ap, star):
        facts = {"family": "detr", "method": method, "bits": bits, "seed": seed}
        return {
            "facts": facts,
            "AP": ap,
            "packed_bytes": bits * 1024,
            "per_class": {"star": {"AP": star}, "ring": {"AP": 0.5}},
        }

    rows = [
        row("float", 32, 0, 0.5, 0.6),
        *(row("lsq", bits, seed, bits / 10 + seed / 50, 0.4) for bits in (4, 2) for seed in (0, 1)),
    ]
    found = study_pictures.points(rows, "detr", "lsq")
    assert [point[0] for point in found] == [4, 2]
    assert [point[1] for point in found] == pytest.approx([41.0, 21.0])
    assert [point[2] for point in found] == pytest.approx([2**0.5, 2**0.5])
    assert [point[3] for point in found] == [4, 2]
    axes = study_pictures.main_figure(rows).axes
    assert len(axes) == 4
    assert list(axes[0].lines[0].get_ydata()) == pytest.approx([41.0, 21.0])
    bars = study_pictures.classes_figure(rows).axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx([20.0, 0.0])


def test_time_is_of_the_steps_that_a_row_takes():
    def row(method, ap, words="", family="detr"):
        command = f"aqdetr train --config=configs/shapes_quickstart.py:lsq --workdir=DIR{words}"
        facts = {"family": family, "method": method, "bits": 4, "seed": 0}
        return {"facts": facts, "AP": ap, "command": command}

    rows = [
        row("lsq", 0.3),
        row("lsq", 0.4),
        row("lsq_longer", 0.5, " --config.train.steps=1800 --config.seed=0"),
        {"facts": {"family": "detr", "method": "float", "bits": 32}, "AP": 0.6},
    ]
    cost = {"families": {"detr": {"methods": {"lsq": {"median_seconds": 0.5}}}}}
    assert study_pictures.minutes(rows[0], cost) == pytest.approx(1200 * 0.5 / 60)
    (line, _) = study_pictures.time_figure(rows, cost).axes[0].containers[0][:2]
    np.testing.assert_allclose(line.get_xydata(), [(10, 35), (15, 50)])


TEACHER = study.Row("teacher", "shapes_teacher:queries100")
STUDENT = study.Row("student", "shapes_w4a4:queries100-lsq", start="teacher")


def test_what_a_row_starts_from_is_made_first(started, tmp_path):
    assert len(started("--only=student", rows=(STUDENT, TEACHER))) == 2
    assert started.made == ["teacher", "student"]
    words = STUDENT.command(tmp_path / "student", ("seed=1",))
    assert words[3:] == [f"--config.init_from={tmp_path / 'teacher'}", "--config.seed=1"]
    assert TEACHER.command("DIR")[3:] == []
    taught = dataclasses.replace(STUDENT, name="taught", start="", teacher="teacher")
    words = taught.command(tmp_path / "taught")
    assert words[3:] == [f"--config.distill.teacher={tmp_path / 'teacher'}"]
    started(rows=(taught, TEACHER))
    assert started.made == ["teacher", "student", "taught"]


def test_a_row_waits_for_what_another_command_makes(started, tmp_path, capsys):
    (tmp_path / "locks").mkdir()
    with contextlib.closing(study.lock_file(tmp_path / "locks" / "teacher")):
        assert started(rows=(TEACHER, STUDENT)) == []
    assert "student needs teacher, not done yet: left out" in capsys.readouterr().out


def test_a_run_that_is_gone_is_made_again_only_for_what_starts_from_it(started, tmp_path):
    started(rows=(TEACHER,))
    shutil.rmtree(tmp_path / "teacher")
    started(rows=(TEACHER,))
    assert started.made == ["teacher"]
    assert len(started(rows=(TEACHER, STUDENT))) == 2
    assert started.made == ["teacher", "teacher", "student"]
    shutil.rmtree(tmp_path / "teacher")
    started(rows=(TEACHER, STUDENT))
    assert started.made == ["teacher", "teacher", "student"]


def test_a_row_of_another_study_is_taken_from_it(started, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    shared = dataclasses.replace(ROWS[0], study="other", facts={"choice": "plain"})
    assert started(rows=(shared,)) == []
    assert "row0 is experiments/other.py's, not done yet: left out" in capsys.readouterr().out
    row = {"name": "row0", "facts": {"seed": 0}, "AP": 0.25}
    (tmp_path / "other.json").write_text(json.dumps({"rows": [row]}))
    taken = {"name": "row0", "facts": {"choice": "plain"}, "AP": 0.25, "study": "other"}
    assert started(rows=(shared,)) == [taken]
    assert started.made == []
    # What starts from it needs its run.
    raw = study.Row("raw", "shapes_quickstart", "last", start="row0")
    started(rows=(shared, raw))
    assert started.made == ["row0", "raw"]


def test_the_last_parameters_of_a_run_in_place_of_their_average(tmp_path):
    state = {"params": {"auxiliary_queries": np.ones(2)}, "ema": {}, "batch_stats": {}}
    bundle = tiny.bundle(drawn=False)
    state["params"] |= jax.tree.map(lambda x: x + 1, bundle.variables["params"])
    save_model(tmp_path / "run" / "model", bundle)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(3, state, wait=True)
    row = study.Row("raw", "shapes_w4a4", "last", start="run")
    study.last_model(tmp_path / "run", tmp_path / "raw" / "last")
    assert row.command(tmp_path / "raw")[2:] == [
        f"--model={tmp_path / 'raw' / 'last'}",
        f"--out={tmp_path / 'raw'}",
    ]
    found = load_model(tmp_path / "raw" / "last")
    jax.tree.map(
        lambda mine, theirs: np.testing.assert_array_equal(mine, theirs + 1),
        found.variables["params"],
        bundle.variables["params"],
    )


@pytest.mark.parametrize(
    ("other", "shared"),
    [(schedules_shapes, 2), (distill_shapes, 2), (positives_shapes, 2), (choices_shapes, 3)],
)
def test_runs_of_two_studies_are_of_one_configuration(other, shared):
    main = {row.name: row for row in main_shapes.rows()}
    rows = [row for row in other.rows() if row.name in main]
    assert len(rows) == shared
    for row in rows:
        mine = main[row.name]
        configs = [load_experiment(row.config, row.overrides) for row in (row, mine)]
        # Variants have names; what they are is what counts.
        assert dataclasses.replace(configs[0], name="") == dataclasses.replace(configs[1], name="")
        assert row.judge == mine.judge
        assert row.study == "main_shapes"


def test_a_row_is_judged_on_the_split_of_its_study(tmp_path, monkeypatch):
    row = study.Row("row", "shapes_quickstart:lsq", judge=("data.eval_split=test",))
    commands = []

    class Child:
        def run(self, command):
            commands.append(command)
            word = next(w for w in command if w.startswith(("--workdir=", "--out=")))
            folder = pathlib.Path(word.partition("=")[2])
            folder.mkdir(parents=True)
            made = {"AP": 0.5, "config": "run", "seed": 3, "commit": "a"}
            if command[0] == "eval":
                made = {"AP": 0.4, "config": "eval", "seed": 0, "commit": "b"}
            (folder / "results.json").write_text(json.dumps(made))

    read = []

    class Found:
        results = ()

        @staticmethod
        def read(folder, seconds):
            read.append(folder)
            return Found

    monkeypatch.setattr(study, "Detections", Found)
    monkeypatch.setattr(study, "bootstrap_ap", lambda truth, results, draws: np.full(3, 0.4))
    made = study.made_row(row, tmp_path / "row", ("data.num_eval=4",), Child())
    assert [command[0] for command in commands] == ["train", "eval"]
    assert "--config.data.eval_split=test" not in commands[0]
    assert commands[1][-2:] == ["--config.data.eval_split=test", "--config.data.num_eval=4"]
    assert read == [tmp_path / "row" / "judged"]
    assert (made["AP"], made["own_AP"]) == (0.4, 0.5)
    assert (made["config"], made["seed"], made["commit"]) == ("run", 3, "a")
    assert made["judge"].startswith("aqdetr eval")
    assert "DIR/judged" in made["judge"]


def test_a_pretraining_has_no_numbers_but_its_own_commit(tmp_path):
    class Child:
        def run(self, command):
            assert command[0] == "pretrain"
            starts = [{"commit": "a"}, {"commit": "b"}]
            (tmp_path / "manifest.json").write_text(json.dumps({"starts": starts}))
            lines = [{"step": 1, "time/step": 2.0}, {"step": 2, "time/step": 3.0}]
            (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))

    row = study.Row("backbone", "bccd:pretrain", "pretrain", facts={"method": "pretrain"})
    made = study.made_row(row, tmp_path, (), Child())
    assert made["facts"] == {"method": "pretrain"}
    assert (made["commit"], made["run_seconds"]) == ("b", 5.0)
    assert "AP" not in made


STUDIES = sorted(
    path.stem
    for path in pathlib.Path(study.__file__).parent.glob("*.py")
    if path.stem != "study" and "run_study(" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", STUDIES)
def test_every_row_of_a_study_loads(name):
    rows = list(importlib.import_module(name).rows())
    for row in rows:
        words = row.command("runs/any")
        assert {*row.before} <= {other.name for other in rows}, row.name
        assert [other for other in rows if other.name == row.name and other != row] == []
        load_experiment(
            row.config,
            tuple(w.removeprefix("--config.") for w in words if w.startswith("--config.")),
        )
