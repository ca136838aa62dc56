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


def train(config: Path, *commands: list[str]) -> list[tuple[int, list[str]]]:
    """Exit status and lines of the command in each of two processes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    flags = tiny.more_flags("--xla_force_host_platform_device_count=1")
    children = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", PROGRAM, port, str(index)),
                *("pretrain", f"--config={config}", *words),
            ],
            env={**os.environ, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, words in enumerate(commands)
    ]
    try:
        texts = [child.communicate(timeout=tiny.HUNG_SECONDS)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    told = [[x for x in text.splitlines() if x.startswith("aqdetr: ")] for text in texts]
    return [(child.returncode, lines) for child, lines in zip(children, told, strict=True)]


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


def test_a_work_directory_that_is_not_shared(config, tmp_path, monkeypatch):
    # (The program that a child runs reads the constant from its environment in no other way.)
    program = PROGRAM.replace(
        "host.prepare",
        "import aqdetr_jax.training.workdir as w; w.SHARED_SECONDS = 1.0\nhost.prepare",
        1,
    )
    monkeypatch.setitem(globals(), "PROGRAM", program)
    found = train(config, [f"--workdir={tmp_path / 'here'}"], [f"--workdir={tmp_path / 'there'}"])
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


def test_a_lone_process_agrees_with_itself():
    from aqdetr_jax.parallel import hosts

    assert hosts.exchange("a") == ["a"]
    assert hosts.anywhere(True) is True
    hosts.check_same({"a": object()})
    with pytest.raises(KeyError), hosts.together():
        raise KeyError("its own error")
