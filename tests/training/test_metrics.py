from __future__ import annotations

import io
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from aqdetr_jax.training.metrics import MetricsWriter, Progress, format_seconds


def raw_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def tensorboard_scalars(workdir):
    """Reads (tag, step, value) from event files: records of length, crc, bytes, crc."""
    found = []
    for path in sorted((workdir / "tb").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            event = Event.FromString(content[at + 12 : at + 12 + size])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            at += size + 16
    return found


def test_lines_and_tensorboard(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": jnp.float32(2.5), "lr": 1e-4, "note": "x"})
        assert raw_lines(tmp_path)[0]["train/loss"] == 2.5  # flushed, before close
        writer.write(2, {"eval": {"AP": np.float64(0.25), "per": {"a": 1}}, "ok": True, "n": None})
        writer.write(3, {"half": jnp.bfloat16(1.5), "count": np.int32(4)})
    first, second, third = raw_lines(tmp_path)
    assert {k: v for k, v in first.items() if k != "time"} == {
        "step": 1,
        "train/loss": 2.5,
        "lr": 1e-4,
        "note": "x",
    }
    assert (second["eval/AP"], second["eval/per/a"], second["ok"], second["n"]) == (
        0.25,
        1,
        1,
        None,
    )
    assert (third["half"], third["count"]) == (1.5, 4)
    assert first["time"] <= third["time"]
    scalars = tensorboard_scalars(tmp_path)
    assert ("train/loss", 1, 2.5) in scalars
    assert ("eval/AP", 2, 0.25) in scalars
    assert {tag for tag, _, _ in scalars} == {
        "train/loss",
        "lr",
        "eval/AP",
        "eval/per/a",
        "half",
        "count",
    }


def test_nan_and_infinity_are_null_and_listed(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"a": float("nan"), "b": jnp.inf, "c": 1.0})
    assert raw_lines(tmp_path)[0] | {"time": 0} == {
        "step": 1,
        "time": 0,
        "a": None,
        "b": None,
        "c": 1.0,
        "nonfinite": ["a", "b"],
    }
    assert not (tmp_path / "tb").exists()


def test_resume_drops_later_steps_and_a_cut_line(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": step / 10})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    with MetricsWriter(tmp_path, resume_step=3, tensorboard=False) as writer:
        writer.write(4, {"loss": 40.0})
    lines = raw_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines] == [0.1, 0.2, 0.3, 40.0]
    # Without a step every line is kept.
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(4, {"AP": 0.5})
    assert len(raw_lines(tmp_path)) == 5


def test_bad_metrics_and_files(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        with pytest.raises(ValueError, match=r"'loss' is not a number: shape \(3,\)"):
            writer.write(1, {"loss": np.ones(3)})
        with pytest.raises(ValueError, match="cannot be named 'step'"):
            writer.write(1, {"step": 1})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[]\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2: not a line of metrics"):
        MetricsWriter(tmp_path, resume_step=1, tensorboard=False)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("aqdetr_jax.training.metrics.time.monotonic", lambda: now[0])
    return now


def test_plain_lines_come_every_interval_and_at_the_end(clock):
    stream = io.StringIO()
    progress = Progress(100, "runs/x", batch_size=4, interval=10, stream=stream)
    for step in range(1, 101):
        clock[0] += 0.5
        metrics = {"train/loss": jnp.float32(1 / step), "eval": {"AP": 0.123}} if step == 40 else {}
        progress.update(step, metrics or {"train/loss": 2.0})
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 6  # at 0.5, 10.5, 20.5, 30.5, 40.5 s and at the end
    assert lines[0] == "step 1/100 [....................] | loss 2 | runs/x"
    # Two steps per second of four images; 79 steps are left.
    assert lines[1] == (
        "step 21/100 [####................] | loss 2 | 8 images/s | 40s left | runs/x"
    )
    assert "| AP 12.3 | runs/x" in lines[3]
    assert lines[-1].startswith("step 100/100 [####################] | ")
    assert "\r" not in stream.getvalue()


def test_terminal_rewrites_one_line(clock):
    stream = Terminal()
    progress = Progress(10, "w", stream=stream)
    progress.update(1, {"loss": 1.23456, "other": 1e-9})
    progress.update(2, {"loss": np.ones(3)})  # not due: not fetched, not drawn
    clock[0] += 1
    progress.update(3, {"loss": 1.0})
    progress.write("saved")
    clock[0] += 1
    progress.update(10)
    progress.close()
    progress.close()
    text = stream.getvalue()
    assert text.startswith("\rstep 1/10 [##..................] | loss 1.235 other 1e-09 | w")
    assert re.search(r"\r +\rsaved\n", text)
    assert text.count("\n") == 2
    assert "2 st/s" in text
    longest = max(len(part) for part in re.split(r"[\r\n]", text))
    assert longest < 100


def test_resumed_run_measures_its_own_speed(clock):
    stream = io.StringIO()
    progress = Progress(1000, "w", start=500, interval=0, stream=stream)
    progress.update(501)
    clock[0] += 10
    progress.update(511)
    assert "1 st/s | 8m09s left" in stream.getvalue()


def test_format_seconds():
    cases = {0: "0s", 59.4: "59s", 185: "3m05s", 7620: "2h07m", 273600: "3d04h"}
    assert {s: format_seconds(s) for s in cases} == cases
