"""A run done again from its manifest, and compared with what it was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aqdetr_jax.checkpoint.model_folder import MODEL_FOLDER, load_model
from aqdetr_jax.config_types import to_dataclass
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.io import read_json, write_json_atomic
from aqdetr_jax.parallel.hosts import is_main, say
from aqdetr_jax.paths import as_path
from aqdetr_jax.provenance import git_commit, package_versions
from aqdetr_jax.training import loop
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.faults import in_words
from aqdetr_jax.training.log import METRICS
from aqdetr_jax.training.metrics import CLOCK, read_lines
from aqdetr_jax.training.setup import model_checksums
from aqdetr_jax.training.workdir import platform_name
from aqdetr_jax.trees import flatten, path_name

REPORT = "rerun.json"
"""Name of the comparison in the new run's work directory."""


def rerun(manifest: str | Path, workdir: str | Path) -> dict[str, Any]:
    """Does a finished run again, and says where it differs.

    Args:
      manifest: ``manifest.json`` of a run, or its work directory. Beside it, the metrics and the
        model are compared one by one; a manifest alone has the checksum of the model, and the AP.
      workdir: of the new run, which goes on if it was begun.

    Returns:
      "equal" (the model to the last bit, and the results), "model" (whether the model is),
      "environment" (what is another now: name -> (then, now)), "results" (name -> (then, now) of
      those that differ), "first_step" (the first logged step that differs, None = none does),
      "metric" (which of its metrics), "weights" (of those that differ: their number, and the
      largest difference relative to the largest weight of its array), "steps_compared", "run"
      (which it is, its AP, and the commit that did it again).

    Raises:
      FileNotFoundError: no manifest there.
      ValueError: it is of no finished run, or of a version that did not keep enough.
      WorkdirError: the data or the models are not those of the run, or ``workdir`` holds another.
    """
    file = as_path(manifest)
    file = file / "manifest.json" if file.is_dir() else file
    known = read_json(file)
    missing = [key for key in ("config", "starts", "result") if key not in known]
    if missing:
        raise ValueError(
            f"{file} lacks {', '.join(missing)}: it is no manifest of a finished run of "
            "`aqdetr train` or `pretrain`"
        )
    config = to_dataclass(ExperimentConfig, known["config"], f"{file}: config")
    environment = _environment(known)
    for name, (then, now) in environment.items():
        say(f"{name} was {then}, is {now}")
    _check_inputs(file, known, config)
    loop.train(config, workdir)
    made = compare(file, as_path(workdir))
    made["environment"] = {name: list(values) for name, values in environment.items()}
    made["run"] = {
        "name": config.name,
        "seed": config.seed,
        "manifest": str(manifest),
        "starts": len(known["starts"]),
        "AP": known["result"]["results"].get("AP"),
        "commit": git_commit(),
    }
    if is_main():
        write_json_atomic(as_path(workdir) / REPORT, made)
    return made


