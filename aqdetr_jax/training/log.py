"""What a run logs of its steps: the metrics file, the progress line, what is wrong with them."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Mapping, Sequence
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
from aqdetr_jax.training.faults import Recent, bad_parameters, culprits
from aqdetr_jax.training.metrics import METRICS, MetricsWriter, Progress, read_lines
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
      parts: names of the parts of the gradient, see ``faults.culprits``.
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
        parts: Sequence[str],
    ):
        self._parts, self._recent = parts, Recent()
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

    def note(self, done: int, metrics: Mapping[str, jax.Array], index: np.ndarray) -> None:
        """Notes a step that is not logged: should it have been skipped, it is told why.

        Args: as for :meth:`step`.
        """
        self._recent.add(done, metrics, index)

    def step(
        self, done: int, metrics: Mapping[str, jax.Array], index: np.ndarray, params: Any = None
    ) -> None:
        """Logs a step.

        Args:
          done: steps done.
          metrics: of the last one, on the devices.
          index: int ``[B / processes]``, dataset indices of this process's part of its batch.
          params: the parameters after it.

        Raises:
          TrainingDivergedError: see ``notices.check_step``.
        """
        train = self._config.train
        found = fetch(metrics)
        values = {k: float(np.sum(v)) for k, v in found.items() if k != "gradient_squares"}
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
        new, bad, earlier = skipped - self._skipped, [], []
        self._skipped = skipped
        if new:
            bad = culprits(found, self._parts)
            with jax.transfer_guard("allow"):
                earlier = self._earlier(done)
                if bad and params is not None:
                    bad = [*(f"parameter {name}" for name in bad_parameters(params)), *bad]
        self._recent.clear()
        check_step(done, values, replaced, new, train.abort_after, bad=bad, earlier=earlier)
        self._progress.update(done, _shown(values), lap)

    def _earlier(self, done: int) -> list[tuple[int, list[str], list[int | str]]]:
        """The skipped ones of the steps since the last line, what was at fault, and image ids."""
        told = []
        for number, metrics, index in self._recent.take(done):
            bad = culprits(metrics, self._parts)
            if bad:
                told.append((number, bad, list(counts_by_image(None, index, self._dataset))))
        return told

    def close(self) -> None:
        """Ends the progress line."""
        self._progress.close()


def fetch(values: Any) -> Any:
    """Arrays from the devices, once they are computed."""
    return jax.device_get(values)


def put(value: np.generic, where: jax.sharding.Sharding) -> jax.Array:
    """A number for the devices; on one of them alone it would be copied to the others unasked."""
    return jax.device_put(value, where)


def has_metric(workdir: Path, step: int, name: str) -> bool:
    """Whether a run has logged a metric for a step."""
    file = workdir / METRICS
    return file.is_file() and any(row["step"] == step and name in row for row in read_lines(file))


def open_writer(
    path: Path, first: int, *, keep_going: bool = False
) -> contextlib.AbstractContextManager:
    """The metrics writer; a run killed before its first checkpoint logs from step 1 again."""
    if is_main():
        return MetricsWriter(path, resume_step=first, keep_going=keep_going)
    return contextlib.nullcontext(_NoWriter())


class _NoWriter:
    def write(self, step: int, metrics: object) -> None:
        """Other processes than the main one write nothing."""

    def sync(self) -> None:
        """Nor have they anything to wait for."""


def _shown(values: dict[str, float]) -> dict[str, float]:
    """The few terms that fit a progress line."""
    losses = ("loss", "loss_ce", "loss_bbox", "loss_giou")
    shown = (*losses, "loss_distill_encoder", "loss_distill_foreground")
    return {name: values[name] for name in shown if name in values}


def flat_results(block: dict[str, Any]) -> dict[str, float]:
    """The 12 numbers as ``eval/AP`` etc."""
    return {f"eval/{k}": v for k, v in block.items() if k.startswith(("AP", "AR"))}
