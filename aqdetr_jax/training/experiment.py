"""From a configuration file and overrides to a checked ``ExperimentConfig``."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from aqdetr_jax.config_types import ConfigError, to_dataclass
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.training.config import DistillConfig, ExperimentConfig
from aqdetr_jax.training.config_tools import flatten_config, load_config_file
from aqdetr_jax.training.effects import check_effects


def load_experiment(
    name: str, overrides: tuple[str, ...] = (), *, pretrain: bool = False, **fields: Any
) -> ExperimentConfig:
    """A configuration as an ``ExperimentConfig``; keys without an effect are refused.

    Of ``train.steps`` and ``train.epochs`` the one on the command line counts; with both, what
    ends first. ``train.batch_size`` on the command line counts before the file's
    ``train.batch_per_chip``.

    Args:
      name: configuration name or file.
      overrides: ``a.b=value`` texts.
      pretrain: the dense pretraining for it, see :func:`pretraining`.
      **fields: top-level fields to replace.

    Raises:
      FileNotFoundError: no such configuration.
      ConfigError: a key or value cannot be used, or changes nothing; the message says which.
    """
    loaded = load_config_file(name, overrides, schema=ExperimentConfig)
    config = to_dataclass(ExperimentConfig, loaded)
    # What the file gives is judged without the command line, which may make some of it idle. A
    # file that is whole only with the command line is not judged.
    with contextlib.suppress(_Unfinished):
        alone = config if not overrides else _alone(name)
        if alone.task != "pretrain":  # which takes the detector's configuration
            defaults = flatten_config(ExperimentConfig())
            given = [k for k, v in flatten_config(alone).items() if v != defaults.get(k)]
            check_effects(alone, given, name)
    keys = [re.sub(r"^--?config\.", "", text).partition("=")[0].strip() for text in overrides]
    if "train.steps" in keys and "train.epochs" not in keys:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=0.0))
    if "train.epochs" in keys and "train.steps" not in keys:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=0))
    for key, other in (
        ("batch_size", "batch_per_chip"),
        ("eval_batch_size", "eval_batch_per_chip"),
    ):
        if f"train.{key}" in keys and f"train.{other}" not in keys:
            nothing: dict[str, Any] = {other: 0}
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, **nothing))
    if pretrain:
        config = pretraining(config, keys)
    config = dataclasses.replace(config, **fields)
    check_effects(config, keys, "command line")
    return config


def pretraining(config: ExperimentConfig, given: Sequence[str]) -> ExperimentConfig:
    """The dense pretraining of backbone and encoder for a detector's configuration.

    From scratch everything learns, norms included, the backbone as fast as the rest (unless the
    command line says otherwise); nothing is quantized or distilled.

    Args:
      config: of the detector.
      given: keys of the command line.

    Raises:
      ConfigError: the command line wants the norms frozen.
    """
    model, optimizer = config.model, config.optimizer
    if "model.backbone.norm" in given and model.backbone.norm != "batch":
        raise ConfigError(
            "command line: config.model.backbone.norm must be 'batch' in a pretraining: norms that "
            "start from nothing must learn"
        )
    if "optimizer.frozen" not in given:
        optimizer = dataclasses.replace(optimizer, frozen=())
    if "optimizer.lr_backbone" not in given:
        optimizer = dataclasses.replace(optimizer, lr_backbone=optimizer.lr)
    backbone = dataclasses.replace(model.backbone, norm="batch")
    return dataclasses.replace(
        config,
        task="pretrain",
        quant=QuantConfig(),
        distill=DistillConfig(),
        model=dataclasses.replace(model, backbone=backbone, num_auxiliary=0, auxiliary_groups=1),
        train=dataclasses.replace(config.train, phases=()),
        optimizer=optimizer,
    )


class _Unfinished(Exception):
    """A file that has no configuration without overrides."""


def _alone(name: str) -> ExperimentConfig:
    try:
        return to_dataclass(ExperimentConfig, load_config_file(name, (), schema=ExperimentConfig))
    except ConfigError as error:
        raise _Unfinished from error
