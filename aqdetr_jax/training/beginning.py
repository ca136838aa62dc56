"""What a run finds in its work directory, or makes before its first step."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax

from aqdetr_jax.checkpoint.model_folder import MODEL_FOLDER, ModelBundle, load_model
from aqdetr_jax.checkpoint.transfer import match_classes
from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.evaluation.evaluator import Detections
from aqdetr_jax.io import read_json, write_json_atomic, write_text_atomic
from aqdetr_jax.models.dense import DensePretrainer
from aqdetr_jax.models.detector import Detector, record_ops
from aqdetr_jax.parallel.hosts import agree, is_main, say
from aqdetr_jax.quant.report import bit_report, format_bit_report
from aqdetr_jax.training import initial, setup
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.phases import check_phases
from aqdetr_jax.training.state import TrainState


def finished(
    workdir: Path, *, judged: bool
) -> tuple[ModelBundle, dict[str, Any] | None, Detections | None] | None:
    """What a finished run left in the work directory, else None.

    Args:
      workdir: of the run.
      judged: whether a run of its kind ends with an evaluation.

    Returns:
      (model, results block, detections).
    """
    results = workdir / "results.json"  # written last of all
    if judged:
        if not agree(results.is_file()):
            return None
        block = read_json(results)
        return load_model(workdir), block, Detections.read(workdir, block["seconds"])
    done = agree((workdir / MODEL_FOLDER / "manifest.json").is_file())
    return (load_model(workdir), None, None) if done else None


def first_variables(
    config: ExperimentConfig, module: Detector | DensePretrainer, train_set: DetectionDataset
) -> dict[str, Any]:
    """The variables before the first step, and a word on where they come from."""
    source = setup.load_source(config.init_from, "init_from") if config.init_from else None
    if source is not None:
        source = match_classes(source, train_set.class_names)
    with contextlib.closing(setup.calibration_pipeline(config, train_set)) as batches:
        values, report = initial.initial_variables(config, module, source, batches)
    if report is not None:
        say(f"{config.init_from}: {report.summary()}")
    elif config.task == "detect":
        say(
            f"training from scratch on {len(train_set)} images: a DETR needs pretrained "
            "features (aqdetr pretrain, then config.init_from); expect a low AP"
        )
    return values


def write_bits(
    workdir: Path, config: ExperimentConfig, module: Detector, state: TrainState
) -> None:
    """The bit report of the inference model, with every run."""
    bucket = (config.data.eval_buckets or config.data.buckets)[0]
    shapes = jax.eval_shape(lambda s: s.evaluated, state)
    rows = record_ops(module, shapes, bucket)
    setup.check_patterns(config, [row.path for row in rows], state.params)
    check_phases(config, rows, state.params)
    report = bit_report(rows)
    if not is_main():
        return
    write_json_atomic(workdir / "bit_report.json", report)
    write_text_atomic(workdir / "bit_report.txt", format_bit_report(report) + "\n")
