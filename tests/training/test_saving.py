"""A save that fails: the run stops or goes on, as set; what was saved before is there."""

from __future__ import annotations

import dataclasses
import logging
import signal

import jax
import numpy as np
import pytest
import tiny

from aqdetr_jax.checkpoint import steps as checkpoint_steps
from aqdetr_jax.checkpoint.model_folder import load_model
from aqdetr_jax.checkpoint.steps import Checkpoints
from aqdetr_jax.checkpoint.store import CheckpointError
from aqdetr_jax.cli import main
from aqdetr_jax.training import loop
from aqdetr_jax.training.experiment import pretraining
from aqdetr_jax.training.metrics import MetricsWriter
from aqdetr_jax.training.saving import Saver

FULL = OSError(28, "No space left on device")


@pytest.fixture
def full(monkeypatch):
    """``full(steps)``: the store refuses the manifests of these steps."""
    refused = set()
    write = checkpoint_steps.write_manifest

    def write_manifest(manifest, folder, extra):
        if extra["step"] in refused:
            raise FULL
        return write(manifest, folder, extra)

    monkeypatch.setattr(checkpoint_steps, "write_manifest", write_manifest)
    return refused.update


def state(step):
    return {"a": np.arange(3) + step}


@pytest.mark.parametrize("wait", [True, False])
def test_a_failed_save_is_told_and_the_next_one_is_tried(tmp_path, full, caplog, wait):
    full([2, 3])
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        saver = Saver(checkpoints, go_on=True, first=None)
        with caplog.at_level(logging.WARNING):
            for step in (1, 2, 3):
                saver.save(step, state(step), wait=wait)
        if not wait:  # the last one is still being written
            saver.save(4, state(4), wait=True)
            assert checkpoints.steps() == [4]
        else:
            assert checkpoints.steps() == [1]  # never deleted for one that is not whole
            assert checkpoints.restore()[0]["a"].tolist() == [1, 2, 3]
        assert saver.failed == 2
    for step in (2, 3):
        assert f"saving step {step} to {tmp_path} failed" in caplog.text
    assert "No space left on device" in caplog.text
    assert "Training goes on (config.train.on_save_error)" in caplog.text


def test_a_failed_save_stops_unless_told_otherwise(tmp_path, full):
    full([2])
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        saver = Saver(checkpoints, go_on=False, first=None)
        saver.save(1, state(1), wait=True)
        with pytest.raises(CheckpointError, match=r"saving step 2 .*No space.*newest: 1"):
            saver.save(2, state(2), wait=True)
        # And what must be saved is not given up, whatever the setting.
        with pytest.raises(CheckpointError, match="saving step 2"):
            Saver(checkpoints, go_on=True, first=1).save(2, state(2), wait=True, must=True)
        assert checkpoints.steps() == [1]


def test_what_is_saved_is_not_saved_again(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        saver = Saver(checkpoints, go_on=True, first=4)
        monkeypatch.setattr(checkpoints, "save", None)
        saver.save(4, state(4))


# --- whole runs ----------------------------------------------------------------------------------

QUICK = pretraining(tiny.FLOAT, ())


def with_train(**fields):
    return dataclasses.replace(QUICK, train=dataclasses.replace(QUICK.train, **fields))


@pytest.mark.usefixtures("quick_compile")
def test_a_run_goes_on_without_a_store_and_ends_as_it_would_have(tmp_path, full, caplog):
    config = with_train(on_save_error="go_on")
    straight = loop.train(config, tmp_path / "straight")
    full([2, 4, 6])
    with caplog.at_level(logging.WARNING):
        result = loop.train(config, tmp_path / "run")
    assert caplog.text.count("Training goes on") == 3
    assert tiny.digest(result.bundle.variables) == tiny.digest(straight.bundle.variables)
    assert tiny.digest(load_model(tmp_path / "run").variables) == tiny.digest(
        straight.bundle.variables
    )


@pytest.mark.usefixtures("quick_compile")
def test_a_run_stops_and_goes_on_from_what_it_had(tmp_path, full, monkeypatch, capsys):
    file = tiny.write_config(QUICK, tmp_path / "config.json")
    command = ["pretrain", f"--config={file}", f"--workdir={tmp_path / 'run'}"]
    full([4])
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "aqdetr: CheckpointError: saving step 4 to " in error
    assert "No space left on device" in error
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [2]
    # What was asked to stop and cannot save its state has not stopped in order.
    put_batch = loop.put_batch

    def stopped(batch, mesh):
        signal.raise_signal(signal.SIGTERM)
        return put_batch(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", stopped)
    full([3])
    assert main([*command, "train.on_save_error=go_on"]) == 1
    assert "saving step 3 to " in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command) == 0


@pytest.mark.usefixtures("quick_compile")
def test_out_of_memory_is_not_reported_as_a_preemption(tmp_path, monkeypatch, capsys):
    file = tiny.write_config(QUICK, tmp_path / "config.json")

    def no_memory(batch, mesh):
        signal.raise_signal(signal.SIGTERM)  # at the same time
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(loop, "put_batch", no_memory)
    command = ["pretrain", f"--config={file}", f"--workdir={tmp_path / 'run'}"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "aqdetr: DoesNotFitError: the devices are out of memory: try config." in error
    assert "stopped" not in error

    def no_host_memory(batch, mesh):
        raise MemoryError("9 GiB")

    monkeypatch.setattr(loop, "put_batch", no_host_memory)
    assert main(command) == 1
    assert "aqdetr: MemoryError: 9 GiB" in capsys.readouterr().err


# --- the metrics file ----------------------------------------------------------------------------


class AlmostFull:
    """A file on a disk with room for some more bytes (None = enough)."""

    def __init__(self, file):
        self._file, self.room = file, None

    def write(self, data):
        if self.room is not None and len(data) > self.room:
            if not self.room:
                raise FULL
            data, self.room = data[: self.room], 0  # as the system does
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_lines_are_kept_until_they_can_be_written(tmp_path, caplog):
    with MetricsWriter(tmp_path, tensorboard=False, keep_going=True) as writer:
        writer._file = disk = AlmostFull(writer._file)
        writer.write(1, {"loss": 1.0})
        disk.room = 10
        with caplog.at_level(logging.WARNING):
            writer.write(2, {"loss": 2.0})
            writer.write(3, {"loss": 3.0})
        assert [row["step"] for row in tiny.metrics(tmp_path)] == [1]  # nothing half written
        assert caplog.text.count("cannot be written now") == 1
        disk.room = None
        writer.write(4, {"loss": 4.0})
        assert [row["step"] for row in tiny.metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_line_that_cannot_be_written_stops_unless_told_otherwise(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer._file = disk = AlmostFull(writer._file)
        writer.write(1, {"loss": 1.0})
        disk.room = 10
        with pytest.raises(OSError, match="No space left"):
            writer.write(2, {"loss": 2.0})
    assert [row["step"] for row in tiny.metrics(tmp_path)] == [1]
