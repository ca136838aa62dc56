"""From a configuration file and overrides to a checked ``ExperimentConfig``."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from typing import Any

from aqdetr_jax.config_types import ConfigError, to_dataclass
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.config_tools import flatten_config, load_config_file
from aqdetr_jax.training.effects import check_effects


def load_experiment(name: str, overrides: tuple[str, ...] = (), **fields: Any) -> ExperimentConfig:
    """A configuration as an ``ExperimentConfig``; keys without an effect are refused.

    Args:
      name: configuration name or file.
      overrides: ``a.b=value`` texts.
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
            given = [k for k, v in flatten_config(alone).items() if v != defaults[k]]
            check_effects(alone, given, name)
    config = dataclasses.replace(config, **fields)
    keys = [re.sub(r"^--?config\.", "", text).partition("=")[0].strip() for text in overrides]
    check_effects(config, keys, "command line")
    return config


class _Unfinished(Exception):
    """A file that has no configuration without overrides."""


def _alone(name: str) -> ExperimentConfig:
    try:
        return to_dataclass(ExperimentConfig, load_config_file(name, (), schema=ExperimentConfig))
    except ConfigError as error:
        raise _Unfinished from error
