"""A folder of one's own images becomes a low-bit detector: every stage in one command."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aqdetr_jax.checkpoint.model_folder import load_model
from aqdetr_jax.checkpoint.steps import newest_step
from aqdetr_jax.compress import compress
from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.parallel.hosts import say
from aqdetr_jax.paths import as_path
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.training import sizing
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.data_check import check_data
from aqdetr_jax.training.estimate import estimate
from aqdetr_jax.training.loop import train
from aqdetr_jax.training.metrics import format_seconds
from aqdetr_jax.training.resume import check_resumable
from aqdetr_jax.training.stages import make_stages

TITLES = {
    "pretrain": "backbone and encoder, by dense pretraining on these images",
    "teacher": "float teacher",
    "student": "low-bit student (AQ-DETR)",
    "baseline": "low-bit baseline (LSQ)",
}
FLOAT = ("pretrain", "teacher")


def finetune(root: str, workdir: str | Path, **options: Any) -> dict[str, Any]:
    """Backbone, float teacher, calibrated and trained low-bit student, report.

    Run it again to go on after an interruption, at any stage; what is finished is not done again.

    Args:
      root: folder of the data set, in any layout of ``data.layout``.
      workdir: folder for everything; one folder a stage.
      **options: of ``stages.make_stages``.

    Returns:
      The content of ``results.json``: a results block for each model.

    Raises:
      ValueError, FileNotFoundError and their kin: bad input, before anything is trained.
    """
    start = time.perf_counter()
    git_commit()  # remembered from here on: results belong to the code that is running now
    workdir = as_path(workdir)
    stages = plan(root, workdir, **options)
    for name in FLOAT:
        if name in stages:
            print(f"\n{TITLES[name]}")
            train(stages[name], workdir / name)
    low = {name: config for name, config in stages.items() if name not in FLOAT}
    return compress(
        workdir,
        teacher=load_model(workdir / "teacher"),
        teacher_run="teacher",
        configs=low,
        runs={name: name for name in low},
        title=f"{as_path(root).resolve().name}: from images to a low-bit detector",
        start=start,
    )


def plan(root: str, workdir: Path, **options: Any) -> dict[str, ExperimentConfig]:
    """The stages with the sizes that follow from the data; says what was found and what they take.

    Raises:
      ValueError, FileNotFoundError and their kin: see ``finetune``.
    """
    given = make_stages(root, workdir, **options)
    data = given["teacher"].data
    train_set, eval_set = (open_dataset(data, train=which) for which in (True, False))
    stages = {name: check_data(config, train_set, eval_set) for name, config in given.items()}
    sizing.say_sizes(given["student"], stages["student"], train_set)
    for name, config in stages.items():
        check_resumable(config, workdir / name, train_set, eval_set)
    _say_times(workdir, stages, train_set, eval_set)
    return stages


def _say_times(
    workdir: Path,
    stages: Mapping[str, ExperimentConfig],
    train_set: DetectionDataset,
    eval_set: DetectionDataset,
) -> None:
    """Measures and says what each stage that is left will take on this machine."""
    left = [name for name in stages if not (workdir / name / "model" / "manifest.json").is_file()]
    if not left:
        return
    say(f"measuring {len(left)} kinds of step on this machine (compiled once, then kept) ...")
    total = 0.0
    for name in left:
        config = stages[name]
        found = estimate(config, train_set, eval_set)
        done = newest_step(workdir / name / "checkpoints") or 0
        seconds = found.step * (found.steps - done) + found.evaluations
        total += seconds
        say(
            f"  {TITLES[name]}: {found.steps - done} steps of {config.train.batch_size} images at "
            f"{found.step:.2f} s, about {format_seconds(seconds)}"
        )
    say(f"about {format_seconds(total)} in all; every stage goes on where it was stopped")
