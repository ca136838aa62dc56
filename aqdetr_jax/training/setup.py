"""From a configuration to datasets, pipelines, modules and the models they start from."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from typing import Any

from flax import traverse_util

from aqdetr_jax.checkpoint.model_folder import ModelBundle, load_model, model_checksum
from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.data.pipeline import PipelineConfig, TrainBatches, make_train_pipeline
from aqdetr_jax.losses.distillation import DistillationWeights
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.dense import DensePretrainer
from aqdetr_jax.models.detector import Detector, build_detector
from aqdetr_jax.training.config import ExperimentConfig

logger = logging.getLogger(__name__)

CALIBRATION_ROWS = 8
"""Images of a calibration batch."""


def pipeline_config(
    config: ExperimentConfig, *, train: bool, start_step: int = 0
) -> PipelineConfig:
    """The input pipeline's parameters on this process."""
    return PipelineConfig.from_data(
        config.data,
        train=train,
        batch_size=config.train.batch_size if train else config.train.eval_batch_size,
        seed=config.seed,
        start_step=start_step,
    )


def calibration_pipeline(config: ExperimentConfig, dataset: DetectionDataset) -> TrainBatches:
    """Training batches for the step sizes: small ones, and the same on every process."""
    whole = dataclasses.replace(
        pipeline_config(config, train=True),
        batch_size=CALIBRATION_ROWS,
        process_index=0,
        process_count=1,
    )
    return make_train_pipeline(dataset, whole)


def check_patterns(config: ExperimentConfig, operations: Sequence[str], params: Any) -> None:
    """Every rule and pattern that the user wrote must match something.

    Raises:
      ValueError: one matches nothing; the message names it.
    """
    for rule in config.quant.rules:
        if not any(re.search(rule.pattern, path) for path in operations):
            raise ValueError(f"config.quant.rules: {rule.pattern!r} matches no operation")
    paths = traverse_util.flatten_dict(params, sep="/")
    for name in ("frozen", "slow"):
        for pattern in getattr(config.optimizer, name):
            if not any(re.search(pattern, path) for path in paths):
                raise ValueError(f"config.optimizer.{name}: {pattern!r} matches no parameter")


def build_module(config: ExperimentConfig) -> Detector | DensePretrainer:
    """The module that is trained."""
    if config.task == "pretrain":
        return DensePretrainer(config.model)
    return build_detector(config.model, config.quant.build())


def load_source(path: str, key: str) -> ModelBundle:
    """A model that a configuration key points to.

    Raises:
      FileNotFoundError: there is none; the message names the key.
    """
    try:
        return load_model(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"config.{key}={path!r}: {str(error).rstrip('.')}. Otherwise train that model "
            f"first, or set config.{key} to the folder of another run or model."
        ) from error


def teacher_key(config: ExperimentConfig) -> str | None:
    """The key that leads to the teacher network of a distillation, None without one."""
    if not config.distill.needs_teacher:
        return None
    return "distill.teacher" if config.distill.teacher else "init_from"


def model_checksums(config: ExperimentConfig) -> dict[str, str | None]:
    """The checksums of the models that a configuration points to, by key."""
    paths = {"init_from": config.init_from, "distill.teacher": config.distill.teacher}
    return {key: model_checksum(path) for key, path in paths.items() if path}


def load_teacher(config: ExperimentConfig) -> ModelBundle | None:
    """The float teacher of a distillation, or None; its activations in the student's dtype.

    Raises:
      ValueError: the teacher is a backbone or quantized, or its attention does not match the
        student's.
    """
    key = teacher_key(config)
    if key is None:
        return None
    path = config.distill.teacher or config.init_from
    if not path:
        raise ValueError(
            "config.distill.weights is not zero, but there is no teacher: set "
            "config.distill.teacher (or config.init_from) to the folder of a float model"
        )
    teacher = load_source(path, key)
    if "decoder" not in teacher.variables["params"]:
        raise ValueError(
            f"config.{key}={path!r} is a backbone and no teacher: start a float model from it, and "
            f"set config.{key} to the folder of that run"
        )
    if teacher.quant.quantized:
        raise ValueError(
            f"config.{key}={path!r} is quantized ({teacher.quant.policy}) and no teacher: set "
            "config.distill.teacher to a float model"
        )
    mine, theirs = (_compared(m, config.distill.weights) for m in (config.model, teacher.config))
    for name in mine:
        if mine[name] != theirs.get(name):
            raise ValueError(
                f"config.{key}={path!r} has {name}={theirs.get(name)}, the student has "
                f"{mine[name]}: their attention maps cannot be compared"
            )
    config_of = dataclasses.replace(teacher.config, dtype=config.model.dtype)
    return dataclasses.replace(teacher, config=config_of)


def _compared(model: DetrConfig, weights: DistillationWeights) -> dict[str, Any]:
    """What teacher and student must have in common, by name."""
    names = ["family"]
    decoder = weights.decoder_self + weights.decoder_cross > 0
    if decoder:
        names += ["decoder_layers", "num_queries"]
    if decoder or weights.kind == "output" or weights.foreground:
        names.append("dim")
    if not weights.maps:  # features of queries alone, which need not see the same tokens
        return {name: getattr(model, name) for name in names}
    names += ["encoder_layers", "heads"]
    wanted = {name: getattr(model, name) for name in names}
    wanted["backbone.output_stride"] = model.backbone.output_stride
    if model.family == "deformable":
        options = model.deformable
        wanted["deformable.levels"] = options.levels
        wanted["deformable.stages"] = min(options.stages, options.levels)
        wanted["deformable.points"] = options.points
        if decoder:
            wanted["deformable.two_stage"] = options.two_stage
    return wanted
