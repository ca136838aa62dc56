"""The main job in minutes: a float detector becomes a 4-bit one, on data that comes along."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aqdetr_jax.checkpoint.model_folder import load_model
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.evaluation.coco import format_results
from aqdetr_jax.evaluation.evaluator import Detections
from aqdetr_jax.evaluation.models import evaluate_bundle
from aqdetr_jax.io import write_json_atomic
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.reporting import write_run_report
from aqdetr_jax.training.bundles import calibrated_bundle
from aqdetr_jax.training.experiment import load_experiment
from aqdetr_jax.training.loop import train

TEACHERS: dict[str, str | Path] = {
    "detr": "packaged:shapes_teacher",
    "deformable": "packaged:shapes_deformable_teacher",
}
"""The float teachers of the embedded set that come with the package."""


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
    workdir = Path(workdir)
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
    teacher = load_model(teacher_path)

    print("1. the float teacher, and the same weights at 4 bits after calibration only")
    blocks: dict[str, dict[str, Any]] = {}
    found: dict[str, Detections] = {}
    blocks["teacher"], found["teacher"] = evaluate_bundle(
        teacher, student_config.data, "teacher", batch_size=student_config.train.eval_batch_size
    )
    print(f"   teacher     AP {blocks['teacher']['AP']:.4f}")
    calibrated = calibrated_bundle(student_config, teacher)
    blocks["calibrated"], found["calibrated"] = evaluate_bundle(
        calibrated,
        student_config.data,
        "calibrated",
        batch_size=student_config.train.eval_batch_size,
    )
    print(f"   calibrated  AP {blocks['calibrated']['AP']:.4f}")

    print("2. the 4-bit student: auxiliary queries and layer-by-layer attention distillation")
    student = train(student_config, workdir / runs["student"])
    assert student.block is not None
    assert student.detections is not None
    blocks["student"], found["student"] = student.block, student.detections
    if baseline:
        print("3. the baseline: plain LSQ for as many steps")
        config = load_experiment(
            f"shapes_quickstart:{prefix}baseline", overrides, init_from=str(teacher_path)
        )
        lsq = train(config, workdir / runs["baseline"])
        assert lsq.block is not None
        blocks["baseline"] = lsq.block

    write_json_atomic(workdir / "results.json", blocks)
    report = write_run_report(
        workdir,
        title="From a float detector to a 4-bit one",
        summary=_summary(blocks, time.perf_counter() - start),
        blocks=blocks,
        curves={
            name: workdir / run / "metrics.jsonl" for name, run in runs.items() if name in blocks
        },
        detections={name: d.results for name, d in found.items() if name != "calibrated"},
        dataset=open_dataset(student_config.data, train=False),
        pictures=student_config.train.pictures,
        teacher=teacher,
        student=student.bundle,
        bits=workdir / runs["student"] / "bit_report.json",
        manifest=workdir / runs["student"] / "manifest.json",
    )
    for name, block in blocks.items():
        print(f"\n{name}\n{format_results(block)}")
    kept = blocks["student"]["AP"] / max(blocks["teacher"]["AP"], 1e-9)
    where = f"report: {report}" if report else f"results: {workdir / 'results.json'}"
    print(f"\nthe 4-bit student keeps {kept:.1%} of the teacher's AP; {where}")
    return blocks


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


def _summary(blocks: Mapping[str, Mapping[str, Any]], seconds: float) -> list[str]:
    teacher, student = blocks["teacher"]["AP"], blocks["student"]["AP"]
    text = (
        f"The float teacher reaches AP {teacher:.3f} on {blocks['teacher']['images']} images. With "
        f"4-bit weights, activations and attention it falls to {blocks['calibrated']['AP']:.3f} by "
        f"calibration alone; trained with auxiliary queries and attention distillation it reaches "
        f"{student:.3f}, {student / max(teacher, 1e-9):.1%} of the teacher."
    )
    if "baseline" in blocks:
        text += f" Plain LSQ, trained as long, reaches {blocks['baseline']['AP']:.3f}."
    return [
        text,
        f"This command took {seconds / 60:.1f} minutes; what was finished is not done again.",
    ]
