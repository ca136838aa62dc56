"""What a training run says of its data and of its steps: limits, skipped steps, divergence."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from aqdetr_jax.data import resampling
from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.data.notices import say_findings
from aqdetr_jax.host import LostError
from aqdetr_jax.parallel.compiled import DoesNotFitError
from aqdetr_jax.parallel.hosts import say
from aqdetr_jax.parallel.watch import Watch
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.faults import in_words

logger = logging.getLogger(__name__)


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had a non-finite loss, gradient or step size."""


_STATUS = re.compile("(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|UNAVAILABLE|UNKNOWN): ")
"""How the runtime's own errors begin. Some of them reach Python as a ValueError: of a transfer of
what a broken exchange between hosts should have made, for one."""


def in_one_line(error: Exception, watch: Watch, remedies: str) -> RuntimeError | None:
    """What an error of the devices or of the network means; None if that is not known.

    Args:
      error: as it was raised, a ``JaxRuntimeError`` or ``ValueError``.
      watch: of the run.
      remedies: what helps if memory is short.
    """
    text = " ".join(str(error).split())
    if not isinstance(error, jax.errors.JaxRuntimeError) and not _STATUS.match(text):
        return None
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return DoesNotFitError(f"the devices are out of memory: {remedies} ({text[:300]})")
    if jax.process_count() == 1:
        return None
    reason = watch.lost()
    return LostError(f"{reason} ({text[:200]})") if reason else None


def say_limits(
    config: ExperimentConfig, train_set: DetectionDataset, eval_set: DetectionDataset
) -> None:
    """Says what was left out of the data, where queries will be too few, and what is slow."""
    for dataset in (train_set, eval_set):
        say_findings(dataset)
    if resampling.simd is None:
        say(
            "training images are resized by Pillow, which takes four times as long as "
            "cykooz-resizer: that has no wheel here, or is not installed"
        )
    most = train_set.max_boxes_per_image()
    if config.task == "detect" and most > config.model.num_queries:
        say(
            f"{train_set.name} has images with up to {most} boxes, more than the "
            f"{config.model.num_queries} object queries: the rest stays unmatched"
        )
    if config.model.num_auxiliary:
        queries = config.model.num_auxiliary // config.model.auxiliary_groups
        repeats = config.auxiliary.repeats
        if most * repeats > queries:
            say(
                f"auxiliary queries: {repeats} repeats of up to {most} boxes do not fit the "
                f"{queries} queries of a group; such images use fewer repeats "
                "(metric limited_images)"
            )


def counts_by_image(
    counts: np.ndarray | None, index: np.ndarray, dataset: DetectionDataset
) -> dict[int | str, int]:
    """This process's part of counts of the global batch, by image id.

    Args:
      counts: int ``[B]`` in process order, or None for zeros.
      index: int ``[B / processes]``, this process's dataset indices; -1 = no image.
      dataset: the training set.
    """
    if counts is None:
        counts = np.zeros(jax.process_count() * len(index), np.int32)
    own = counts.reshape(jax.process_count(), -1)[jax.process_index()]
    found: dict[int | str, int] = {}
    for i, count in zip(index, own, strict=True):
        if i >= 0:
            name = dataset.image_id(int(i))
            found[name] = found.get(name, 0) + int(count)
    return found


def check_step(
    step: int,
    values: Mapping[str, float],
    replaced: Mapping[int | str, int],
    skipped: int,
    abort_after: int,
    *,
    bad: Sequence[str] = (),
    earlier: Sequence[tuple[int, Sequence[str], Sequence[int | str]]] = (),
) -> None:
    """Reports skipped steps and replaced costs; stops after too many bad steps in a row.

    Args:
      step: steps done.
      values: metrics of the last one.
      replaced: non-finite matching costs that were replaced, for each image id of its batch.
      skipped: steps skipped since the last call.
      abort_after: see ``TrainConfig``.
      bad: what was at fault if the last one was skipped.
      earlier: (step, what was at fault, image ids) of skipped steps since the last call.

    Raises:
      TrainingDivergedError: ``abort_after`` steps in a row were bad.
    """
    now = [(step, bad, list(replaced))] if bad else []
    for number, names, ids in (*earlier, *now):
        logger.warning(
            "step %d skipped: %s not finite; image ids %s", number, in_words(names), list(ids)
        )
    untold = skipped - len(earlier) - len(now)
    if untold > 0:
        logger.warning(
            "%d steps before step %d were skipped for a non-finite loss or gradient",
            untold,
            step,
        )
    culprits = {name: count for name, count in replaced.items() if count}
    if culprits:
        logger.warning(
            "step %d: non-finite matching costs replaced, by image id: %s", step, culprits
        )
    if values["bad_in_a_row"] >= abort_after:
        raise TrainingDivergedError(
            f"{int(values['bad_in_a_row'])} steps in a row up to step {step} had a non-finite "
            f"loss, gradient or step size (now: {in_words(bad) or 'none'}); nothing was updated "
            "in them. Look at the images named in the log, or start again with a lower "
            "config.optimizer.lr in another --workdir."
        )
