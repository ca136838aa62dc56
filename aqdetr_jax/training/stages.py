"""The stages from a folder of images to a low-bit student, as configurations.

Backbone and encoder by dense pretraining, the float teacher, the student; each is a variant of
``configs/custom.py`` with the user's overrides where they belong.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from jax import tree

from aqdetr_jax.checkpoint.model_folder import ModelBundle
from aqdetr_jax.config_types import ConfigError
from aqdetr_jax.losses.criterion import LossWeights
from aqdetr_jax.models.config import DeformableConfig, DetrConfig
from aqdetr_jax.training import setup
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.effects import PRETRAIN_IDLE
from aqdetr_jax.training.experiment import load_experiment

STUDENT_KEYS = ("quant.", "auxiliary.", "distill.")
"""Overrides of these groups are the student's; those below hold for every stage."""
SHARED_KEYS = ("seed", "data.", "model.", "train.", "mesh.", "optimizer.")
NOT_PRETRAINED = (*PRETRAIN_IDLE, "optimizer.frozen")
"""Patterns of what the pretraining has not, or must not: it starts from nothing."""
AUXILIARY_KEYS = ("model.num_auxiliary", "model.auxiliary_groups")
"""Not of plain LSQ, which has no auxiliary queries."""
OWN_KEYS = ("data.root", "init_from", "name", "task")
"""What the stages set themselves."""
OF_ANY_MODEL = (*AUXILIARY_KEYS, "model.dropout", "model.remat", "model.dtype")
"""Keys of ``model`` that a model from elsewhere leaves open."""

FINE_LR, FINE_LR_BACKBONE = 2e-4, 2e-5
"""Learning rates from weights that were trained elsewhere: Deformable DETR's own."""
FINE_PASSES = 0.25
"""Share of the teacher's passes that fine-tuning a whole detector takes [ours]."""
LARGE, LARGE_BATCH = 5_000_000, 4
"""From so many parameters on a batch has so many images: for the memory of one machine [ours]."""


def make_stages(
    root: str,
    workdir: Path,
    *,
    family: str | None = None,
    source: str = "",
    baseline: bool = False,
    effort: float = 1.0,
    overrides: Sequence[str] = (),
) -> dict[str, ExperimentConfig]:
    """The stages in order: name (a folder in ``workdir``) -> configuration.

    Args:
      root: folder of the data set.
      workdir: folder of the stages.
      family: "deformable" (None) or "detr"; of a detector to start from, what it is.
      source: a float model to start from; "" = pretrain on the images.
      baseline: plain LSQ too.
      effort: factor on the length of every stage.
      overrides: ``a.b=value`` texts.

    Raises:
      ValueError, FileNotFoundError and their kin: an argument cannot be used; the message names it.
    """
    _check(effort, overrides)
    shared = tuple(o for o in overrides if o.startswith(SHARED_KEYS))
    if not any(_key(o) == "data.kind" for o in shared):
        shared += ("data.kind=auto",)
    shared += (f"data.root={root}",)
    student = tuple(o for o in overrides if o.startswith(STUDENT_KEYS))
    bundle = _float_source(source) if source else None
    if bundle is not None and _is_detector(bundle):
        if family not in (None, bundle.config.family):
            raise ValueError(
                f"--model={family} does not fit --from={source}, which is a {bundle.config.family} "
                "model: leave --model out"
            )
        family = bundle.config.family
    family = family or "deformable"

    def stage(kind: str, init_from: str | Path, overrides: tuple[str, ...]) -> ExperimentConfig:
        config = load_experiment(f"custom:{family}-{kind}", overrides, init_from=str(init_from))
        if bundle is not None:
            config = _from_source(config, bundle, source, overrides)
        return _stretched(config, effort)

    stages: dict[str, ExperimentConfig] = {}
    origin: str | Path = source
    if bundle is None:
        own = (o for o in shared if not any(fnmatchcase(_key(o), p) for p in NOT_PRETRAINED))
        stages["pretrain"] = stage("pretrain", "", tuple(own))
        origin = workdir / "pretrain"
    stages["teacher"] = stage("teacher", origin, shared)
    stages["student"] = stage("aqdetr", workdir / "teacher", shared + student)
    if not stages["student"].quant.quantized:
        raise ValueError("finetune makes a low-bit student: config.quant.policy is 'float'")
    if baseline:
        without = tuple(o for o in shared if _key(o) not in AUXILIARY_KEYS)
        without += tuple(o for o in student if o.startswith("quant."))
        stages["baseline"] = stage("lsq", workdir / "teacher", without)
    return stages


