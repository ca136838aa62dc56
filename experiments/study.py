"""What all studies share: rows that are trained, calibrated or judged, kept one by one.

A study is a list of rows. Each is one ordinary run under ``--work`` (``aqdetr train``, ``aqdetr
ptq`` or ``aqdetr eval`` in a process of its own), and goes into the study's JSON file when it is
done; stopped or killed anywhere, the same command goes on, and started more than once (on a core
each, say) the commands share the rows that are left. A row keeps the results block, what the
run cost, the manifest (in ``experiments/manifests``), and its AP on ``DRAWS`` sets of images drawn
with replacement, the same for all rows of a set, so that two rows can be compared image by image
wherever they were run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from results_files import RESULTS

from aqdetr_jax import host
from aqdetr_jax.checkpoint.model_folder import MODEL_FOLDER, load_model, save_model
from aqdetr_jax.checkpoint.steps import Checkpoints
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.evaluation.bootstrap import bootstrap_ap, image_draws
from aqdetr_jax.evaluation.evaluator import Detections
from aqdetr_jax.io import read_json, write_json_atomic, write_text_atomic
from aqdetr_jax.training.arguments import parse_arguments
from aqdetr_jax.training.clock import PARTS
from aqdetr_jax.training.experiment import load_experiment
from aqdetr_jax.training.log import METRICS
from aqdetr_jax.training.metrics import read_lines
from aqdetr_jax.training.places import WorkdirError, lock_file

MANIFESTS = RESULTS.parent / "manifests"
DRAWS = 1000
FOLDERS = ("root", "cache_dir")
"""Keys whose values are this machine's folders."""

