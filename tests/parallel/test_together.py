"""Two processes that were not given the same: one line on one host, before anything is trained."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

PROGRAM = """
import sys
port, index, *command = sys.argv[1:]
from aqdetr_jax import cli, host
from aqdetr_jax.parallel.hosts import initialize_distributed
initialize_distributed("localhost:" + port, 2, int(index))
host.prepare = lambda: None
sys.argv = ["aqdetr", *command]
cli.entry_point()
"""


STOPPED = """
import os, signal, sys, time
port, index = sys.argv[1:]
from aqdetr_jax.parallel.hosts import initialize_distributed, stop_request
initialize_distributed("localhost:" + port, 2, int(index))
with stop_request() as stop:
    step = 0
    while not stop.seen(step):
        step += 1
        time.sleep(0.02 if index == "0" else 0.03)
        if step == 5 and index == "1":
            signal.raise_signal(signal.{signal})
print("aqdetr: stopped after", step)
"""


def processes(program: str, *arguments: list[str]) -> list[tuple[int, list[str]]]:
    """Exit status and lines that begin with "aqdetr: " of a program in each of some processes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    flags = tiny.more_flags("--xla_force_host_platform_device_count=1")
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, port, str(index), *words],
            env={**os.environ, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, words in enumerate(arguments)
    ]
    try:
        texts = [child.communicate(timeout=tiny.HUNG_SECONDS)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    told = [[x for x in text.splitlines() if x.startswith("aqdetr: ")] for text in texts]
    return [(child.returncode, lines) for child, lines in zip(children, told, strict=True)]


def train(config: Path, *commands: list[str], program: str = PROGRAM):
    """The command in two processes."""
    words = ["pretrain", f"--config={config}"]
    return processes(program, *([*words, *own] for own in commands))


@pytest.fixture
def config(tmp_path):
    return tiny.write_config(tiny.FLOAT, tmp_path / "config.json")


def refused(found, pattern):
    """Both ended with status 1; one said why."""
    assert [status for status, _ in found] == [1, 1], found
    (line,), nothing = (lines for _, lines in found)
    assert nothing == []
    assert re.search(pattern, line), line


def test_buckets_that_differ_between_hosts(config, tmp_path):
    words = [f"--workdir={tmp_path / 'run'}"]
    found = train(config, words, [*words, "data.buckets=((48,64),)"])
    refused(
        found,
        r"config\.data\.buckets differs between the hosts: \[\[64, 64\]\] in process 0 \(.*\), "
        r"\[\[48, 64\]\] in process 1 \(.*\): give all of them the same command",
    )
    assert not (tmp_path / "run").exists()


def test_a_work_directory_that_is_not_shared(config, tmp_path):
    program = PROGRAM.replace(
        "host.prepare",
        "import aqdetr_jax.training.workdir as w; w.SHARED_SECONDS = 1.0\nhost.prepare",
        1,
    )
    folders = ([f"--workdir={tmp_path / name}"] for name in ("here", "there"))
    found = train(config, *folders, program=program)
    refused(
        found,
        r"process 1 \(.*\) cannot start: WorkdirError: the work directory .*there is not the one "
        r"that process 0 wrote to: give a folder that all hosts share",
    )
    assert not list((tmp_path / "here").glob("checkpoints/*"))


def test_what_one_host_cannot_read_ends_both(config, tmp_path):
    words = [f"--workdir={tmp_path / 'run'}"]
    missing = ["data.kind=coco", f"data.root={tmp_path / 'nowhere'}"]
    found = train(config, words, [*words, *missing])
    refused(found, r"process 1 \(.*\) cannot start: \w+: .*nowhere")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGINT"])
def test_a_request_to_stop_one_process_stops_both_after_the_same_step(signal):
    found = processes(STOPPED.replace("{signal}", signal), [], [])
    assert [status for status, _ in found] == [0, 0]
    (one,), (other,) = (lines for _, lines in found)
    assert one == other


def test_a_lone_process_agrees_with_itself():
    from aqdetr_jax.parallel import hosts

    assert hosts.exchange("a") == ["a"]
    assert hosts.anywhere(True) is True
    hosts.check_same({"a": object()})
    with pytest.raises(KeyError), hosts.together():
        raise KeyError("its own error")
