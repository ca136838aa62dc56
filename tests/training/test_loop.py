from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from aqdetr_jax.checkpoint.model_folder import ModelBundle, load_model, save_model
from aqdetr_jax.checkpoint.steps import Checkpoints
from aqdetr_jax.cli import EXIT_STOPPED, main
from aqdetr_jax.data.coco_writer import write_coco_folder
from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.evaluation.evaluator import Evaluator
from aqdetr_jax.losses import matching
from aqdetr_jax.parallel.mesh import AXES
from aqdetr_jax.training import assemble, initial, loop, setup
from aqdetr_jax.training.experiment import load_experiment
from aqdetr_jax.training.metrics import CLOCK
from aqdetr_jax.training.notices import TrainingDivergedError
from aqdetr_jax.training.state import TrainState
from aqdetr_jax.training.workdir import WorkdirError
from aqdetr_jax.viz.records import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compile")


def final_state(folder: Path) -> dict:
    with Checkpoints(folder / "checkpoints") as checkpoints:
        tree, step = checkpoints.restore()
    assert step == tiny.FLOAT.train.steps
    return tree


# --- stopping and going on -----------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@dataclasses.dataclass
class Watch:
    """What the run of ``straight`` did, seen from outside.

    Attributes:
      axes: names of the mesh axes that each trace of the matcher saw.
      teacher: the teacher that the loop loaded.
      before: its checksum, when it was loaded.
      used: checksum of the teacher's variables at each step.
      source: files of ``init_from`` before the run.
    """

    axes: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    teacher: ModelBundle | None = None
    before: str = ""
    used: list[str] = dataclasses.field(default_factory=list)
    source: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        solve, load = matching.assign_sharded, setup.load_teacher
        step = loop.RunClock.step

        def assign_sharded(*arguments, **options):
            self.axes.append(jax.sharding.get_abstract_mesh().axis_names)
            return solve(*arguments, **options)

        def load_teacher(config):
            self.teacher = load(config)
            self.before = tiny.digest(self.teacher.variables)
            return self.teacher

        def watched(clock, program, state, teacher_variables, batch):
            self.used.append(tiny.digest(teacher_variables))
            return step(clock, program, state, teacher_variables, batch)

        patch.setattr(matching, "assign_sharded", assign_sharded)
        patch.setattr(loop.setup, "load_teacher", load_teacher)
        patch.setattr(loop.RunClock, "step", watched)


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_teacher, quick_compile, watch):
    """(folder, configuration file, result) of a student run that was never interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    config = tiny.changed(tiny.student(tiny_teacher), "train", eval_every=4)
    file = tiny.write_config(config, folder / "student.json")
    watch.source = files(tiny_teacher)
    with pytest.MonkeyPatch.context() as patch:
        watch.install(patch)
        return folder / "run", file, loop.train(config, folder / "run")


def test_matcher_is_traced_under_the_mesh(straight, watch):
    """Without ``jax.set_mesh`` it would solve the whole batch on every device, and say nothing."""
    assert watch.axes
    assert set(watch.axes) == {AXES}


def test_teacher_is_read_and_never_written(straight, watch, tiny_teacher):
    assert watch.source
    assert files(tiny_teacher) == watch.source
    assert watch.before == tiny.digest(load_model(tiny_teacher).variables)
    assert tiny.digest(watch.teacher.variables) == watch.before
    assert watch.used == [watch.before] * tiny.FLOAT.train.steps
    # And a run does train: what it keeps is another model.
    assert tiny.digest(straight[2].bundle.variables) != watch.before


KILLED = """
    import os
    import signal
    import time

    from aqdetr_jax.cli import main
    from aqdetr_jax.training import loop

    placed, put_batch = 0, loop.put_batch


    def counted(batch, mesh):
        global placed
        if "boxes" in batch:  # a training step, not an evaluation
            placed += 1
            if placed == {at}:
                while not os.path.exists("{workdir}/checkpoints/step_00000002.manifest.json"):
                    time.sleep(0.02)
                os.kill(os.getpid(), signal.SIGKILL)
        return put_batch(batch, mesh)


    loop.put_batch = counted
    main(["train", "--config={config}", "--workdir={workdir}"])
