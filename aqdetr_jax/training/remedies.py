"""What helps where a program does not fit the devices' memory, for runs and for plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.remedies import smaller_images
from aqdetr_jax.training.config import ExperimentConfig


class Remedy(NamedTuple):
    """One thing that makes a program smaller.

    Attributes:
      what: in words.
      keys: of the configuration, and what to set them to.
      rows: images a device takes at a time then; None = as many as before.
    """

    what: str
    keys: Mapping[str, Any]
    rows: int | None = None


def remedies(
    config: ExperimentConfig,
    rows: int,
    kind: Literal["train", "eval"] = "train",
    *,
    resumed: bool = False,
) -> list[Remedy]:
    """What is not done yet, the cheapest first.

    Args:
      config: resolved.
      rows: images that a device takes at a time.
      kind: of the program.
      resumed: the run goes on, so that only what ``resume.CHANGEABLE`` names may differ.
    """
    found, train = [], kind == "train"
    if config.model.dtype != "bfloat16" and not resumed:
        found.append(Remedy("half the bytes between the layers", {"model.dtype": "bfloat16"}))
    if train and rows > 1:
        factor = next(n for n in range(2, rows + 1) if rows % n == 0)
        parts = config.train.accumulate * factor
        if _can_be_cut(config, parts):
            keys = {"train.accumulate": parts}
            found.append(Remedy("the same batch in parts", keys, rows // factor))
    if train and config.model.remat is not True:
        found.append(Remedy("layers computed again", {"model.remat": True}))
    if rows > 1 and not (train and resumed):
        found.append(Remedy("a smaller batch", {}, rows // 2))
    return found


def _can_be_cut(config: ExperimentConfig, parts: int) -> bool:
    """Whether a step may be so many micro-batches: some losses and norms need the whole batch."""
    try:
        dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=parts))
    except ValueError:
        return False
    return True


def for_run(
    given: DataConfig, config: ExperimentConfig, devices: int, *, resumed: bool = False
) -> str:
    """What makes the training step of a run smaller, as a sentence.

    Args:
      given: the data as they were configured, before sizes followed from them.
      config: of the run, resolved.
      devices: along "data".
      resumed: see :func:`remedies`.
    """
    train = config.train
    found = []
    for remedy in remedies(
        config, train.batch_size // (devices * train.accumulate), resumed=resumed
    ):
        keys = dict(remedy.keys)
        if remedy.rows is not None:
            parts = keys.get("train.accumulate", train.accumulate)
            # With the parts: of a configuration in images a chip the batch would grow instead.
            keys["train.batch_size"] = remedy.rows * devices * parts
        found.append(" with ".join(f"config.{key}={value}" for key, value in keys.items()))
    return f"try {', or '.join(found)}" if found else of_images(given, resumed=resumed)


def of_images(
    given: DataConfig, kind: Literal["train", "eval"] = "train", *, resumed: bool = False
) -> str:
    """What helps a run when nothing else is left, as a sentence.

    Args:
      given: the data as they were configured: where buckets follow from the images, none are given.
      kind: of the program.
      resumed: see :func:`remedies`.
    """
    if resumed:
        return "a run that goes on keeps its batch, dtype and images: take devices of more memory"
    return smaller_images("fit" if given.fit else "eval_buckets" if kind == "eval" else "buckets")
