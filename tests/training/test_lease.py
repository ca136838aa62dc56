"""The right to a work directory in a store: one process has it, whatever happened before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from object_store import Fault

from aqdetr_jax.paths import files_of
from aqdetr_jax.stores import requests
from aqdetr_jax.training import lease
from aqdetr_jax.training.lease import FOLDER, InUseError, Lease


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "SILENT", 1.0)


def numbers(folder):
    return sorted(int(path.name) for path in files_of(folder / FOLDER))


def elsewhere(folder, number, **content):
    """A holder on another machine, as it left its object."""
    known = {
        "state": "held",
        "beat": 3,
        "host": "far",
        "process": 7,
        "machine": "b",
        "started": "1",
    }
    path = folder / FOLDER / f"{number:08d}"
    path.write_bytes(json.dumps({**known, **content}).encode())
    return path


def test_one_holder_at_a_time(bucket):
    first = Lease(bucket)
    with pytest.raises(InUseError, match=rf"is using the work directory {bucket} \(process \d+ on"):
        Lease(bucket)
    first.check()
    first.close()
    second = Lease(bucket)
    assert numbers(bucket) == [2]
    second.check()
    second.close()


def test_a_killed_process_of_this_machine_does_not_keep_it(bucket, monkeypatch):
    source = (
        "import sys; from aqdetr_jax.training.lease import Lease; "
        "from aqdetr_jax.paths import as_path; kept = Lease(as_path(sys.argv[1])); "
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", source, str(bucket)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        assert child.stdout.readline() == b"held\n"
        child.kill()
    monkeypatch.setattr(lease, "SILENT", 3600.0)  # it is not waited for
    Lease(bucket).close()
    assert numbers(bucket) == [2]


def test_a_silent_holder_elsewhere_is_waited_for_and_a_live_one_is_not(bucket, capsys):
    path = elsewhere(bucket, 4)
    Lease(bucket).close()
    assert "last used by process 7 on far" in capsys.readouterr().out
    assert numbers(bucket) == [5]
    path = elsewhere(bucket, 6)
    stop = threading.Event()

    def beat():
        count = 4
        while not stop.wait(0.1):
            count += 1
            path.write_bytes(json.dumps({**json.loads(path.read_bytes()), "beat": count}).encode())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(InUseError, match="process 7 on far"):
            Lease(bucket)
    finally:
        stop.set()
        thread.join()
    elsewhere(bucket, 6, state="released")
    Lease(bucket).close()


def test_of_two_that_come_at_once_one_has_it(bucket):
    elsewhere(bucket, 1, state="released")
    barrier, found = threading.Barrier(4), []

    def take():
        barrier.wait()
        try:
            found.append(Lease(bucket))
        except InUseError as error:
            found.append(error)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holders = [one for one in found if isinstance(one, Lease)]
    assert len(found) == 4
    assert len(holders) == 1
    holders[0].check()
    holders[0].close()


def test_who_was_cut_off_stops(bucket, store, monkeypatch, impatient):
    """Nothing is written by two: the first one finds the other's number as soon as it can see."""
    monkeypatch.setattr(requests, "PATIENCE", 0.0)
    kept = Lease(bucket)
    with store.failing(lambda method, path: Fault(503)):
        time.sleep(0.3)
    elsewhere(bucket, 2, process=os.getpid() + 1)
    kept._thread.join()
    with pytest.raises(InUseError, match=r"was taken over by process \d+ on far"):
        kept.check()
    kept.close()
    assert json.loads((bucket / FOLDER / "00000002").read_bytes())["state"] == "held"
