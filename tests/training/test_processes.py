"""The whole loop in one, two and four processes, on four devices in all: the same run.

One process writes to a disk; more have nothing but an object store in common. Where one is killed
the others end by themselves, no bit is lost when as many go on, and no image where more do.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from aqdetr_jax.checkpoint.model_folder import load_model
from aqdetr_jax.checkpoint.steps import Checkpoints
from aqdetr_jax.cli import main
from aqdetr_jax.paths import as_path, files_of
from aqdetr_jax.viz.records import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compile")

PROGRAM = """
import dataclasses, os, sys, time
sys.path.insert(0, "tests")
import jax
import numpy as np
import tiny
from aqdetr_jax.cli import _run
from aqdetr_jax.parallel import watch
from aqdetr_jax.parallel.hosts import initialize_distributed
from aqdetr_jax.paths import as_path
from aqdetr_jax.training import initial, loop

port, index, count, folder, die_at = sys.argv[1:]
index, count, die_at = int(index), int(count), int(die_at)
watch.LOST_SECONDS, watch.TICK = 6.0, 0.5
if count > 1:
    assert initialize_distributed("localhost:" + port, count, index)
placed, put_batch = 0, loop.put_batch

def counted(batch, mesh):
    global placed
    placed += "boxes" in batch  # a training step, not an evaluation
    if placed == die_at and index == count - 1:
        while not as_path(folder + "/checkpoints/step_00000002.manifest.json").exists():
            time.sleep(0.02)  # checkpoints are written beside the training
        os._exit(9)
    return put_batch(batch, mesh)

loop.put_batch = counted

# What another machine's arithmetic may do: process 1 starts from other numbers. Process 0's count.
initial_variables = initial.initial_variables

def elsewhere(*arguments):
    values, report = initial_variables(*arguments)
    return jax.tree.map(lambda x: x + np.float32(0.01 * index), values), report

initial.initial_variables = elsewhere
# Six evaluation images in batches of four: the last one is filled up.
train = dataclasses.replace(tiny.FLOAT.train, steps=4, eval_every=4)
model = dataclasses.replace(tiny.MODEL, decoder_layers=1)
# A rate that moves: its count goes to the devices, too.
optimizer = dataclasses.replace(tiny.FLOAT.optimizer, schedule="cosine")
config = dataclasses.replace(tiny.FLOAT, model=model, train=train, optimizer=optimizer)

class Arguments:
    traceback = True

    @staticmethod
    def run(*_):
        result = loop.train(config, folder)
        assert len(result.detections.results) and result.block["images"] == 6

sys.exit(_run(Arguments, ()))
"""


def start(program: str, processes: int, *words: str) -> list[tuple[int, str]]:
    """Exit status and output of each process of a program; they share four devices."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    flags = tiny.more_flags(f"--xla_force_host_platform_device_count={4 // processes}")
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, port, str(index), str(processes), *words],
            env={**os.environ, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(processes)
    ]
    try:
        outputs = [child.communicate(timeout=tiny.HUNG_SECONDS)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, text) for child, text in zip(children, outputs, strict=True)]


def run(folder: Path, processes: int) -> None:
    """Runs the tiny experiment."""
    found = start(PROGRAM, processes, str(folder), "0")
    texts = "\n".join(text for _, text in found)
    assert [status for status, _ in found] == [0] * processes, texts


def copied(folder: Path, target: Path) -> Path:
    """A copy of a work directory within a store."""
    for path in files_of(folder):
        (target / path.relative_to(folder).as_posix()).write_bytes(path.read_bytes())
    return target


def final_state(folder: Path) -> dict:
    with Checkpoints(folder / "checkpoints") as checkpoints:
        tree, step = checkpoints.restore()
    assert step == 4
    return tree


def same_but_for_rounding(one: Path, other: Path) -> None:
    """Two runs of the same batches, with sums over the global batch in another order."""
    mine, theirs = (load_model(folder).variables["params"] for folder in (one, other))
    for path, tolerance in (
        (("class_head", "kernel"), 1e-5),
        (("backbone", "stem", "kernel"), 1e-4),
    ):
        left, right = mine, theirs
        for key in path:
            left, right = left[key], right[key]
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=tolerance)
    rows = [
        {row["step"]: row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row}
        for folder in (one, other)
    ]
    assert list(rows[0]) == list(rows[1]) == [1, 2, 3, 4]
    for step in rows[0]:
        left, right = (row[step] for row in rows)
        assert left["num_boxes"] == right["num_boxes"]
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5), step
    same_detections(one, other)


def same_detections(one: Path, other: Path) -> None:
    """Every image once, whoever saw it; rows that fill a batch up are none."""
    found = [json.loads((folder / "detections.json").read_text()) for folder in (one, other)]
    for detections in found:
        assert {d["image_id"] for d in detections} == {1, 2, 3, 4, 5, 6}
        assert len(detections) == 6 * tiny.MODEL.num_queries
    scores = [sorted(d["score"] for d in detections) for detections in found]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-2, atol=1e-4)


@pytest.fixture(scope="module")
def runs(store, tmp_path_factory, quick_compile):
    """(run of one process, run of two, run of two that ended after step 2's checkpoint)."""
    bucket = as_path(store.make_bucket(f"processes-{os.getpid()}"))
    one, two, broken = tmp_path_factory.mktemp("one"), bucket / "two", bucket / "broken"
    run(one, 1)
    run(two, 2)
    # After the checkpoint of step 2, before the one of step 4.
    ends = start(PROGRAM, 2, str(broken), "4")
    assert [status for status, _ in ends] == [76, 9], ends
    assert "ended without a word (killed, out of memory" in ends[0][1], ends
    with Checkpoints(broken / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [2]
    return one, two, broken


def test_two_processes_train_as_one_does(runs):
    same_but_for_rounding(*runs[:2])


def test_two_processes_go_on_bit_for_bit(runs):
    _, two, broken = runs
    again = copied(broken, broken.parent / "again")
    run(again, 2)
    straight, resumed = final_state(two), final_state(again)
    for name in straight:
        assert tiny.digest(straight[name]) == tiny.digest(resumed[name]), name


EVALUATION = """
import sys
port, index, count, *command = sys.argv[1:]
from aqdetr_jax.cli import main
from aqdetr_jax.parallel.hosts import initialize_distributed
initialize_distributed("localhost:" + port, int(count), int(index))
sys.exit(main(command))
"""


def test_two_processes_judge_a_model_as_one_does(runs, tmp_path):
    one, *_ = runs
    config = tiny.write_config(tiny.FLOAT, tmp_path / "config.json")
    command = ["eval", f"--config={config}", f"--model={one}"]
    assert main([*command, f"--out={tmp_path / 'one'}"]) == 0
    outputs = start(EVALUATION, 2, *command, f"--out={tmp_path / 'two'}")
    assert [status for status, _ in outputs] == [0, 0], outputs
    assert "AP" in outputs[0][1]
    assert "AP" not in outputs[1][1]
    blocks = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert [block["images"] for block in blocks] == [6, 6]
    for name in ("AP", "AP50", "AR100"):
        assert blocks[0][name] == pytest.approx(blocks[1][name], abs=1e-6)
    same_detections(tmp_path / "one", tmp_path / "two")


def test_four_processes_go_on_with_what_two_began(runs):
    one, _, broken = runs
    run(broken, 4)
    same_but_for_rounding(one, broken)