Kind = Literal["train", "pretrain", "ptq", "eval", "last"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One run of a study.

    Attributes:
      name: of the row, and of its folder.
      config: configuration with its variant, as on the command line.
      kind: "train", "pretrain" (a backbone, of which there are no numbers), "ptq" (calibrated, not
        trained), "eval" (``model`` as it is) or "last" (run ``start`` with its last parameters in
        place of their average, see ``last_model``).
      overrides: of the configuration.
      facts: what tells the rows apart in tables: family, method, bits, seed.
      model: of "eval".
      start: row of the same study whose model it starts from, if it is not the configuration's.
      teacher: row of the same study that teaches it, if it is not what it starts from.
      judge: overrides of the configuration for a last evaluation, of which the row's numbers are;
        () = the run's own.
      study: whose row of this name it is: its numbers are taken from there, not made again.
    """

    name: str
    config: str
    kind: Kind = "train"
    overrides: tuple[str, ...] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: str = ""
    start: str = ""
    teacher: str = ""
    judge: tuple[str, ...] = ()
    study: str = ""

    @property
    def before(self) -> tuple[str, ...]:
        """Rows that must be done."""
        return tuple(name for name in (self.start, self.teacher) if name)

    def command(self, folder: Path | str, more: Sequence[str] = ()) -> list[str]:
        """The words after ``aqdetr`` that make the row."""
        models = {"init_from": self.start, "distill.teacher": self.teacher}
        if self.kind == "last":
            models = {}
        others = [f"{k}={Path(folder).parent / name}" for k, name in models.items() if name]
        overrides = [f"--config.{word}" for word in (*self.overrides, *others, *more)]
        config = f"--config={self.config}"
        if self.kind in ("train", "pretrain"):
            return [self.kind, config, f"--workdir={folder}", *overrides]
        if self.kind == "ptq":
            return ["ptq", config, f"--out={folder}", *overrides]
        return ["eval", config, f"--model={self.model_path(folder)}", f"--out={folder}", *overrides]

    def model_path(self, folder: Path | str) -> str:
        """The model that the row is about."""
        if self.kind not in ("eval", "last"):
            return str(folder)
        return self.model or f"{folder}/{LAST}"

    def judge_command(self, folder: Path | str, more: Sequence[str] = ()) -> list[str]:
        """The words after ``aqdetr`` that judge the row where its run's own evaluation does not."""
        overrides = [f"--config.{word}" for word in (*self.judge, *more)]
        words = [f"--config={self.config}", f"--model={self.model_path(folder)}"]
        return ["eval", *words, f"--out={folder}/{JUDGED}", *overrides]


LAST = "last"
"""Folder of the model of a "last" row, within its own."""
JUDGED = "judged"
"""Folder of a row's last evaluation, within its own."""
CALIBRATIONS = ("minmax", "percentile", "mse")


def calibrations(
    config: str, family: str, bits: int, *, start: str = "", judge: tuple[str, ...] = ()
) -> Iterator[Row]:
    """Rows of calibration alone, by each of its methods; arguments as of ``Row``."""
    for way in CALIBRATIONS:
        yield Row(
            f"{family}_w{bits}_ptq_{way}",
            config,
            "ptq",
            (f"quant.policy=w{bits}a{bits}", f"quant.calibration_method={way}"),
            {"family": family, "method": f"ptq_{way}", "bits": bits, "seed": 0},
            start=start,
            judge=judge,
        )


def last_model(run: Path, to: Path) -> None:
    """The model of a finished run that an average was kept of, without it.

    Args:
      run: its folder; its last checkpoint has the parameters.
      to: folder of the model.
    """
    with Checkpoints(run / "checkpoints") as checkpoints:
        restored = checkpoints.restore()
    if restored is None:
        raise SystemExit(f"{run / 'checkpoints'}: no checkpoint, of which the last model is")
    tree = restored[0]
    # What is empty is not in a checkpoint.
    variables = {"params": tree["params"], "batch_stats": tree.get("batch_stats", {})}
    save_model(to, dataclasses.replace(load_model(run), variables=variables))


class Stopped(Exception):
    """The study was asked to stop; what is done is kept."""


def run_study(name: str, rows: Iterable[Row], description: str) -> None:
    """Makes the missing rows of a study, in their order, as its command line asks.

    Args:
      name: of the JSON file in ``experiments/results`` and of the manifests' folder.
      rows: all of them.
      description: for ``--help``.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.set_defaults(overrides=True)
    parser.add_argument("--work", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument(
        "--manifests", type=Path, default=MANIFESTS / name, help="folder of the manifests"
    )
    parser.add_argument("--only", default="", help="rows with all of these words in their name")
    parser.add_argument("--minutes", type=float, help="begin no row after so many")
    parser.add_argument("--list", action="store_true", help="say what is done, and end")
    options, overrides = parse_arguments(parser, sys.argv[1:])
    words = options.only.split(",")
    named = {row.name: row for row in rows}
    wanted = [row for row in named.values() if all(word in row.name for word in words)]
    if options.list:
        done = {row["name"] for row in rows_of(options.out)}
        for row in wanted:
            print(f"{'done' if row.name in done else 'missing':8s} {row.name}")
        return
    start, child = time.monotonic(), _Child()
    signal.signal(signal.SIGTERM, child.stop)
    locks = options.work / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    missing = missing_rows(wanted, named, rows_of(options.out), options.work)
    needed = {name for row in missing for name in row.before}
    for number, row in enumerate(missing, start=1):
        if options.minutes is not None and time.monotonic() - start > 60 * options.minutes:
            print(f"{options.minutes:g} minutes are over: run the same command to go on")
            return
        try:
            lock = lock_file(locks / row.name)
        except WorkdirError:
            continue  # somebody else makes it
        with contextlib.closing(lock):
            done = {made["name"] for made in rows_of(options.out)}
            if row.name in done and (row.name not in needed or _has_run(options.work, row.name)):
                continue
            lacking = [n for n in row.before if n not in done or not _has_run(options.work, n)]
            if lacking:
                print(f"{row.name} needs {', '.join(lacking)}, not done yet: left out")
                continue
            if row.study and row.name not in needed:
                taken = taken_row(row)
                if taken is None:
                    print(f"{row.name} is experiments/{row.study}.py's, not done yet: left out")
                else:
                    _keep(taken, options.out, locks / ".results")
                continue
            print(f"=== {number}/{len(missing)} {row.name}", flush=True)
            made = made_row(row, options.work / row.name, overrides, child)
            _keep(made, options.out, locks / ".results")
            # Of a calibrated model its description, which says from what and how it was made.
            manifests = ("manifest.json", f"{MODEL_FOLDER}/metadata.json")
            found = (options.work / row.name / name for name in manifests)
            manifest = next((file for file in found if file.is_file()), None)
            if manifest is not None:
                options.manifests.mkdir(parents=True, exist_ok=True)
                text = manifest.read_text(encoding="utf-8")
                for key, _, value in (word.partition("=") for word in overrides):
                    text = text.replace(value, "FOLDER") if key.endswith(FOLDERS) else text
                text = text.replace(str(options.work), "DIR")
                write_text_atomic(options.manifests / f"{row.name}.json", text)
            said = f"AP {made['AP']:.4f}" if "AP" in made else "done"
            print(f"=== {row.name}: {said}", flush=True)


def missing_rows(
    wanted: Iterable[Row],
    named: Mapping[str, Row],
    made: Iterable[Mapping[str, Any]],
    work: Path,
) -> list[Row]:
    """The rows to make, each after those that it starts from and whose runs are not there.

    Args:
      wanted: rows of which only those are made that are not yet.
      named: all rows of the study, by their names.
      made: what it has.
      work: folder of the runs.
    """
    done = {row["name"] for row in made}
    found: dict[str, Row] = {}

    def add(row: Row) -> None:
        for name in row.before:
            if name not in done or not _has_run(work, name):
                add(named[name])
        found.setdefault(row.name, row)

    for row in wanted:
        if row.name not in done:
            add(row)
    return list(found.values())


def _has_run(work: Path, name: str) -> bool:
    """Whether the run of a row is under ``work``, done."""
    return (work / name / MODEL_FOLDER / "manifest.json").is_file()


def taken_row(row: Row) -> dict[str, Any] | None:
    """The row that another study has made, with this one's facts; None = not made yet."""
    found = (made for made in rows_of(RESULTS / f"{row.study}.json") if made["name"] == row.name)
    made = next(found, None)
    return made and {**made, "facts": dict(row.facts), "study": row.study}


def _keep(made: Mapping[str, Any], file: Path, lock: Path) -> None:
    """Puts a row into a file into which others put theirs."""
    while True:
        try:
            held = lock_file(lock)
            break
        except WorkdirError:
            time.sleep(0.1)
    with contextlib.closing(held):
        kept = [other for other in rows_of(file) if other["name"] != made["name"]]
        write_json_atomic(file, {"draws": DRAWS, "rows": [*kept, made]}, indent=1)


class _Child:
    """The run that is under way."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self, command: Sequence[str]) -> None:
        if self._stopped:
            raise Stopped
        self._process = subprocess.Popen([sys.executable, "-m", "aqdetr_jax", *command])
        status = self._process.wait()
        self._process = None
        if self._stopped:
            raise Stopped
        if status != 0:
            raise SystemExit(f"aqdetr {' '.join(command)} ended with status {status}")

    def stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)


def made_row(
    row: Row, folder: Path, overrides: Sequence[str] = (), child: _Child | None = None
) -> dict[str, Any]:
    """Runs a row, or goes on with it; returns what is kept of it."""
    child = child or _Child()
    start = time.monotonic()
    if row.kind == "last":
        last_model(folder.parent / row.start, folder / LAST)
    judged = folder / JUDGED if row.judge else folder
    try:
        child.run(row.command(folder, overrides))
        if row.judge:
            child.run(row.judge_command(folder, overrides))
    except Stopped:
        raise SystemExit(75) from None
    known = {
        "name": row.name,
        "facts": dict(row.facts),
        "command": "aqdetr " + " ".join(row.command(_shown(row), hidden(overrides))),
        "cores": host.cores(),
    }
    if row.kind == "pretrain":
        commit = read_json(folder / "manifest.json")["starts"][-1]["commit"]
        return {**known, "commit": commit, "run_seconds": run_seconds(folder)}
    block = read_json(folder / "results.json")
    if row.judge:
        # Of the run: what made it. Of the last evaluation: every number.
        block = {
            **read_json(judged / "results.json"),
            **{key: block[key] for key in ("config", "seed", "commit")},
            "judge": "aqdetr " + " ".join(row.judge_command("DIR", hidden(overrides))),
            "own_AP": block["AP"],
        }
    config = load_experiment(row.config, (*row.overrides, *row.judge, *overrides))
    report = folder / "bit_report.json"
    size = read_json(report)["packed_bytes"] if report.is_file() else None
    truth = open_dataset(config.data, train=False).coco_ground_truth()
    draws = image_draws(len(truth["images"]), DRAWS)
    ap = bootstrap_ap(truth, Detections.read(judged, 0.0).results, draws)
    return {
        **known,
        **block,
        "run_seconds": run_seconds(folder) or round(time.monotonic() - start, 1),
        "packed_bytes": size,
        "AP_draws": [round(float(x), 5) for x in ap],
    }


def run_seconds(folder: Path) -> float:
    """What a training took in all its starts up to its last logged step; 0 if it is none."""
    file = folder / METRICS
    rows = read_lines(file) if file.is_file() else ()
    parts = [f"time/{part}" for part in PARTS]
    return round(sum(row.get(part, 0.0) for row in rows for part in parts), 1)


def _shown(row: Row) -> str:
    """The folder of a row as others would type it."""
    return f"DIR/{row.name}" if row.before else "DIR"


def hidden(overrides: Sequence[str]) -> list[str]:
    """Overrides as others would type them, without this machine's folders."""
    keys = [(word.partition("=")[0], word) for word in overrides]
    return [f"{k}=FOLDER" if k.endswith(FOLDERS) else word for k, word in keys]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows that a study has so far."""
    return read_json(path)["rows"] if path.is_file() else []