def _check(effort: float, overrides: Sequence[str]) -> None:
    keys = [_key(text) for text in overrides]
    if not 0 < effort <= 1000:
        raise ValueError(f"--effort must be positive, and at most 1000, got {effort}")
    for key in keys:
        if key in OWN_KEYS or not key.startswith((*STUDENT_KEYS, *SHARED_KEYS)):
            groups = ", ".join(k.rstrip(".") for k in (*SHARED_KEYS, *STUDENT_KEYS))
            raise ValueError(
                f"finetune sets config.{key} itself"
                + (" (DIR)" if key == "data.root" else "")
                + f"; overrides are of {groups}"
            )
    if effort != 1 and {"train.steps", "train.epochs"} & set(keys):
        raise ValueError("--effort stretches the recipe: give it, or config.train.steps or epochs")


def _float_source(source: str) -> ModelBundle:
    bundle = setup.load_source(source, "--from")
    if bundle.quant.quantized:
        raise ValueError(
            f"--from={source} is quantized ({bundle.quant.policy}): give the float model that it "
            "comes from"
        )
    return bundle


def _is_detector(bundle: ModelBundle) -> bool:
    return "decoder" in bundle.variables["params"]


def _key(override: str) -> str:
    return override.partition("=")[0]


def _stretched(config: ExperimentConfig, effort: float) -> ExperimentConfig:
    train = config.train
    steps = max(1, round(train.steps * effort)) if train.steps else 0
    return dataclasses.replace(
        config, train=dataclasses.replace(train, steps=steps, epochs=train.epochs * effort)
    )


def _from_source(
    config: ExperimentConfig, bundle: ModelBundle, source: str, overrides: Sequence[str]
) -> ExperimentConfig:
    """The configuration of a stage that starts from a given model, and not from scratch.

    Raises:
      ConfigError: an override is of what the given model decides.
    """
    given = {_key(text) for text in overrides}
    detector = _is_detector(bundle)
    for key in given:
        backbone = key.startswith("model.backbone.")
        if backbone or (detector and key.startswith("model.") and key not in OF_ANY_MODEL):
            raise ConfigError(
                f"command line: config.{key} has no effect: --from={source} has its own"
            )
    model = _whole_model(config, bundle) if detector else _with_backbone(config, bundle)
    defaults: dict[str, Any] = {
        "optimizer.lr": FINE_LR,
        "optimizer.lr_backbone": FINE_LR_BACKBONE,
        # As many positions as a small model has at its own stride.
        "data.fit": config.data.fit * model.backbone.output_stride // 16,
    }
    if sum(np.size(leaf) for leaf in tree.leaves(bundle.variables["params"])) >= LARGE:
        defaults |= {"train.batch_size": LARGE_BATCH, "train.eval_batch_size": LARGE_BATCH}
    if detector and not config.quant.quantized and not {"train.epochs", "train.steps"} & given:
        defaults["train.epochs"] = config.train.epochs * FINE_PASSES
    for key, value in defaults.items():
        if key not in given:
            group, name = key.split(".")
            changed = dataclasses.replace(getattr(config, group), **{name: value})
            config = dataclasses.replace(config, **{group: changed})
    loss, distill, optimizer = config.loss, config.distill, config.optimizer
    if detector:  # the losses of its own recipe
        focal = LossWeights(cls=2.0, kind="focal")
        loss = focal if model.family == "deformable" else LossWeights()
    if model.deformable.two_stage:
        # Its reference points are proposals, which do not correspond to another model's.
        slow = tuple(pattern for pattern in optimizer.slow if pattern != "reference_points/")
        optimizer = dataclasses.replace(optimizer, slow=slow)
        weights = dataclasses.replace(distill.weights, decoder_self=0.0, decoder_cross=0.0)
        distill = dataclasses.replace(distill, weights=weights)
    return dataclasses.replace(config, model=model, loss=loss, distill=distill, optimizer=optimizer)


def _whole_model(config: ExperimentConfig, bundle: ModelBundle) -> DetrConfig:
    """A detector as it is, for other classes, with auxiliary queries in training."""
    names = (key.removeprefix("model.") for key in OF_ANY_MODEL)
    return dataclasses.replace(
        bundle.config,
        **{name: getattr(config.model, name) for name in names},
        num_classes=0,
        backbone=dataclasses.replace(bundle.config.backbone, norm="frozen"),
    )


def _with_backbone(config: ExperimentConfig, bundle: ModelBundle) -> DetrConfig:
    """The configured transformer on another backbone, which sees it at strides 16 and 32."""
    backbone = dataclasses.replace(bundle.config.backbone, norm="frozen")
    model = dataclasses.replace(
        config.model,
        backbone=backbone,
        pixel_mean=bundle.config.pixel_mean,
        pixel_std=bundle.config.pixel_std,
    )
    if model.family == "deformable":
        stages = max(1, round(math.log2(backbone.output_stride / 16)) + 1)
        options: DeformableConfig = model.deformable
        levels = max(options.levels, stages)
        changed = dataclasses.replace(options, levels=levels, stages=stages)
        model = dataclasses.replace(model, deformable=changed)
    return model
