"""Kill -9 at random points of step, save and evaluation; the same command again; the same bits?

python experiments/kill_points.py --work=DIR [--points=50] [--two=10] [--store=10] [--seed=0]
    [--signal=TERM] [--most=N] [--out=FILE]

A small 4-bit student of the embedded set (auxiliary queries, distillation, dropout, moving average)
is trained to its end without a stop, in one process and in two. Then, for every point, the same
command is started, killed with SIGKILL at a random moment of a random step, save or evaluation (of
two processes one is killed, and the other must end by itself), and started again. Compared with the
run that was not stopped are the whole last training state, the kept model, every logged metric but
those of speed, and the 12 numbers. Points are drawn from the seed and kept in the file one by one:
the command goes on where it was stopped. The last ``--two`` + ``--store`` points are of two
processes, and of one whose work directory is in an object store, the emulator that the tests use;
what it leaves there must be what another leaves on a disk. ``--signal=TERM`` asks to stop instead,
and keeps how long that takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("step", "save", "evaluation")
PROCESSES = {"one": 1, "two": 2, "store": 1}
"""Of each kind of run."""
EXPECTED = 4
"""Occurrences of each phase that a kill is drawn from."""

SMALL = (
    *("data.num_train=32", "data.num_eval=10", "data.image_size=64", "data.buckets=((64,64),)"),
    *("data.augment.scales=(48,64)", "data.augment.max_size=64", "data.augment.crop_size=(32,64)"),
    *("model.backbone.depths=(1,1)", "model.backbone.widths=(8,16)"),
    *("model.backbone.strides=(1,2)", "model.backbone.dilations=(1,1)"),
    *("model.backbone.stem_width=8", "model.backbone.stem_kernel=3", "model.num_queries=12"),
    *("model.dim=32", "model.heads=2", "model.decoder_layers=2", "model.ffn=32"),
    *("train.batch_size=4", "train.eval_batch_size=4", "train.log_every=1"),
)
TEACHER = ("init_from=", "model.num_auxiliary=0", "train.steps=1")
STUDENT = (
    *("model.num_auxiliary=12", "model.dropout=0.1", "quant.calibration_batches=1"),
    *("train.steps=8", "train.checkpoint_every=2", "train.eval_every=2"),
    *("train.quantizers_every=4", "train.keep_checkpoints=2", "optimizer.warmup=2"),
)
CHILD_SECONDS = 3600
"""When a child is taken to hang."""


def child(spec: dict[str, Any]) -> None:
    """One process of one start: the command ``aqdetr``, and perhaps its end."""
    from aqdetr_jax import cli, host, reporting
    from aqdetr_jax.checkpoint.steps import Checkpoints
    from aqdetr_jax.evaluation.evaluator import Evaluator
    from aqdetr_jax.parallel.hosts import initialize_distributed
    from aqdetr_jax.training import loop

    if spec["processes"] > 1:
        initialize_distributed(spec["coordinator"], spec["processes"], spec["process"])
    host.prepare = lambda: None  # which would start the program again
    reporting.report_training = lambda *_: None
    seen, took = dict.fromkeys(PHASES, 0), {phase: [] for phase in PHASES}

    def enter(phase: str) -> float:
        seen[phase] += 1
        kill = spec.get("kill")
        if kill and kill["phase"] == phase and kill["nth"] == seen[phase]:
            threading.Timer(kill["delay"], end_by, (kill["signal"],)).start()
        return time.perf_counter()

    def end_by(number: int) -> None:
        Path(spec["sent"]).write_text(str(time.time()))
        os.kill(os.getpid(), number)

    def put_batch(batch, mesh):
        if "boxes" in batch:  # of a training step
            now = enter("step")
            took["step"].append(now - last[0])
            last[0] = now
        return placed(batch, mesh)

    def save(self, *arguments, **options):
        began.append(enter("save"))
        return saved(self, *arguments, **options)

    def finish(self, *arguments):
        finished(self, *arguments)
        took["save"].append(time.perf_counter() - began[-1])

    def evaluate(self, *arguments, **options):
        start = enter("evaluation")
        result = evaluated(self, *arguments, **options)
        took["evaluation"].append(time.perf_counter() - start)
        return result

    last, began = [time.perf_counter()], []
    placed, loop.put_batch = loop.put_batch, put_batch
    saved, Checkpoints.save = Checkpoints.save, save
    finished, Checkpoints._finish = Checkpoints._finish, finish
    evaluated, Evaluator.evaluate = Evaluator.evaluate, evaluate
    sys.argv = ["aqdetr", *spec["command"]]
    try:
        cli.entry_point()
    finally:
        if spec.get("times"):
            # The first of each compiles.
            medians = {phase: float(np.median(values[1:])) for phase, values in took.items()}
            Path(spec["times"]).write_text(json.dumps(medians))


def start(
    command: list[str], work: Path, processes: int, kill: dict[str, Any] | None = None, times=None
) -> dict[str, Any]:
    """Starts a command in one or more processes and waits for all of them.

    Returns:
      Of each process the exit status, the last line that it said, and the seconds from the signal
      to its end.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # Compiled quickly, to slower code: what is looked at is not its speed.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={2 if processes == 1 else 1} "
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
        "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "PYTHONPATH": str(ROOT),
    }
    children, logs = [], []
    for process in range(processes):
        spec = {"command": command, "processes": processes, "process": process}
        spec["coordinator"] = coordinator
        spec["sent"] = str(work / "sent")
        if kill and kill["victim"] == process:
            spec["kill"] = kill
        if times and process == 0:
            spec["times"] = str(times)
        logs.append(work / f"process_{process}.log")
        with open(logs[-1], "wb") as log:
            children.append(
                subprocess.Popen(
                    [sys.executable, __file__, "--child", json.dumps(spec)],
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    ends: dict[int, float] = {}
    limit = time.time() + CHILD_SECONDS
    while len(ends) < processes:
        for i, child in enumerate(children):
            if i not in ends and child.poll() is not None:
                ends[i] = time.time()
        if time.time() > limit:
            for child in children:
                child.kill()
            raise RuntimeError(f"{command} hangs: {logs[0].read_text()[-2000:]}")
        time.sleep(0.05)
    first = min(ends.values())
    lines = [log.read_text(errors="replace").strip().splitlines() for log in logs]
    # JAX's words are those of a process that process 0 leaves alone.
    words = re.compile("aqdetr: |.*Terminating process because")
    told = [[line for line in found if words.match(line)] for found in lines]
    sent = float((work / "sent").read_text()) if kill else first
    return {
        "status": [child.returncode for child in children],
        "said": [(own or found or [""])[-1][:400] for own, found in zip(told, lines, strict=True)],
        "seconds": [round(ends[i] - sent, 1) for i in range(processes)],
    }


def outcome(workdir: str) -> dict[str, Any]:
    """What a finished run is compared by."""
    from aqdetr_jax import trees
    from aqdetr_jax.checkpoint.model_folder import load_model
    from aqdetr_jax.checkpoint.steps import Checkpoints
    from aqdetr_jax.io import read_json
    from aqdetr_jax.paths import as_path
    from aqdetr_jax.training.metrics import CLOCK

    folder = as_path(workdir)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state, step = checkpoints.restore()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    block = read_json(folder / "results.json")
    return {
        "step": step,
        "state": trees.digest(state),
        "model": trees.digest(load_model(folder).variables),
        "metrics": [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows],
        "results": {k: v for k, v in block.items() if k.startswith(("AP", "AR"))},
    }


def draw(
    points: int, two: int, store: int, seed: int, times: dict[str, dict[str, float]]
) -> list[dict]:
    """The points: of which kind of run, which of its processes is killed, when."""
    rng = np.random.default_rng(seed)
    drawn = []
    for number in range(points):
        kind = "two" if number >= points - two - store else "one"
        kind = "store" if number >= points - store else kind
        phase = PHASES[int(rng.integers(len(PHASES)))]
        nth, victim = int(rng.integers(1, EXPECTED + 1)), int(rng.integers(PROCESSES[kind]))
        if phase == "step":
            nth = int(rng.integers(2, 9))
        drawn.append(
            {
                "point": number,
                "kind": kind,
                "phase": phase,
                "nth": nth,
                "victim": victim,
                "delay": float(rng.uniform(0, 1)) * times[kind][phase],
            }
        )
    return drawn


def main() -> None:
    """Draws the points and tries those that are left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--two", type=int, default=10)
    parser.add_argument("--store", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--most", type=int, default=10**9, help="points tried in this call")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/kill_points.json"))
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    with contextlib.ExitStack() as stack:
        bucket = stack.enter_context(_bucket()) if options.store else ""
        sys.exit(_search(options, options.work.resolve(), bucket))


@contextlib.contextmanager
def _bucket() -> Iterator[str]:
    """A bucket of the tests' emulator, which this process's children reach, too."""
    sys.path.append(str(ROOT / "tests"))
    from object_store import emulated

    with emulated() as store:
        yield store.make_bucket("runs")


def _search(options: argparse.Namespace, work: Path, bucket: str) -> bool:
    """Tries the points that are left; returns whether a run went on otherwise than it should."""
    from aqdetr_jax.io import read_json, write_json_atomic
    from aqdetr_jax.provenance import git_commit, package_versions

    work.mkdir(parents=True, exist_ok=True)
    teacher = ["--config=shapes_teacher", f"--workdir={work / 'teacher'}", *SMALL, *TEACHER]
    if not (work / "teacher" / "results.json").is_file():
        _must(start(["train", *teacher], work, 1))

    def place(kind: str, name: str) -> str:
        return f"{bucket}/{name}" if kind == "store" else str(work / name)

    def command(kind: str, name: str) -> list[str]:
        return [
            *("train", "--config=shapes_w4a4:aqdetr", f"--workdir={place(kind, name)}"),
            *(*SMALL, *STUDENT, f"init_from={work / 'teacher'}"),
        ]

    straight, times = {}, {}
    kinds = ["one", *(["two"] if options.two else ()), *(["store"] if options.store else ())]
    for kind in kinds:
        name = f"straight_{kind}"
        kept, last = work / f"times_{kind}.json", work / f"outcome_{kind}.json"
        if not last.is_file():
            _must(start(command(kind, name), work, PROCESSES[kind], times=kept))
            write_json_atomic(last, outcome(place(kind, name)))
        straight[kind], times[kind] = read_json(last), read_json(kept)
    facts = {
        "seed": options.seed,
        "signal": options.signal,
        "commit": git_commit(),
        "versions": package_versions(),
        "seconds_of": times,
    }
    result: dict[str, Any] = {**facts, "points": []}
    if options.out.is_file():
        result = read_json(options.out)
        if any(result[key] != facts[key] for key in ("seed", "signal", "commit")):
            raise SystemExit(f"{options.out} is of another seed, signal or commit: move it away")
    done = {point["point"] for point in result["points"]}
    drawn = draw(options.points, options.two, options.store, options.seed, times)
    for point in [point for point in drawn if point["point"] not in done][: options.most]:
        kind, name = point["kind"], f"point_{point['point']}"
        shutil.rmtree(work / name, ignore_errors=True)
        number = signal.Signals[f"SIG{options.signal}"]
        words, processes = command(kind, name), PROCESSES[kind]
        killed = start(words, work, processes, {**point, "signal": number})
        # A run that is told to stop in its last step ends as usual.
        allowed = (-9,) if options.signal == "KILL" else (75, 0)
        if killed["status"][point["victim"]] not in allowed:
            raise RuntimeError(f"{point} was not ended: {killed}")
        _must(start(words, work, processes))
        # What a disk has is what a store must have.
        made, wanted = outcome(place(kind, name)), straight["two" if kind == "two" else "one"]
        point["ended"] = killed
        point["equal"] = {key: made[key] == wanted[key] for key in made}
        result["points"].append(point)
        write_json_atomic(options.out, result)
        print(point, flush=True)
        if all(point["equal"].values()):
            shutil.rmtree(work / name, ignore_errors=True)
    bad = [point for point in result["points"] if not all(point["equal"].values())]
    print(f"{len(result['points'])} points, {len(bad)} of them with a difference")
    return bool(bad)


def _must(found: dict[str, Any]) -> None:
    if any(found["status"]):
        raise RuntimeError(f"a run failed: {found}")


if __name__ == "__main__":
    main()
