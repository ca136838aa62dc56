"""A float model at few bits by calibration alone: the baseline of all training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aqdetr_jax.checkpoint.model_folder import MODEL_FOLDER, save_model
from aqdetr_jax.config_types import ConfigError, from_dataclass
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.evaluation.models import evaluate_bundle
from aqdetr_jax.io import write_json_atomic, write_text_atomic
from aqdetr_jax.models.detector import record_ops
from aqdetr_jax.paths import as_path
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.quant.report import bit_report, format_bit_report
from aqdetr_jax.training import setup, sizing
from aqdetr_jax.training.bundles import calibrated_bundle
from aqdetr_jax.training.config import ExperimentConfig


def ptq(
    config: ExperimentConfig,
    out: str | Path,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Calibrates the model of ``config.init_from``, judges it, and keeps all of it.

    Post-training quantization: the weights stay as they are; step sizes (zero points, offsets,
    channel scales) come from ``quant.calibration_batches`` training batches by
    ``quant.calibration_method``. What only training reads of a configuration is not looked at, so
    that a student's own serves.

    Args:
      config: of a student.
      out: folder for ``model``, ``results.json``, ``detections.json``, ``config.json`` and the bit
        report; those of an earlier calibration are replaced.
      progress: called with (batches done, batches) of the evaluation.

    Returns:
      The results block.

    Raises:
      ConfigError: there is nothing to calibrate, or nothing is quantized.
      ValueError, FileNotFoundError and their kin: bad input; the message names it.
    """
    if not config.quant.quantized:
        raise ConfigError(
            f"{config.name} quantizes nothing: --config.quant.policy=w4a4 (say) gives it bits"
        )
    if not config.init_from:
        raise ConfigError(
            f"{config.name} has no model to calibrate: --config.init_from=DIR leads to a float one"
        )
    source = setup.load_source(config.init_from, "init_from")
    if source.quant.quantized:
        raise ConfigError(
            f"config.init_from={config.init_from!r} is quantized ({source.quant.policy}): give the "
            "float model that it comes from"
        )
    out = as_path(out)
    out.mkdir(parents=True, exist_ok=True)
    bundle = calibrated_bundle(config, source)
    info = {
        "name": config.name,
        "task": config.task,
        "seed": config.seed,
        "steps": 0,
        "commit": git_commit(),
        "data": {
            "train": open_dataset(config.data, train=True).fingerprint,
            "eval": open_dataset(config.data, train=False).fingerprint,
        },
        "calibrated_from": {
            "path": config.init_from,
            "checksum": setup.model_checksums(config)["init_from"],
            "info": source.info,
        },
    }
    block, detections = evaluate_bundle(
        dataclasses.replace(bundle, info=info),
        config.data,
        config.name,
        batch_size=sizing.eval_batch_size(config),
        seed=config.seed,
        progress=progress,
    )
    info["results"] = {k: v for k, v in block.items() if k != "per_class"}
    rows = record_ops(bundle.module(), bundle.variables, bundle.input.buckets[0])
    report = bit_report(rows)
    save_model(out / MODEL_FOLDER, dataclasses.replace(bundle, info=info))
    write_json_atomic(out / "config.json", from_dataclass(config))
    write_json_atomic(out / "bit_report.json", report)
    write_text_atomic(out / "bit_report.txt", format_bit_report(report) + "\n")
    detections.write(out)
    write_json_atomic(out / "results.json", block)
    return block
