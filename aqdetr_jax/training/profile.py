"""A profiler's trace of a few steps (``train.profile``), for xprof and Perfetto."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax

from aqdetr_jax.parallel.hosts import is_main, say
from aqdetr_jax.paths import local_folder
from aqdetr_jax.training.config import ExperimentConfig

FOLDER = "profile"
"""Where in the work directory traces go: ``profile/plugins/profile/TIME/HOST.xplane.pb``."""

STEP = "train"
"""Name of a step's annotation; its number is the one in ``metrics.jsonl``."""


def check_profile(config: ExperimentConfig) -> None:
    """Refuses steps that the run will not make, once their number is known.

    Raises:
      ValueError: a step of ``train.profile`` is beyond the last one.
    """
    window = config.train.profiled
    if window and window[1] > config.train.steps:
        raise ValueError(
            f"config.train.profile={config.train.profile!r}: the run ends with step "
            f"{config.train.steps}"
        )


class StepTrace:
    """Starts and stops the trace; the first process's, of its own host and devices.

    At the first and after the last of the steps the devices are waited for, so that these steps
    are whole in the trace and others are not in it.

    Args:
      config: whose ``train.profile`` counts.
      workdir: of the run.
      first: steps that were done when the run was taken up.
    """

    def __init__(self, config: ExperimentConfig, workdir: Path, first: int):
        self._window = config.train.profiled
        self._folder, self._running = workdir / FOLDER, False
        self._open = contextlib.ExitStack()
        if self._window and first >= self._window[0]:
            end = self._window[1]
            left = f"steps {first + 1} to {end} of them are traced"
            if first >= end:
                left, self._window = "nothing is traced", None
            say(
                f"config.train.profile={config.train.profile!r}: the run goes on after step "
                f"{first}: {left}"
            )
            if self._window:
                self._window = (first + 1, end)

    def before(self, step: int, state: Any) -> None:
        """To be called before a step (counted from 1), with what it starts from."""
        if self._window and step == self._window[0] and is_main():
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call: large, and slower than the run
            here = self._open.enter_context(local_folder(self._folder))
            jax.profiler.start_trace(here, profiler_options=options)
            self._running = True

    def after(self, step: int, metrics: Any) -> None:
        """To be called after a step was started, with what it gives."""
        if self._running and self._window and step == self._window[1]:
            jax.block_until_ready(metrics)
            self.close()
            begin, end = self._window
            say(f"steps {begin} to {end} are traced in {self._folder}, for xprof")

    def close(self) -> None:
        """Ends a trace that is running, with the steps that it has."""
        if self._running:
            self._running = False
            with self._open:  # which sends it to a store
                jax.profiler.stop_trace()
