"""From a configuration to datasets, pipelines, modules and the models they start from."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from aqdetr_jax.data.dataset import DetectionDataset, load_dataset
from aqdetr_jax.data.pipeline import PipelineConfig, TrainBatches, make_train_pipeline
from aqdetr_jax.losses.distillation import DistillationWeights
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.dense import DensePretrainer
from aqdetr_jax.models.detector import Detector, build_detector
from aqdetr_jax.quant.record import OpRecord, recording
from aqdetr_jax.training.config import DataConfig, ExperimentConfig
from aqdetr_jax.training.model_io import ModelBundle, load_model

logger = logging.getLogger(__name__)

CALIBRATION_ROWS = 8
"""Images of a calibration batch."""


def open_dataset(data: DataConfig, *, train: bool) -> DetectionDataset:
    """The training or evaluation set of a configuration.

    Raises:
      DatasetError, FileNotFoundError: the set cannot be opened; the message names the culprit.
    """
    split = data.train_split if train else data.eval_split
    if data.kind == "shapes":
        count = data.num_train if train else data.num_eval
        return _generated_set(split, data.image_size, count, data.set_seed, data.cache_dir or None)
    if data.kind == "coco":
        if data.root:
            return load_dataset("coco", root=data.root, split=split)
        images = data.train_images if train else data.eval_images
        annotations = data.train_annotations if train else data.eval_annotations
        which = "train" if train else "eval"
        for name, value in ((f"{which}_images", images), (f"{which}_annotations", annotations)):
            if not value:
                raise ValueError(f"config.data.{name} is empty: set it (or config.data.root)")
        return load_dataset("coco", images_dir=images, annotation_file=annotations, split=split)
    if not data.root:
        raise ValueError(f"config.data.root is empty: set it to the folder of the {data.kind} set")
    if data.kind == "voc":
        return load_dataset("voc", root=data.root, split=split)
    return load_dataset("tfds", data_dir=data.root, split=split)


@functools.lru_cache(maxsize=2)
def _generated_set(split, size, num_images, seed, cache_dir) -> DetectionDataset:
    """A generated set, drawn once in a process however often it is opened."""
    return load_dataset(
        "shapes",
        split=split,
        size=size,
        num_images=num_images,
        seed=seed,
        cache_dir=cache_dir,
    )


def pipeline_config(
    config: ExperimentConfig, *, train: bool, start_step: int = 0
) -> PipelineConfig:
    """The input pipeline's parameters on this process."""
    data = config.data
    return PipelineConfig(
        batch_size=config.train.batch_size if train else config.train.eval_batch_size,
        buckets=data.buckets if train else (data.eval_buckets or data.buckets),
        max_boxes=data.max_boxes,
        seed=config.seed,
        augment=data.augment,
        eval_short_side=data.eval_short_side,
        eval_max_size=data.eval_max_size,
        allow_truncation=data.allow_truncation,
        on_error=data.on_error,
        num_threads=data.num_threads,
        prefetch=data.prefetch,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
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


def with_data(config: ExperimentConfig, dataset: DetectionDataset) -> ExperimentConfig:
    """Fills in what depends on the training set: ``model.num_classes=0``, steps from epochs.

    Raises:
      ValueError: the data have more classes than a pinned number.
    """
    if config.train.epochs:
        images = config.train.epochs * len(dataset)
        steps = max(1, math.ceil(images / config.train.batch_size))
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    classes = config.model.num_classes
    if classes == 0:
        model = dataclasses.replace(config.model, num_classes=dataset.num_classes)
        return dataclasses.replace(config, model=model)
    if dataset.num_classes > classes:
        raise ValueError(
            f"{dataset.name} has {dataset.num_classes} classes, but config.model.num_classes is "
            f"{classes}; set it to 0 to take the data's"
        )
    return config


def check_same_classes(train: DetectionDataset, evaluation: DetectionDataset) -> None:
    """Labels are positions in a set's own list of classes: the two lists must be the same.

    Raises:
      ValueError: they differ; the message names the first difference.
    """
    mine = list(zip(train.category_ids, train.class_names, strict=True))
    theirs = list(zip(evaluation.category_ids, evaluation.class_names, strict=True))
    if mine != theirs:
        only = sorted(set(mine) ^ set(theirs))[:3]
        raise ValueError(
            f"{train.name} has {len(mine)} classes and {evaluation.name} {len(theirs)}, and they "
            f"differ in (id, name) {only}: give both annotation files the same categories"
        )


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


def example_input(bucket: tuple[int, int], batch: int = 1) -> tuple[jax.Array, jax.Array]:
    """A black image and its mask, for shapes."""
    return jnp.zeros((batch, *bucket, 3), jnp.uint8), jnp.ones((batch, *bucket), bool)


def record_ops(module: Detector, variables: Any, bucket: tuple[int, int]) -> list[OpRecord]:
    """The operations of one inference on one image of a bucket, without running it."""
    images, mask = example_input(bucket)
    with recording() as rows:
        jax.eval_shape(lambda v: module.apply(v, images, mask), variables)
    return rows


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


def load_teacher(config: ExperimentConfig) -> ModelBundle | None:
    """The float teacher of a distillation, or None.

    Raises:
      ValueError: the teacher is a backbone or quantized, or its attention does not match the
        student's.
    """
    if not config.distill.weights.active:
        return None
    path = config.distill.teacher or config.init_from
    if not path:
        raise ValueError(
            "config.distill.weights is not zero, but there is no teacher: set "
            "config.distill.teacher (or config.init_from) to the folder of a float model"
        )
    key = "distill.teacher" if config.distill.teacher else "init_from"
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
    return teacher


def _compared(model: DetrConfig, weights: DistillationWeights) -> dict[str, Any]:
    """What teacher and student must have in common, by name."""
    names = ["family", "encoder_layers", "heads"]
    decoder = weights.decoder_self + weights.decoder_cross > 0
    if decoder:
        names += ["decoder_layers", "num_queries"]
    if decoder or weights.kind == "output":
        names.append("dim")
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
