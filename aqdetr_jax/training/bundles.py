"""Whole models: what a run leaves, judged on an evaluation set, or calibrated without training."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from aqdetr_jax.checkpoint.model_folder import InputRule, ModelBundle
from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.quant.spec import GRID_PARAMETERS
from aqdetr_jax.training import initial, setup, sizing
from aqdetr_jax.training.config import ExperimentConfig


def run_bundle(
    config: ExperimentConfig,
    train_set: DetectionDataset,
    eval_set: DetectionDataset,
    variables: dict[str, Any],
    block: Mapping[str, Any] | None,
) -> ModelBundle:
    """The model that a run leaves, with the facts that say where it comes from.

    Args:
      config: the run's configuration.
      train_set: gives the classes.
      eval_set: for its fingerprint.
      variables: what is kept, on the host.
      block: its results block, None after a pretraining.
    """
    info = {
        "name": config.name,
        "task": config.task,
        "seed": config.seed,
        "steps": config.train.steps,
        "commit": git_commit(),
        "data": {"train": train_set.fingerprint, "eval": eval_set.fingerprint},
    }
    if block is not None:
        info["results"] = {k: v for k, v in block.items() if k != "per_class"}
    return ModelBundle(
        config.model,
        config.quant,
        InputRule.from_data(config.data),
        train_set.class_names,
        train_set.category_ids,
        variables,
        info,
    )


def calibrated_bundle(config: ExperimentConfig, teacher: ModelBundle) -> ModelBundle:
    """The quantized model before any training: the teacher's weights, calibrated step sizes."""
    dataset = open_dataset(config.data, train=True)
    config = inference_config(config, dataset)
    with contextlib.closing(setup.calibration_pipeline(config, dataset)) as batches:
        return quantized_bundle(config, teacher, batches)


def inference_config(config: ExperimentConfig, train_set: DetectionDataset) -> ExperimentConfig:
    """The configuration with the sizes of its data, and without auxiliary queries."""
    config = sizing.with_data(config, train_set)
    model = dataclasses.replace(config.model, num_auxiliary=0, auxiliary_groups=1)
    return dataclasses.replace(config, model=model)


def quantized_bundle(
    config: ExperimentConfig,
    teacher: ModelBundle,
    batches: Iterable[Mapping[str, np.ndarray]] | None,
) -> ModelBundle:
    """The quantized model with the teacher's weights.

    Args:
      config: from :func:`inference_config`.
      teacher: a float model.
      batches: what sets the step sizes; None leaves them without a value.

    Raises:
      ValueError: the teacher is another model than the configuration's.
    """
    module = setup.build_module(config)
    variables, report = initial.initial_variables(config, module, teacher, batches)
    assert report is not None  # there is a source
    new = [path for path in report.new if not path.endswith(GRID_PARAMETERS)]
    unknown = report.mismatched + new
    if unknown:
        raise ValueError(
            f"{config.name} is not the model of the checkpoint it would calibrate: {unknown[:3]} "
            "would keep random values"
        )
    return dataclasses.replace(
        teacher, config=config.model, quant=config.quant, variables=variables, info={}
    )
