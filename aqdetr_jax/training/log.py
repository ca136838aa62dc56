"""What a run logs of its steps: the metrics file, the progress line, what is wrong with them."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aqdetr_jax.data.batching import PipelineStats
from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.parallel.hosts import is_main
from aqdetr_jax.training import optimizer as optim
from aqdetr_jax.training.clock import RunClock
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.metrics import MetricsWriter, Progress
from aqdetr_jax.training.notices import check_step, counts_by_image
from aqdetr_jax.training.state import TrainState


class StepLog:
    """Takes the metrics of a step from the devices now and then, and says what they are.

    Args:
      config: the experiment.
      workdir: of the run.
      writer: of the metrics file.
      clock: where the time goes.
      dataset: the training set.
      stats: what the input pipeline leaves out.
      state: what the run starts from.
      first: steps that were done then.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        workdir: Path,
        writer: Any,
        clock: RunClock,
        dataset: DetectionDataset,
        stats: PipelineStats,
        state: TrainState,
        first: int,
    ):
        self._config, self._writer, self._clock = config, writer, clock
        self._dataset, self._stats = dataset, stats
        self._rate = jax.jit(optim.learning_rate(config.optimizer, config.train.steps))
        self._progress = Progress(
            config.train.steps,
            workdir,
            batch_size=config.train.batch_size,
            start=first,
            stream=None if is_main() else io.StringIO(),
        )
        self._everywhere = state.step.sharding
        self._skipped = int(state.skipped)
        self.restart(first)

    def restart(self, done: int) -> None:
        """Images a second are counted from here on."""
        self._since, self._counted = time.perf_counter(), done

    def step(self, done: int, metrics: Mapping[str, jax.Array], index: np.ndarray) -> None:
        """Logs a step.

        Args:
          done: steps done.
          metrics: of the last one, on the devices.
          index: int ``[B / processes]``, dataset indices of this process's part of its batch.

        Raises:
          TrainingDivergedError: see ``notices.check_step``.
        """
        train = self._config.train
        found = fetch(metrics)
        values = {k: float(np.sum(v)) for k, v in found.items()}
        # Skipped updates do not advance the schedule.
        updates = np.int32(max(done - 1 - int(values["skipped"]), 0))
        rate = fetch(self._rate(put(updates, self._everywhere)))
        lap = self._clock.lap()
        images = (done - self._counted) * train.batch_size
        values["images_per_second"] = images / (time.perf_counter() - self._since)
        self.restart(done)
        values["learning_rate"] = float(rate) * self._config.optimizer.lr
        values |= {f"time/{part}": seconds for part, seconds in lap.items()}
        values["data/wait"] = lap["input"] / max(sum(lap.values()), 1e-9)
        values["goodput"] = self._clock.goodput
        values["truncated_boxes"] = float(self._stats.truncated_boxes)
        values["skipped_images"] = float(self._stats.skipped_images)
        self._writer.write(done, values)
        skipped = int(values["skipped"])
        replaced = counts_by_image(found.get("replaced_costs"), index, self._dataset)
        check_step(done, values, replaced, skipped - self._skipped, train.abort_after)
        self._skipped = skipped
        self._progress.update(done, _shown(values), lap)

    def close(self) -> None:
        """Ends the progress line."""
        self._progress.close()


def fetch(values: Any) -> Any:
    """Arrays from the devices, once they are computed."""
    return jax.device_get(values)


def put(value: np.generic, where: jax.sharding.Sharding) -> jax.Array:
    """A number for the devices; on one of them alone it would be copied to the others unasked."""
    return jax.device_put(value, where)


def open_writer(path: Path, first: int) -> contextlib.AbstractContextManager:
    """The metrics writer; a run killed before its first checkpoint logs from step 1 again."""
    if is_main():
        return MetricsWriter(path, resume_step=first)
    return contextlib.nullcontext(_NoWriter())


class _NoWriter:
    def write(self, step: int, metrics: object) -> None:
        """Other processes than the main one write nothing."""

    def sync(self) -> None:
        """Nor have they anything to wait for."""


def _shown(values: dict[str, float]) -> dict[str, float]:
    """The few terms that fit a progress line."""
    shown = ("loss", "loss_ce", "loss_bbox", "loss_giou", "loss_distill_encoder")
    return {name: values[name] for name in shown if name in values}
