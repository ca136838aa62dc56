"""A run done again from its manifest, and what differs."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny

from aqdetr_jax.cli import main
from aqdetr_jax.training import loop
from aqdetr_jax.training.experiment import pretraining
from aqdetr_jax.training.rerun import compare

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_compile):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("rerun") / "run"
    loop.train(pretraining(tiny.FLOAT, ()), folder)
    return folder


@pytest.fixture(scope="module")
def again(run, tmp_path_factory, quick_compile):
    """(exit status, folder of the run that was done again)."""
    folder = tmp_path_factory.mktemp("again") / "run"
    return main(["rerun", str(run / "manifest.json"), f"--workdir={folder}"]), folder


def changed(path, **values):
    """Changes a manifest."""
    content = json.loads(path.read_text())
    for keys, value in values.items():
        node, *rest = content, *keys.split("__")
        for key in rest[:-1]:
            node = node[int(key) if isinstance(node, list) else key]
        node[rest[-1]] = value
    path.write_text(json.dumps(content))


def test_a_run_is_repeated_to_the_last_bit(run, again):
    status, folder = again
    assert status == 0
    made = json.loads((folder / "rerun.json").read_text())
    assert made["equal"]
    assert made["model"]
    assert (made["first_step"], made["steps_compared"], made["environment"]) == (None, 6, {})
    before = json.loads((folder / "manifest.json").read_text())
    assert made["run"]["seed"] == before["config"]["seed"]
    assert made["run"]["AP"] == before["result"]["results"].get("AP")
    assert made["run"]["starts"] == 1


def test_what_differs_is_named(run, again, tmp_path):
    _, folder = again
    other = shutil.copytree(run, tmp_path / "run")
    changed(other / "manifest.json", result__model="0" * 64, result__results={"AP": 0.5})
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    rows[3]["loss"] += 1e-6
    rows[2]["images_per_second"] *= 2  # of the machine
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = compare(other / "manifest.json", folder)
    assert not made["equal"]
    assert not made["model"]
    assert made["results"] == {"AP": [0.5, None]}
    assert (made["first_step"], made["metric"]) == (4, "loss")
    assert made["weights"]["arrays"] == 0  # the manifest lies, the model does not


def test_a_manifest_alone_is_enough(run, again, tmp_path, capsys):
    _, folder = again
    alone = tmp_path / "manifest.json"
    shutil.copy(run / "manifest.json", alone)
    changed(alone, starts__0__devices=8, result__model="0" * 64)
    target = shutil.copytree(folder, tmp_path / "run")  # finished already: only compared
    assert main(["rerun", str(alone), f"--workdir={target}"]) == 1
    said = capsys.readouterr().out
    assert "devices was 8, is 1" in said
    assert "model: differs" in said
    assert "another here: devices" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset__train": "other"}, "the run's data were {'train': 'other'"),
        ({"config__train__steps": "six"}, "config.train.steps"),
    ],
)
def test_what_cannot_be_repeated_is_refused_before_it_is_tried(
    run, tmp_path, capsys, change, message
):
    file = tmp_path / "manifest.json"
    shutil.copy(run / "manifest.json", file)
    changed(file, **change)
    assert main(["rerun", str(file), f"--workdir={tmp_path / 'run'}"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_not_finished_has_nothing_to_compare(run, tmp_path, capsys):
    file = tmp_path / "manifest.json"
    content = json.loads((run / "manifest.json").read_text())
    del content["result"]
    file.write_text(json.dumps(content))
    assert main(["rerun", str(file), f"--workdir={tmp_path / 'run'}"]) == 1
    assert "lacks result: it is no manifest of a finished run" in capsys.readouterr().err