"""


@pytest.mark.accelerator
def test_killed_and_stopped_and_resumed_equals_straight(
    straight, run_python, tmp_path, monkeypatch, capsys
):
    """SIGKILL in step 4, SIGTERM in step 3 after the restart, then the rest: no bit differs."""
    folder, config, result = straight
    run = tmp_path / "run"
    command = ["train", f"--config={config}", f"--workdir={run}"]
    run_python(KILLED.format(at=4, config=config, workdir=run), devices=1, expect=-9)
    assert [row["step"] for row in tiny.metrics(run)] == [1, 2, 3]
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [2]

    def no_second_start(*_, **__):
        raise AssertionError("a resumed run was initialised or calibrated again")

    monkeypatch.setattr(initial, "initial_variables", no_second_start)
    put_batch, placed = loop.put_batch, []

    def stopped(batch, mesh):
        placed.append(batch)
        signal.raise_signal(signal.SIGTERM)
        return put_batch(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", stopped)
    assert main(command) == EXIT_STOPPED == 75
    assert len(placed) == 1
    said = capsys.readouterr()
    assert re.fullmatch(r"tiny_student: \w+: \d+% .*computing steps.*", said.out.splitlines()[-1])
    error = said.err.splitlines()[-1]
    assert error.startswith("aqdetr: stopped at step 3")
    assert "run the same command to go on" in error
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the handler is gone again
    monkeypatch.setattr(loop, "put_batch", put_batch)

    # Asked to stop in the evaluation after step 4: it is not waited for, and done again.
    with monkeypatch.context() as patch:
        evaluate = Evaluator.evaluate

        def interrupted(evaluator, variables, progress):
            signal.raise_signal(signal.SIGTERM)
            return evaluate(evaluator, variables, progress)

        patch.setattr(Evaluator, "evaluate", interrupted)
        assert main(command) == EXIT_STOPPED
    assert capsys.readouterr().err.splitlines()[-1].startswith("aqdetr: stopped at step 4")
    assert [row["step"] for row in tiny.metrics(run)] == [1, 2, 3, 4]

    assert main(command) == 0
    mine, other = final_state(folder), final_state(run)
    assert set(mine) == {field.name for field in dataclasses.fields(TrainState)}
    for name in mine:
        assert tiny.digest(mine[name]) == tiny.digest(other[name]), name
    assert tiny.digest(load_model(run).variables) == tiny.digest(result.bundle.variables)

    logs = [
        [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in tiny.metrics(f)]
        for f in (folder, run)
    ]
    assert logs[0] == logs[1]
    # Each step once; evaluations after step 4 and at the end.
    assert [row["step"] for row in logs[1]] == [1, 2, 3, 4, 4, 5, 6, 6]
    blocks = [json.loads((f / "results.json").read_text()) for f in (folder, run)]
    for block in blocks:
        del block["seconds"], block["commit"]
    assert blocks[0] == blocks[1]
    starts = json.loads((run / "manifest.json").read_text())["starts"]
    assert len(starts) == 4
    read_metrics(run / "metrics.jsonl")


def test_a_run_goes_on_after_its_data_and_teacher_have_moved(
    straight, tiny_teacher, tmp_path, monkeypatch, capsys
):
    """Stopped in step 1, everything moved, the paths given anew; what is another thing is not."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    shutil.copytree(tiny_teacher, old / "teacher")
    config = load_experiment(str(straight[1]))
    for train in (True, False):
        write_coco_folder(open_dataset(config.data, train=train), old / "data")

    data = DataConfig("coco", buckets=config.data.buckets, augment=config.data.augment)
    file = tiny.write_config(dataclasses.replace(config, data=data), tmp_path / "coco.json")

    def command(folder: Path, root: str = "data") -> list[str]:
        words = [f"data.root={folder / root}", f"init_from={folder / 'teacher'}"]
        return ["train", f"--config={file}", f"--workdir={folder / 'run'}", *words]

    with monkeypatch.context() as patch:
        put_batch = loop.put_batch

        def stopped(batch, mesh):
            signal.raise_signal(signal.SIGTERM)
            return put_batch(batch, mesh)

        patch.setattr(loop, "put_batch", stopped)
        assert main(command(old)) == EXIT_STOPPED
    old.rename(new)
    capsys.readouterr()

    save_model(new / "other", tiny.bundle(seed=1))
    assert main([*command(new), f"init_from={new / 'other'}"]) == 1
    assert "\n  init_from: " in capsys.readouterr().err
    shutil.copytree(new / "data", new / "fewer")
    annotations = new / "fewer" / "annotations" / "instances_train.json"
    content = json.loads(annotations.read_text())
    content["annotations"].pop()
    annotations.write_text(json.dumps(content))
    assert main(command(new, root="fewer")) == 1
    assert "was trained on other data at another place (data.root: " in capsys.readouterr().err

    assert main(command(new)) == 0
    said = capsys.readouterr().out.splitlines()
    (line,) = [line for line in said if "changed since the last start" in line]
    for key, name in (("init_from", "teacher"), ("data.root", "data")):
        assert f"{key}: {str(old / name)!r} -> {str(new / name)!r}" in line
    assert [row["step"] for row in tiny.metrics(new / "run") if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_finished_run_is_left_alone(straight, monkeypatch, capsys):
    folder, config, result = straight
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.json") if p.name != "manifest.json"}

    def never(*_, **__):
        raise AssertionError("a finished run was taken up again")

    monkeypatch.setattr(assemble, "make_train_step", never)
    monkeypatch.setattr(loop, "Evaluator", never)
    again = loop.train(load_experiment(str(config)), folder)
    assert "this run is finished" in capsys.readouterr().out
    assert again.block == json.loads((folder / "results.json").read_text())
    assert again.detections.results == result.detections.results
    assert tiny.digest(again.bundle.variables) == tiny.digest(result.bundle.variables)
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_another_configuration_is_refused_with_its_differences(straight):
    folder, config, _ = straight
    other = load_experiment(str(config), ("optimizer.lr=0.5", "quant.policy=w2a2"))
    with pytest.raises(WorkdirError) as caught:
        loop.train(other, folder)
    assert "optimizer.lr: 0.001 -> 0.5" in str(caught.value)
    assert "quant.policy: 'w4a4' -> 'w2a2'" in str(caught.value)


def test_what_a_run_leaves_behind(straight):
    folder, _, result = straight
    report = json.loads((folder / "bit_report.json").read_text())
    assert not [row for row in report["rows"] if "auxiliary" in row["path"]]
    assert "4x4" in report["macs_by_bits"]
    assert result.bundle.config.num_auxiliary == 0
    assert "auxiliary_queries" not in result.bundle.variables["params"]
    assert result.bundle.info["results"]["AP"] == result.block["AP"]
    # What is kept is the moving average, not the last parameters.
    state = final_state(folder)
    kept = result.bundle.variables["params"]["query_embed"]
    np.testing.assert_array_equal(kept, state["ema"]["params"]["query_embed"])
    assert (kept != state["params"]["query_embed"]).any()


def test_rows_of_a_run_killed_before_its_first_checkpoint_are_not_repeated(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0.0, "loss": 9.0}\n')
    config = tiny.changed(tiny.FLOAT, "train", steps=2)
    loop.train(config, tmp_path)
    found = [row["step"] for row in tiny.metrics(tmp_path) if "loss" in row]
    assert found == [1, 2]
    assert 9.0 not in [row["loss"] for row in tiny.metrics(tmp_path) if "loss" in row]


# --- divergence ----------------------------------------------------------------------------------


def test_divergence_is_named_and_ends_the_run(tiny_teacher, tmp_path, caplog, capsys):
    bundle = load_model(tiny_teacher)
    params = jax.tree.map(np.copy, bundle.variables["params"])
    params["box_head"]["layer_2"]["bias"][0] = np.nan
    broken = dataclasses.replace(bundle, variables={**bundle.variables, "params": params})
    save_model(tmp_path / "broken", broken)
    config = dataclasses.replace(tiny.FLOAT, init_from=str(tmp_path / "broken"))
    config = tiny.changed(config, "train", abort_after=3)
    with (
        caplog.at_level(logging.WARNING, logger="aqdetr_jax"),
        pytest.raises(
            TrainingDivergedError, match=r"3 steps in a row up to step 3.*loss_bbox"
        ) as caught,
    ):
        loop.train(config, tmp_path / "run")
    messages = [r.getMessage() for r in caplog.records if "not finite" in r.getMessage()]
    assert len(messages) == 3
    assert "step 1 skipped" in messages[0]
    assert "loss_bbox" in messages[0]
    assert "image ids" in messages[0]
    found = [row for row in tiny.metrics(tmp_path / "run") if "bad_in_a_row" in row]
    assert [row["bad_in_a_row"] for row in found] == [1, 2, 3]
    assert "loss_bbox" in found[0]["nonfinite"]

    # And leaves what takes the step again, by itself.
    dump = tmp_path / "run" / "dumps" / "step_00000003"
    assert f"aqdetr replay {dump} takes the step again" in str(caught.value)
    kept = dump.rename(tmp_path / "dump")
    shutil.rmtree(tmp_path / "broken")
    capsys.readouterr()
    assert main(["replay", str(kept)]) == 0
    said = capsys.readouterr().out
    assert "step 3 of tiny: 3 steps in a row" in said
    assert re.search(r"  loss_bbox: nan \(dumped: nan\)", said)
    assert re.search(r"  loss_ce: ([\d.]+) \(dumped: \1\)", said)
    assert re.search(r"^not finite: .*loss_bbox", said, re.MULTILINE)
    assert "parameters that are no numbers: box_head/layer_2/bias" in said
    assert "images that do it by themselves: 1 (" in said
    assert said.splitlines()[-1] == "reproduced, to the last bit"
    assert main(["replay", str(tmp_path / "nowhere")]) == 1
    assert "is no dump: a run that stops" in capsys.readouterr().err
