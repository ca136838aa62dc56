"""Whole models: what a run leaves, judged on an evaluation set, or calibrated without training."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.evaluation.coco import results_block
from aqdetr_jax.evaluation.evaluator import Detections, Evaluator
from aqdetr_jax.quant.spec import GRID_PARAMETERS
from aqdetr_jax.training import initial, setup
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.hosts import say
from aqdetr_jax.training.model_io import InputRule, ModelBundle
from aqdetr_jax.training.notices import say_drops
from aqdetr_jax.training.sharding import make_mesh
from aqdetr_jax.training.workdir import git_commit


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


def evaluate_bundle(
    bundle: ModelBundle,
    config: ExperimentConfig,
    name: str,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], Detections]:
    """Results block and detections of a model on a configuration's evaluation set.

    Args:
      bundle: the model.
      config: whose evaluation set and image rule are used.
      name: name in the results block.
      progress: called with (batches done, batches).

    Classes are matched by name: a model may know more of them than the set, whose names may have
    other ids.

    Raises:
      ValueError: the set has classes that the model does not know.
    """
    dataset = setup.open_dataset(config.data, train=False)
    known = set(bundle.class_names)
    unknown = tuple(name for name in dataset.class_names if name not in known)
    if unknown:
        raise ValueError(
            f"{dataset.name} has {_some(unknown)} that the model, with its "
            f"{_some(bundle.class_names)}, does not know: classes are matched by name; evaluate it "
            "on those it was trained on, or first train it on such data (config.init_from)"
        )
    ids = dict(zip(dataset.class_names, dataset.category_ids, strict=True))
    if len(bundle.class_names) > len(ids):
        say(
            f"{dataset.name} has {len(ids)} of the model's {len(bundle.class_names)} classes: "
            "detections of the others are left out"
        )
    say_drops(dataset)
    evaluator = Evaluator(
        bundle.module(),
        dataset,
        setup.pipeline_config(config, train=False),
        make_mesh(),
        [ids.get(name) for name in bundle.class_names],
    )
    metrics, detections = evaluator.evaluate(bundle.variables, progress)
    block = results_block(
        metrics,
        images=len(dataset),
        config=name,
        seed=int(bundle.info.get("seed", config.seed)),
        commit=git_commit(),
        seconds=detections.seconds,
    )
    return block, detections


def _some(names: tuple[str, ...]) -> str:
    """A list of names for a message, not too long."""
    return f"{len(names)} classes ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def calibrated_bundle(config: ExperimentConfig, teacher: ModelBundle) -> ModelBundle:
    """The quantized model before any training: the teacher's weights, calibrated step sizes."""
    dataset = setup.open_dataset(config.data, train=True)
    config = setup.with_data(config, dataset)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, num_auxiliary=0, auxiliary_groups=1)
    )
    module = setup.build_module(config)
    with contextlib.closing(setup.calibration_pipeline(config, dataset)) as batches:
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
