"""The main job in minutes: a float detector becomes a 4-bit one, on data that comes along."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from aqdetr_jax.checkpoint.model_folder import TEACHERS, load_model
from aqdetr_jax.compress import compress
from aqdetr_jax.paths import as_path
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.training.experiment import load_experiment
from aqdetr_jax.training.loop import train


def quickstart(
    workdir: str | Path,
    *,
    model: str = "detr",
    from_scratch: bool = False,
    baseline: bool = False,
    overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Load (or train) the teacher, calibrate, train the 4-bit student, evaluate all, report.

    Args:
      workdir: folder for everything; run it again to go on after an interruption.
      model: family of the model, "detr" or "deformable".
      from_scratch: train the float teacher too (pretraining first).
      baseline: also train plain LSQ (no auxiliary queries, no distillation) for as many steps.
      overrides: ``a.b=value`` texts applied to the student's configuration.

    Returns:
      The content of ``results.json``: a results block each for "teacher", "calibrated",
      "student" and, if asked for, "baseline".
    """
    start = time.perf_counter()
    git_commit()  # remembered from here on: results belong to the code that is running now
    workdir = as_path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if model not in TEACHERS:
        raise ValueError(f"unknown model {model!r}: one of {', '.join(TEACHERS)}")
    teacher_path = TEACHERS[model]
    prefix = "" if model == "detr" else f"{model}-"
    # Another model or teacher, another run: several may be in the same folder.
    runs = {name: f"{prefix}{name}" for name in ("student", "baseline")}
    if from_scratch:
        teacher_path = train_teacher(workdir, overrides, model)
        runs = {name: f"{run}_from_scratch" for name, run in runs.items()}
    student_config = load_experiment(
        f"shapes_quickstart:{prefix}aqdetr", overrides, init_from=str(teacher_path)
    )
    configs = {"student": student_config}
    if baseline:
        configs["baseline"] = load_experiment(
            f"shapes_quickstart:{prefix}baseline", overrides, init_from=str(teacher_path)
        )
    return compress(
        workdir,
        teacher=load_model(teacher_path),
        configs=configs,
        runs=runs,
        title="From a float detector to a low-bit one",
        start=start,
    )


def train_teacher(workdir: Path, overrides: tuple[str, ...] = (), model: str = "detr") -> Path:
    """Pretrains the backbone and trains the float teacher; returns its work directory.

    Args:
      workdir: "pretrain" and "teacher" are made in it ("deformable-pretrain", ...).
      overrides: those of the data (``data.a=value``) hold here too: teacher and student must see
        the same set.
      model: family of the model.
    """
    overrides = tuple(o for o in overrides if o.removeprefix("--config.").startswith("data."))
    print("0. the float teacher from scratch: dense pretraining, then the detector")
    prefix = "" if model == "detr" else f"{model}-"
    pretrain, teacher = workdir / f"{prefix}pretrain", workdir / f"{prefix}teacher"
    train(load_experiment(f"shapes_pretrain:{model}", overrides), pretrain)
    train(load_experiment(f"shapes_teacher:{model}", overrides, init_from=str(pretrain)), teacher)
    return teacher
