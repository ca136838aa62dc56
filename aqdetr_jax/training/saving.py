"""Saves of a run, and what becomes of it when one fails."""

from __future__ import annotations

import logging

from aqdetr_jax.checkpoint.steps import Checkpoints
from aqdetr_jax.checkpoint.store import CheckpointError
from aqdetr_jax.training.state import TrainState

logger = logging.getLogger(__name__)


class Saver:
    """Saves checkpoints as ``train.on_save_error`` says.

    Args:
      checkpoints: of the run.
      go_on: a save that fails is told and counted, and the run goes on without it.
      first: the step that is saved already, None at a start.
    """

    def __init__(self, checkpoints: Checkpoints, *, go_on: bool, first: int | None):
        self._checkpoints, self._go_on = checkpoints, go_on
        self.failed = 0
        self._saved = first

    def save(self, done: int, state: TrainState, *, wait: bool = False, must: bool = False) -> None:
        """Saves a state, unless it is saved already.

        Args:
          done: steps done.
          state: after them.
          wait: block until it is written and verified.
          must: a failure ends the run whatever the setting.

        Raises:
          CheckpointError: this save, or the one before it that was still being written, failed;
            earlier ones are untouched.
        """
        try:
            self._checkpoints.wait()
        except CheckpointError as error:
            self._saved = None
            self._fail(error, must=False)
        if self._saved == done:
            return
        try:
            self._checkpoints.save(done, state, wait=wait)
        except CheckpointError as error:
            self._fail(error, must=must)
        else:
            self._saved = done

    def _fail(self, error: CheckpointError, *, must: bool) -> None:
        if must or not self._go_on:
            raise error
        self.failed += 1
        logger.warning("%s Training goes on (config.train.on_save_error)", error)
