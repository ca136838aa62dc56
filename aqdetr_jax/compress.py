"""From a float teacher to a low-bit student: calibrated, trained, judged and reported.

What the quickstart and ``finetune`` have in common.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aqdetr_jax.checkpoint.model_folder import ModelBundle
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.deploy.export import deployed_bundle
from aqdetr_jax.deploy.packed import write_packed
from aqdetr_jax.deploy.speed import in_words, speed_of
from aqdetr_jax.evaluation.coco import format_results
from aqdetr_jax.evaluation.evaluator import Detections
from aqdetr_jax.evaluation.models import evaluate_bundle
from aqdetr_jax.io import folder_bytes, read_json, write_json_atomic
from aqdetr_jax.reporting import spare, write_run_report
from aqdetr_jax.training.bundles import calibrated_bundle
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.loop import train
from aqdetr_jax.training.sizing import eval_batch_size

PACKED = "packed"
"""Folder of the student as it is deployed, see ``deploy.packed``."""

_FOUND_NOTHING = 0.01
"""AP of a teacher below which its students' share of it says nothing."""


def compress(
    workdir: Path,
    *,
    teacher: ModelBundle,
    configs: Mapping[str, ExperimentConfig],
    runs: Mapping[str, str],
    title: str,
    start: float,
    teacher_run: str = "",
) -> dict[str, Any]:
    """Judges the teacher, calibrates and trains the students, writes results and report.

    Args:
      workdir: folder of everything; what is finished in it is not done again.
      teacher: the float model.
      configs: "student" and, if wanted, "baseline".
      runs: the folder in ``workdir`` of each.
      title: of the report.
      start: ``time.perf_counter()`` when the command started.
      teacher_run: the folder in ``workdir`` of the run that trained the teacher and judged it on
        the same images; "" = the teacher is judged here.

    Returns:
      The content of ``results.json``: a results block each for "teacher", "calibrated",
      "student" and, if asked for, "baseline".
    """
    config = configs["student"]
    bits = config.quant.policy

    def judge(bundle: ModelBundle, name: str) -> None:
        block, detections = evaluate_bundle(
            bundle, config.data, name, batch_size=eval_batch_size(config)
        )
        blocks[name], found[name] = block, detections
        print(f"   {name:<11} AP {block['AP']:.4f}")

    print(f"1. the float teacher, and the same weights at {bits} after calibration only")
    blocks: dict[str, dict[str, Any]] = {}
    found: dict[str, Detections] = {}
    if teacher_run:
        blocks["teacher"] = read_json(workdir / teacher_run / "results.json")
        found["teacher"] = Detections.read(workdir / teacher_run, blocks["teacher"]["seconds"])
        print(f"   teacher     AP {blocks['teacher']['AP']:.4f}")
    else:
        judge(teacher, "teacher")
    # Kept with the student's run, whose configuration it has.
    kept = workdir / runs["student"] / "calibrated.json"
    if kept.is_file():
        blocks["calibrated"] = read_json(kept)
        print(f"   calibrated  AP {blocks['calibrated']['AP']:.4f}")
    else:
        judge(calibrated_bundle(config, teacher), "calibrated")

    print(f"2. the {bits} student: auxiliary queries and layer-by-layer attention distillation")
    student = train(config, workdir / runs["student"])
    assert student.block is not None
    assert student.detections is not None
    blocks["student"], found["student"] = student.block, student.detections
    write_json_atomic(kept, blocks["calibrated"])
    if "baseline" in configs:
        print("3. the baseline: plain LSQ for as many steps")
        lsq = train(configs["baseline"], workdir / runs["baseline"])
        assert lsq.block is not None
        blocks["baseline"] = lsq.block

    write_json_atomic(workdir / "results.json", blocks)
    notes: list[str] = []
    packed: Path | None = None
    spoken = ""
    with spare("the packed model", notes):
        write_packed(
            workdir / PACKED, deployed_bundle(student.bundle, f"{workdir / runs['student']}")
        )
        packed = workdir / PACKED
    with spare("the comparison of speed", notes):
        speed = speed_of(student.bundle, teacher, workdir / "onnx")
        spoken = in_words(speed) if speed else ""
    report = write_run_report(
        workdir,
        title=title,
        summary=_summary(blocks, bits, time.perf_counter() - start, spoken),
        blocks=blocks,
        curves={
            name: workdir / run / "metrics.jsonl"
            for name, run in {"teacher": teacher_run, **runs}.items()
            if run and name in blocks
        },
        detections={name: d.results for name, d in found.items() if name != "calibrated"},
        dataset=open_dataset(config.data, train=False),
        pictures=config.train.pictures,
        teacher=teacher,
        student=student.bundle,
        bits=workdir / runs["student"] / "bit_report.json",
        manifest=workdir / runs["student"] / "manifest.json",
        packed=packed,
        notes=notes,
    )
    for name, block in blocks.items():
        print(f"\n{name}\n{format_results(block)}")
    where = f"report: {report}" if report else f"results: {workdir / 'results.json'}"
    if packed is not None:
        size = folder_bytes(packed) / 1024
        print(f"\nas integers: {packed}, {size:.0f} KiB (aqdetr predict --model={packed} IMAGE)")
    if spoken:
        print(spoken)
    print(f"{verdict(blocks, bits)}; {where}")
    return blocks


def verdict(blocks: Mapping[str, Mapping[str, Any]], bits: str) -> str:
    """What of the teacher's AP the student keeps, in words, from their results blocks."""
    teacher, student = blocks["teacher"]["AP"], blocks["student"]["AP"]
    if teacher < _FOUND_NOTHING:
        return (
            f"the float teacher finds next to nothing (AP {teacher:.3f}), so the {bits} student "
            "cannot be judged: train the teacher longer"
        )
    return f"the {bits} student keeps {student / teacher:.1%} of the teacher's AP"


def _summary(
    blocks: Mapping[str, Mapping[str, Any]], bits: str, seconds: float, speed: str
) -> list[str]:
    text = (
        f"The float teacher reaches AP {blocks['teacher']['AP']:.3f} on "
        f"{blocks['teacher']['images']} images. With weights, activations and attention at {bits} "
        f"it falls to {blocks['calibrated']['AP']:.3f} by calibration alone; trained with "
        f"auxiliary queries and attention distillation it reaches {blocks['student']['AP']:.3f}: "
        f"{verdict(blocks, bits)}."
    )
    if "baseline" in blocks:
        text += f" Plain LSQ, trained as long, reaches {blocks['baseline']['AP']:.3f}."
    return [
        text,
        *([speed] if speed else []),
        f"This command took {seconds / 60:.1f} minutes; what was finished is not done again.",
    ]
