"""A run of which nothing is on a disk: data, teacher, work directory and results in a store."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from object_store import Fault

from aqdetr_jax.checkpoint.model_folder import load_model
from aqdetr_jax.checkpoint.steps import Checkpoints
from aqdetr_jax.cli import main
from aqdetr_jax.data.coco_writer import write_coco_folder
from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.paths import as_path, files_of
from aqdetr_jax.training import loop
from aqdetr_jax.training.experiment import load_experiment
from aqdetr_jax.training.lease import FOLDER
from aqdetr_jax.viz.records import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compile")

KILLED = """
import os, sys
sys.path.insert(0, "tests")
from aqdetr_jax.cli import main
from aqdetr_jax.paths import as_path
from aqdetr_jax.training import loop
import time

placed, put_batch = 0, loop.put_batch
folder = as_path(sys.argv[2].removeprefix("--workdir="))

def counted(batch, mesh):
    global placed
    placed += "boxes" in batch
    if placed == 4:
        while not (folder / "checkpoints/step_00000002.manifest.json").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), 9)
    return put_batch(batch, mesh)

loop.put_batch = counted
main(["train", *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def place(store, tmp_path_factory, quick_compile):
    """(bucket, configuration file): data set and source model are in the bucket."""
    bucket = as_path(store.make_bucket(f"run-{os.getpid()}"))
    for train in (True, False):
        write_coco_folder(open_dataset(tiny.FLOAT.data, train=train), bucket / "data")
    tiny.save_teacher(bucket / "teacher")
    config = dataclasses.replace(
        tiny.FLOAT,
        init_from=f"{bucket}/teacher",
        model=dataclasses.replace(tiny.MODEL, decoder_layers=1),
        data=DataConfig(
            kind="coco",
            root=f"{bucket}/data",
            buckets=tiny.FLOAT.data.buckets,
            augment=tiny.FLOAT.data.augment,
        ),
        train=dataclasses.replace(
            tiny.FLOAT.train, steps=4, eval_every=4, pictures=0, profile="2:2"
        ),
    )
    file = tiny.write_config(config, tmp_path_factory.mktemp("config") / "config.json")
    return bucket, file


def state(folder) -> dict[str, str]:
    with Checkpoints(folder / "checkpoints") as checkpoints:
        tree, step = checkpoints.restore()
    assert step == 4
    return {name: tiny.digest(leaf) for name, leaf in tree.items()}


def test_a_killed_run_goes_on_bit_for_bit_through_a_bad_hour(place, store, tmp_path, capfd):
    bucket, file = place
    straight, broken = tmp_path / "straight", bucket / "runs" / "broken"
    loop.train(load_experiment(str(file)), straight)  # on a disk, from the same data

    command = [sys.executable, "-c", KILLED, f"--config={file}", f"--workdir={broken}"]
    child = subprocess.run(command, capture_output=True, text=True, timeout=tiny.HUNG_SECONDS)
    assert child.returncode == -9, child.stderr
    with Checkpoints(broken / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [2]

    numbers = itertools.count(1)

    def bad(method, path):
        number = next(numbers)
        return Fault(503) if number % 150 == 9 else Fault(cut=1) if number % 250 == 60 else None

    with store.failing(bad):
        assert main(["train", f"--config={file}", f"--workdir={broken}"]) == 0
    assert next(numbers) > 100  # (that is: some of them were met)
    said = capfd.readouterr().out
    assert "going on from step 2" in said
    assert state(straight) == state(broken)

    # Everything that a run leaves is there, and nothing is half there.
    names = {path.relative_to(broken).as_posix() for path in files_of(broken)}
    wanted = {"config.json", "manifest.json", "metrics.jsonl", "results.json", "report.html"}
    wanted |= {"bit_report.json", "bit_report.txt", "model/manifest.json", "pictures/curves.png"}
    assert wanted <= names
    assert not [name for name in names if "partial" in name or "unfinished" in name]
    assert any(name.startswith("tb/") for name in names)
    assert any(name.startswith("profile/") for name in names)
    manifest = json.loads((broken / "manifest.json").read_text())
    assert len(manifest["starts"]) == 2
    steps = [line["step"] for line in read_metrics(broken / "metrics.jsonl")]
    assert sorted(set(steps)) == [1, 2, 3, 4]
    locks = [path for path in files_of(broken) if FOLDER in path.parts]
    assert [json.loads(path.read_text())["state"] for path in locks] == ["released"]
    # Once more: it is finished, and says so.
    loop.train(load_experiment(str(file)), broken)
    assert "this run is finished" in capfd.readouterr().out
    params = load_model(broken).variables["params"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))

    # The other verbs.
    options = [f"--config={file}", f"--model={broken}", f"--out={bucket}/judged"]
    assert main(["eval", *options]) == 0
    judged = json.loads((bucket / "judged" / "results.json").read_text())
    assert judged["images"] == 6
    assert judged["AP"] == json.loads((broken / "results.json").read_text())["AP"]
    images = sorted(map(str, (bucket / "data" / "validation").iterdir()))[:2]
    assert main(["predict", *images, f"--model={broken}", f"--out={bucket}/seen"]) == 0
    seen = sorted(path.name for path in (bucket / "seen").iterdir())
    stems = [as_path(image).stem for image in images]
    assert seen == sorted(f"{s}.detections.{end}" for s in stems for end in ("json", "png"))
    assert main(["inspect-data", f"--config={file}", f"--pictures={bucket}/sheet.png"]) == 0
    assert (bucket / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_bad_places_are_one_line_each(place, store, tmp_path, capsys, impatient):
    bucket, file = place

    def refused(*words, fault=lambda method, path: None):
        with store.failing(fault):
            assert main(list(words)) == 1
        said = capsys.readouterr()
        line, hint = said.err.strip().splitlines()[-2:]
        assert "--traceback" in hint
        return line

    train = ("train", f"--config={file}")
    line = refused(*train, "--workdir=gs://there-is-no-such-one/run")
    assert "there is no bucket gs://there-is-no-such-one" in line
    line = refused(
        *train,
        f"--workdir={bucket}/other",
        fault=lambda method, path: Fault(403) if method == "POST" else None,
    )
    assert "these credentials may not" in line
    assert f"{bucket}/other" in line
    anonymous = b'{"error": {"code": 401, "message": "Anonymous caller"}}'
    line = refused(
        *train, f"--workdir={bucket}/other", fault=lambda method, path: Fault(401, body=anonymous)
    )
    assert "no valid credentials" in line
    assert "gcloud auth" in line
    line = refused(*train, "--workdir=s3://bucket/run")
    assert "gs:// only" in line
    line = refused(*train, f"--config.data.root={bucket}/nowhere", f"--workdir={tmp_path}/x")
    assert f"{bucket}/nowhere" in line
    line = refused(*train, f"--config.init_from={bucket}/nowhere", f"--workdir={tmp_path}/x")
    assert f"{bucket}/nowhere" in line
    assert not (tmp_path / "x" / "checkpoints").exists()


def test_a_damaged_object_is_named_and_the_step_before_used(bucket, caplog):
    folder = bucket / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"x": jax.numpy.full(1000, step)}, wait=True)
        files = [path for path in files_of(folder / "step_00000002") if path.parent.name == "d"]
        data = bytearray(files[0].read_bytes())
        data[len(data) // 2] ^= 1
        files[0].write_bytes(bytes(data))
        tree, step = checkpoints.restore()
        assert step == 1
        assert str(files[0]) in caplog.text
        assert int(tree["x"][0]) == 1
        # A step whose save was cut off has no manifest, and goes with the next save.
        (folder / "step_00000003" / "half").write_bytes(b"1")
        checkpoints.save(4, {"x": jax.numpy.full(1000, 4)}, wait=True)
        assert checkpoints.steps() == [1, 2, 4]
        assert not (folder / "step_00000003").exists()
