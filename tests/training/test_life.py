"""A step's life: compiled once, fed and read explicitly, timed by parts, traced on request."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import re
import time

import jax
import pytest
import tiny

from aqdetr_jax.config_types import ConfigError
from aqdetr_jax.data.pipeline import train_bucket
from aqdetr_jax.parallel.compiled import DoesNotFitError
from aqdetr_jax.training import assemble, loop, remedies, resume, setup, sizing
from aqdetr_jax.training import log as logs
from aqdetr_jax.training import profile as profiles
from aqdetr_jax.training.clock import PARTS, RunClock
from aqdetr_jax.training.experiment import load_experiment, pretraining
from aqdetr_jax.training.metrics import Progress
from aqdetr_jax.training.profile import StepTrace

pytestmark = pytest.mark.usefixtures("quick_compile")

BUCKETS = ((64, 64), (48, 64))


# A dense pretraining: its step compiles in a third of a detector's time.
TWO = tiny.changed(pretraining(tiny.FLOAT, ()), "data", buckets=BUCKETS)
TWO = tiny.changed(TWO, "train", steps=8, checkpoint_every=3, profile="3:4")

REFUSED = r"[Dd]isallowed host-to-device transfer"
COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass
class Life:
    """A run, seen from outside.

    Attributes:
      folder: its work directory.
      said: what it printed.
      compilations: of each step, how many there had been when it was done.
      times: what its clock read, in order.
      clock: of the run.
    """

    folder: object
    said: str = ""
    compilations: list[int] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)
    clock: RunClock | None = None


@pytest.fixture(scope="module")
def life(tmp_path_factory, quick_compile):
    """Eight steps of two buckets, whatever is not explicit refused, a batch read slowly."""
    seen, events = Life(tmp_path_factory.mktemp("life")), []

    class Watched(RunClock):
        def __init__(self):
            seen.clock = self
            super().__init__(self.read)

        def read(self):
            seen.times.append(time.perf_counter())
            return seen.times[-1]

        def step(self, *arguments):
            result = super().step(*arguments)
            seen.compilations.append(len(events))
            return result

    def allowed(function):
        def call(*arguments):
            with jax.transfer_guard("allow"):
                return function(*arguments)

        return call

    def listen(event, duration, **_):
        if event == COMPILED:
            events.append(event)

    put_batch = loop.put_batch

    def slow_put_batch(batch, mesh):
        time.sleep(0.05)
        return put_batch(batch, mesh)

    jax.monitoring.register_event_duration_secs_listener(listen)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "RunClock", Watched)
        patch.setattr(loop, "GUARD", "disallow_explicit")
        patch.setattr(loop, "put_batch", allowed(slow_put_batch))
        patch.setattr(logs, "fetch", allowed(logs.fetch))
        patch.setattr(logs, "put", allowed(logs.put))
        patch.setattr(loop, "say", said.append)
        patch.setattr(profiles, "say", said.append)
        loop.train(TWO, seen.folder)
    jax.monitoring.unregister_event_duration_listener(listen)
    seen.said = "\n".join(said)
    return seen


def rows(life):
    lines = (life.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_nothing_is_compiled_after_each_buckets_first_step(life):
    pipeline = setup.pipeline_config(tiny.resolved(TWO), train=True)
    buckets = [train_bucket(pipeline, step) for step in range(TWO.train.steps)]
    second = buckets.index(1 - buckets[0])
    assert 0 < second < TWO.train.steps - 3  # both come, and then some more steps
    counts = life.compilations
    assert counts[second] > counts[second - 1]
    # Step 1's line is logged after it: the schedule's one program.
    assert len(set(counts[1:second])) <= 1
    assert len(set(counts[second:])) == 1


def test_nothing_goes_over_but_the_batch_and_the_metrics(life):
    """The run went through with any other transfer an error; which a transfer here would be."""
    assert len(life.compilations) == TWO.train.steps
    with (
        jax.transfer_guard("disallow_explicit"),
        pytest.raises(jax.errors.JaxRuntimeError, match=REFUSED),
    ):
        jax.device_put(1.0)


def test_an_implicit_transfer_ends_the_run(tmp_path, monkeypatch):
    """The loop guards itself: a batch that was not placed is refused."""
    monkeypatch.setattr(loop, "put_batch", lambda batch, mesh: batch)
    with pytest.raises(jax.errors.JaxRuntimeError, match=REFUSED):
        loop.train(tiny.changed(TWO, "train", profile=""), tmp_path)


def test_every_second_is_counted_once(life):
    found, total = rows(life), life.clock.total
    assert [row["step"] for row in found] == list(range(1, 9))
    for row in found:
        assert {key for key in row if key.startswith("time/")} == {f"time/{p}" for p in PARTS}
        assert min(row[f"time/{p}"] for p in PARTS) > -1e-9
        share = row["time/input"] / sum(row[f"time/{p}"] for p in PARTS)
        assert row["data/wait"] == pytest.approx(share)
    whole = sum(total.values())
    assert math.isclose(whole, life.times[-1] - life.times[0], rel_tol=1e-9)
    for part in ("step", "input", "compile", "start"):
        assert sum(row[f"time/{part}"] for row in found) == pytest.approx(total[part]), part
    # What comes after the last line: the last checkpoint, and the model.
    after = sum(total.values()) - sum(row[f"time/{p}"] for row in found for p in PARTS)
    assert after >= total["checkpoint"] - sum(row["time/checkpoint"] for row in found) > 0
    assert total["evaluation"] == 0


def test_parts_are_what_they_are_called(life):
    found = rows(life)
    first = found[0]
    assert first["time/start"] > 0  # data, parameters
    assert first["time/compile"] > 0
    assert all(row["time/start"] == 0 for row in found[1:])
    # Nothing is computed while the host sleeps after a line: that is waiting for input.
    assert all(row["time/input"] >= 0.04 for row in found)
    assert all(row["time/step"] > 0 for row in found)
    # Checkpoints after steps 3 and 6, in the next line.
    assert [row["step"] for row in found if row["time/checkpoint"] > 0] == [4, 7]
    computed = itertools.accumulate(row["time/step"] for row in found)
    whole = itertools.accumulate(sum(row[f"time/{p}"] for p in PARTS) for row in found)
    for row, step, seconds in zip(found, computed, whole, strict=True):
        assert row["goodput"] == pytest.approx(step / seconds)


def test_the_summary_says_where_the_time_went(life):
    line = life.said.splitlines()[-1]
    assert re.fullmatch(r"tiny: \w+: \d+% .*", line), line
    assert "computing steps" in line
    assert "waiting for input" in line


def test_the_trace_holds_the_steps_that_were_asked_for(life):
    files = list((life.folder / "profile").rglob("*.xplane.pb"))
    assert len(files) == 1
    data = jax.profiler.ProfileData.from_file(str(files[0]))
    steps = [
        dict(event.stats)["step_num"]
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert steps == [3, 4]
    assert f"steps 3 to 4 are traced in {life.folder / 'profile'}, for xprof" in life.said


def test_all_buckets_are_compiled_before_the_first_step_on_accelerators(tmp_path, monkeypatch):
    """And what does not fit is known before a batch is read."""
    monkeypatch.setattr(loop, "on_accelerators", lambda mesh: True)
    monkeypatch.setattr("aqdetr_jax.parallel.compiled.device_bytes", lambda: 2**10)
    monkeypatch.setattr(loop, "make_train_pipeline", None)
    with pytest.raises(DoesNotFitError) as caught:
        loop.train(TWO, tmp_path)
    text = str(caught.value)
    assert text.startswith("the training step of 4 images of 64x64 does not fit the devices'")
    assert (
        "config.model.dtype=bfloat16, or config.model.remat=True, or config.train.batch_size=2"
        in text
    )


def test_a_mesh_that_cannot_be_is_refused_before_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "open_dataset", None)
    with pytest.raises(ValueError, match=r"config.mesh.model=2 does not divide the 1 devices"):
        loop.train(tiny.changed(TWO, "mesh", model=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- the programs' batches, and what helps -------------------------------------------------------


@pytest.mark.parametrize("bucket", BUCKETS)
def test_shapes_are_those_of_the_pipelines_batches(bucket):
    config = tiny.resolved(tiny.changed(TWO, "data", buckets=(bucket,)))
    (batch,) = tiny.batches(config, 1)
    shapes = assemble.batch_shapes(config, bucket, config.train.batch_size)
    found = {key: (batch[key].shape, batch[key].dtype) for key in assemble.TRAINED_KEYS}
    assert {key: (x.shape, x.dtype) for key, x in shapes.items()} == found


def helps(config, devices, **options):
    return remedies.for_run(config.data, config, devices, **options)


def test_remedies_are_those_that_are_left():
    config = tiny.changed(tiny.FLOAT, "train", batch_size=36)
    assert helps(config, 4) == (
        "try config.model.dtype=bfloat16, or config.train.accumulate=3 with "
        "config.train.batch_size=36, or config.model.remat=True, or config.train.batch_size=16"
    )
    config = tiny.changed(config, "model", dtype="bfloat16", remat=True)
    assert helps(config, 6) == (
        "try config.train.accumulate=2 with config.train.batch_size=36, or "
        "config.train.batch_size=18"
    )
    config = tiny.changed(config, "train", accumulate=3)
    assert helps(config, 6) == (
        "try config.train.accumulate=6 with config.train.batch_size=36, or "
        "config.train.batch_size=18"
    )
    assert "use smaller config.data.buckets" in helps(config, 12)
    # With buckets that follow from the images a given one would be refused.
    fitted = dataclasses.replace(config.data, fit=640)
    assert "use smaller config.data.fit," in remedies.for_run(fitted, config, 12)
    assert "use smaller config.data.fit," in remedies.of_images(fitted, "eval")
    # Evaluation's own buckets decide there, and stand for the others where none are given.
    assert "use smaller config.data.eval_buckets," in remedies.of_images(config.data, "eval")


def test_remedies_of_a_run_that_goes_on_are_those_that_it_may_change():
    config = tiny.changed(tiny.FLOAT, "train", batch_size=36)
    text = helps(config, 4, resumed=True)
    assert text == (
        "try config.train.accumulate=3 with config.train.batch_size=36, or config.model.remat=True"
    )
    # (The batch is what it was.)
    assert {"train.accumulate", "model.remat"} < set(resume.CHANGEABLE)
    config = tiny.changed(config, "model", remat=True)
    assert "keeps its batch" in helps(config, 36, resumed=True)
    assert "devices of more memory" in remedies.of_images(config.data, "eval", resumed=True)


def test_micro_batches_are_smaller_whatever_the_configuration_counts_in():
    """One in images a chip would take as many of them at a time, of a larger batch."""
    given = tiny.changed(tiny.FLOAT, "train", batch_per_chip=8)
    resolved = sizing.with_batch(given, 4)
    words = re.findall(r"config\.(train\.\w+=\d+)", helps(resolved, 4))[:2]
    taken = sizing.with_batch(load_experiment("coco:r50,float", words), 4)
    train = taken.train
    assert (train.batch_size, train.batch_size // train.accumulate // 4) == (32, 4)


def test_a_batch_that_is_needed_whole_is_not_cut():
    """Norms learn in a pretraining."""
    assert "accumulate" not in helps(tiny.changed(TWO, "train", batch_size=8), 1)


# --- train.profile -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["100", "a:b", "5:3", "0:4", "-1:2", "3:", "1:2:3", "3-4"])
def test_steps_to_trace_are_two_numbers_in_order(text):
    with pytest.raises(ConfigError, match=r"train.profile='.*': write FIRST:LAST, two steps"):
        load_experiment("shapes_teacher", (f"train.profile={text}",))


def test_steps_to_trace_are_known_by_their_numbers():
    assert load_experiment("shapes_teacher", ("train.profile=100:110",)).train.profiled == (
        100,
        110,
    )
    assert load_experiment("shapes_teacher").train.profiled is None


def test_steps_beyond_the_last_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"train.profile='7:9': the run ends with step 8"):
        loop.train(tiny.changed(TWO, "train", profile="7:9"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("first", "said", "traced"),
    [
        (2, "", [3, 5]),
        (4, "the run goes on after step 4: steps 5 to 5 of them are traced", [5, 5]),
        (5, "the run goes on after step 5: nothing is traced", []),
    ],
)
def test_a_resumed_run_traces_what_is_left(first, said, traced, tmp_path, monkeypatch, capsys):
    calls, number = [], [0]
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: calls.append(number[0]))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(number[0]))
    with contextlib.closing(
        StepTrace(tiny.changed(TWO, "train", profile="3:5"), tmp_path, first)
    ) as trace:
        assert said in capsys.readouterr().out
        for step in range(first + 1, 9):
            number[0] = step
            trace.before(step, ())
            trace.after(step, ())
    assert calls == traced


def test_a_trace_ends_with_a_run_that_fails(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    trace = StepTrace(TWO, tmp_path, 0)
    trace.before(3, ())
    trace.close()
    trace.close()
    assert calls == ["start", "stop"]


# --- the progress line ---------------------------------------------------------------------------


def test_the_line_shows_the_shares_since_the_last_one(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("aqdetr_jax.training.metrics.time.monotonic", lambda: now[0])
    progress = Progress(100, "w", interval=10)
    for step, seconds in ((1, {"step": 1.0}), (2, {"step": 2.0}), (3, {"step": 4.0, "input": 2.0})):
        progress.update(step, {}, seconds)
        now[0] += 6.0
    lines = capsys.readouterr().err.splitlines()
    assert "| 100% step | w" in lines[0]
    assert "| 75% step, 25% input | w" in lines[1]
    assert len(lines) == 2