def _environment(known: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between the machine of the run's last start and this one."""
    start = known["starts"][-1]
    then = {
        **{f"version of {name}": value for name, value in start["versions"].items()},
        **{key: start.get(key) for key in ("commit", "platform", "device", "devices", "processes")},
    }
    now = {
        **{f"version of {name}": value for name, value in package_versions().items()},
        "commit": git_commit(),
        "platform": platform_name(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }
    return {
        name: (then.get(name), now.get(name)) for name in then if then.get(name) != now.get(name)
    }


def _check_inputs(file: Path, known: Mapping[str, Any], config: ExperimentConfig) -> None:
    """Errors for other data or other models than the run had."""
    recorded = known.get("dataset")
    found = {
        "train": open_dataset(config.data, train=True).fingerprint,
        "eval": open_dataset(config.data, train=False).fingerprint,
    }
    if recorded is not None and recorded != found:
        raise ValueError(f"{file}: the run's data were {recorded}, they are {found} now")
    for key, checksum in model_checksums(config).items():
        before = known.get("models", {}).get(key)
        if before is not None and before != checksum:
            raise ValueError(
                f"{file}: the model of config.{key} "
                + ("is not there any more" if checksum is None else "is another one now")
            )


def compare(manifest: Path, workdir: Path) -> dict[str, Any]:
    """What differs between a run and another of the same configuration.

    Args:
      manifest: of the first.
      workdir: of the second.

    Returns:
      See :func:`rerun`; "environment" and "run" are left out.
    """
    before = read_json(manifest)["result"]
    after = read_json(workdir / "manifest.json")["result"]
    results = {
        name: [value, after["results"].get(name)]
        for name, value in before["results"].items()
        if value != after["results"].get(name)
    }
    same = before["model"] == after["model"]
    made: dict[str, Any] = {
        "equal": same and not results,
        "model": same,
        "results": results,
        "first_step": None,
        "metric": None,
        "steps_compared": 0,
        "weights": None,
    }
    folder = manifest.parent
    if (folder / METRICS).is_file():
        made |= _first_difference(folder / METRICS, workdir / METRICS)
    if not same and (folder / MODEL_FOLDER).is_dir():
        made["weights"] = _weight_difference(folder, workdir)
    return made


def _first_difference(before: Path, after: Path) -> dict[str, Any]:
    """The first logged step at which two runs differ in anything but speed."""
    rows = [_by_step(path) for path in (before, after)]
    steps = sorted(rows[0].keys() & rows[1].keys())
    for step in steps:
        one, other = rows[0][step], rows[1][step]
        for name in sorted(one.keys() & other.keys()):
            if one[name] != other[name] and not name.startswith(CLOCK):
                found = {"first_step": step, "metric": name, "values": [one[name], other[name]]}
                return {**found, "steps_compared": len(steps)}
    return {"steps_compared": len(steps)}


def _by_step(path: Path) -> dict[int, dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for line in read_lines(path):
        rows.setdefault(line["step"], {}).update(line)
    return rows


def _weight_difference(before: Path, after: Path) -> dict[str, Any]:
    """How many arrays of two models differ, and by how much at most."""
    one, other = (dict(flatten(load_model(path).variables)) for path in (before, after))
    largest, worst, count = 0.0, "", 0
    for path, value in one.items():
        if path not in other or other[path].shape != value.shape:
            raise ValueError(f"{path_name(path)} is not the same array in {before} and {after}")
        if np.array_equal(value, other[path]):
            continue
        count += 1
        scale = float(np.max(np.abs(value))) or 1.0
        difference = float(np.max(np.abs(value - other[path]))) / scale
        if not math.isfinite(difference) or difference >= largest:
            largest, worst = difference, path_name(path)
    return {"arrays": count, "of": len(one), "largest": largest, "worst": worst}


def format_rerun(made: Mapping[str, Any]) -> str:
    """The comparison, for people."""
    lines = []
    if made["steps_compared"]:
        text = f"metrics of {made['steps_compared']} logged steps: "
        if made["first_step"] is None:
            text += "the same"
        else:
            then, now = made["values"]
            text += f"differ from step {made['first_step']} on ({made['metric']}: {then}, {now})"
        lines.append(text)
    lines.append(f"model: {'equal to the last bit' if made['model'] else 'differs'}")
    weights = made["weights"]
    if weights:
        lines[-1] += (
            f" in {weights['arrays']} of {weights['of']} arrays, by {weights['largest']:.2g} of an "
            f"array's largest value at most ({weights['worst']})"
        )
    if made["results"]:
        shown = [f"{k} {then} -> {now}" for k, (then, now) in made["results"].items()]
        lines.append(f"results differ: {in_words(shown)}")
    else:
        lines.append("results: the same")
    if made["environment"]:
        lines.append(f"another here: {in_words(list(made['environment']))}")
    return "\n".join(lines)
