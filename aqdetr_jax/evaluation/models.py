"""Whole models judged on an evaluation set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from aqdetr_jax.checkpoint.model_folder import InputRule, ModelBundle
from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.data.first import FirstImages
from aqdetr_jax.data.fit import fitted
from aqdetr_jax.data.notices import say_findings
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.data.pipeline import PipelineConfig
from aqdetr_jax.data.suspicious import check_pixel_boxes
from aqdetr_jax.evaluation.coco import results_block
from aqdetr_jax.evaluation.evaluator import Detections, Evaluator, Outputs
from aqdetr_jax.interop.labels import placeholders
from aqdetr_jax.parallel.hosts import say
from aqdetr_jax.parallel.mesh import make_mesh
from aqdetr_jax.provenance import git_commit


def evaluate_bundle(
    bundle: ModelBundle,
    data: DataConfig,
    name: str,
    *,
    batch_size: int,
    seed: int = 0,
    rule: InputRule | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], Detections]:
    """Results block and detections of a model on a configuration's evaluation set.

    Args:
      bundle: the model.
      data: whose evaluation set is used.
      name: name in the results block.
      batch_size: images a batch, over all devices.
      seed: in the results block, where the model does not know its own.
      rule: how images become network input; the model's own when None.
      progress: called with (batches done, batches).

    Classes are matched by name: a model may know more of them than the set, whose names may have
    other ids.

    Raises:
      ValueError: the set has classes that the model does not know, or all of its boxes are
        normalised.
    """
    dataset = open_dataset(data, train=False)
    evaluator = bundle_evaluator(bundle, dataset, data, batch_size=batch_size, rule=rule)
    metrics, detections = evaluator.evaluate(bundle.variables, progress)
    block = results_block(
        metrics,
        images=len(dataset),
        config=name,
        seed=int(bundle.info.get("seed", seed)),
        commit=git_commit(),
        seconds=detections.seconds,
    )
    return block, detections


def bundle_evaluator(
    bundle: ModelBundle,
    dataset: DetectionDataset,
    data: DataConfig,
    *,
    batch_size: int,
    rule: InputRule | None = None,
    first: int | None = None,
    outputs: Outputs | None = None,
) -> Evaluator:
    """The evaluator of a model, whose classes are the set's by name.

    Args:
      bundle: the model; its variables are not looked at.
      dataset: the evaluation set.
      data: how it is read.
      batch_size: images a batch, over all devices.
      rule: how images become network input; the model's own when None.
      first: images of the set that are evaluated; None = all.
      outputs: see ``Evaluator``.

    Raises:
      ValueError: see :func:`evaluate_bundle`.
    """
    known = set(bundle.class_names)
    unknown = tuple(name for name in dataset.class_names if name not in known)
    if unknown:
        nameless = bundle.class_names == placeholders(len(bundle.class_names))
        remedy = (
            "its classes have no names: aqdetr convert --classes=FILE gives them"
            if nameless
            else "evaluate it on those it was trained on, or first train it on such data (aqdetr "
            "train with --config.init_from=MODEL)"
        )
        raise ValueError(
            f"{dataset.name} has {_some(unknown)} that the model, with its "
            f"{_some(bundle.class_names)}, does not know: classes are matched by name; {remedy}"
        )
    ids = dict(zip(dataset.class_names, dataset.category_ids, strict=True))
    if len(bundle.class_names) > len(ids):
        say(
            f"{dataset.name} has {len(ids)} of the model's {len(bundle.class_names)} classes: "
            "detections of the others are left out"
        )
    check_pixel_boxes(dataset)
    say_findings(dataset)
    return Evaluator(
        bundle.module(),
        dataset if first is None else FirstImages(dataset, first),
        dataclasses.replace(
            PipelineConfig.from_data(data, train=False, batch_size=batch_size),
            **(rule or bundle.input).pipeline(),
        ),
        make_mesh(),
        [ids.get(name) for name in bundle.class_names],
        outputs=outputs,
    )


INPUT_KEYS = {
    "data.buckets": "buckets",
    "data.eval_buckets": "buckets",
    "data.eval_short_side": "short_side",
    "data.eval_max_size": "max_size",
}
"""The keys of a configuration that say how images become network input at evaluation, and the part
of a model's rule that each replaces; ``data.fit`` replaces all."""


def input_rule(bundle: ModelBundle, data: DataConfig, given: Sequence[str]) -> InputRule:
    """How a model's images are prepared: by its own rule, but for what the command line says.

    What is used is said, and where it comes from.

    Args:
      bundle: the model.
      data: the configuration with the overrides applied.
      given: the keys of the command line.
    """
    rule = bundle.input
    keys = [key for key in ("data.fit", *INPUT_KEYS) if key in given]
    if "data.fit" in keys:
        train_set = open_dataset(data, train=True)
        data = fitted(data, train_set, bundle.config.backbone.output_stride)
        rule = InputRule.from_data(data)
    new = InputRule.from_data(data)
    parts = {INPUT_KEYS[key] for key in keys if key != "data.fit"}
    rule = dataclasses.replace(rule, **{part: getattr(new, part) for part in parts})
    source = f"the model's own but for {', '.join(keys)}" if keys else "the model's own"
    say(f"image rule, {source}: {rule.describe()}")
    return rule


def _some(names: tuple[str, ...]) -> str:
    """A list of names for a message, not too long."""
    return f"{len(names)} classes ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
