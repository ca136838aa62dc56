"""The whole loop in two processes: the run of one, and no bit lost when both are killed."""

from __future__ import annotations

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

pytestmark = pytest.mark.usefixtures("quick_compile")

PROGRAM = """
import dataclasses, os, sys, time
sys.path.insert(0, "tests")
import jax
import numpy as np
import tiny
from aqdetr_jax.training import initial, loop
from aqdetr_jax.parallel.hosts import initialize_distributed

port, index, folder, die_at = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
if port != "0":
    assert initialize_distributed("localhost:" + port, 2, index)
placed, put_batch = 0, loop.put_batch

def counted(batch, mesh):
    global placed
    placed += "boxes" in batch  # a training step, not an evaluation
    if placed == die_at:
        while not os.path.exists(folder + "/checkpoints/step_00000002.manifest.json"):
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
result = loop.train(config, folder)
assert len(result.detections.results) and result.block["images"] == 6
"""


def run(folder: Path, processes: int, die_at: int = 0) -> None:
    """Runs the tiny experiment in one process (of two devices) or in two (of one)."""
    port = "0"
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = str(probe.getsockname()[1])
    flags = tiny.more_flags(f"--xla_force_host_platform_device_count={3 - processes}")
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(i), str(folder), str(die_at)],
            env={**os.environ, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        outputs = [child.communicate(timeout=tiny.HUNG_SECONDS)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    if not die_at:
        assert [child.returncode for child in children] == [0] * processes, "\n".join(outputs)
    else:
        assert all(child.returncode for child in children), "\n".join(outputs)


def final_state(folder: Path) -> dict:
    with Checkpoints(folder / "checkpoints") as checkpoints:
        tree, step = checkpoints.restore()
    assert step == 4
    return tree


def test_two_processes_train_as_one_does_and_resume_bit_for_bit(tmp_path):
    one, two, broken = tmp_path / "one", tmp_path / "two", tmp_path / "broken"
    run(one, 1)
    run(two, 2)
    # The same batches and the same sums over the global batch, in another order of summation.
    mine, other = (load_model(f).variables["params"] for f in (one, two))
    np.testing.assert_allclose(
        mine["class_head"]["kernel"], other["class_head"]["kernel"], rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(
        mine["backbone"]["stem"]["kernel"],
        other["backbone"]["stem"]["kernel"],
        rtol=1e-3,
        atol=1e-4,
    )

    run(broken, 2, die_at=4)  # after the checkpoint of step 2, before the one of step 4
    with Checkpoints(broken / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [2]
    run(broken, 2)
    straight, resumed = final_state(two), final_state(broken)
    for name in straight:
        assert tiny.digest(straight[name]) == tiny.digest(resumed[name]), name
