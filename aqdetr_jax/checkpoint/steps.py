"""Checkpoints: saved asynchronously, verified by checksums, restored bit for bit.

Orbax writes the arrays (and commits a step atomically); this
module adds what its users rely on: a manifest of checksums written *after* the commit, the newest
step that is committed **and verified** as the one restored, the step before it as the fallback,
and messages that name the parameter, the file and the folder.

Layout: ``DIR/step_00000100/`` (an Orbax checkpoint) and ``DIR/step_00000100.manifest.json``. A
step without its manifest was cut off while it was saved, and is never restored.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from aqdetr_jax import trees
from aqdetr_jax.checkpoint.checksums import find_damage, read_manifest, write_manifest
from aqdetr_jax.checkpoint.store import STEP, CheckpointError, load_tree
from aqdetr_jax.io import remove_folder
from aqdetr_jax.parallel.hosts import anywhere
from aqdetr_jax.paths import as_path

logger = logging.getLogger(__name__)

_MANIFEST = ".manifest.json"
_NONE, _ALL_BAD = -1, -2  # what process 0 tells the others instead of a step


def newest_step(directory: str | Path) -> int | None:
    """Newest committed step in a folder of checkpoints, or None; nothing is made or read."""
    names = (path.name for path in as_path(directory).glob(f"step_*{_MANIFEST}"))
    steps = (STEP.fullmatch(name.removesuffix(_MANIFEST)) for name in names)
    return max((int(match.group(1)) for match in steps if match), default=None)


class Checkpoints:
    """The training checkpoints of one run, in one folder.

    One save is in flight at a time. Every method is called by all processes of a multi-process
    run; process 0 alone writes manifests and deletes old steps.

    Attributes:
      directory: the folder.
      keep: number of newest steps kept, at least 1. The step with the highest ``metric`` (see
        :meth:`save`) is kept besides.
    """

    def __init__(self, directory: str | Path, keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, found {keep}")
        self.directory = as_path(directory).absolute()
        self.keep = keep
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        # What ends the body is told; other processes need not be here.
        with contextlib.suppress(Exception):
            if self._pending is not None:
                self._pending[1].result()
        self._executor.shutdown()

    def save(
        self,
        step: int,
        tree: Any,
        *,
        wait: bool = False,
        metric: float | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves a tree of arrays; returns once it is copied to the host, writing goes on behind.

        The arrays may be donated or overwritten as soon as this returns. An earlier step of the
        same number is replaced.

        Args:
          step: training step, >= 0.
          tree: any pytree of jax arrays (also sharded ones), numpy arrays and Python numbers.
          wait: block until the step is written, verified and older ones are pruned.
          metric: what "best" means for this step (higher is better), from a full evaluation.
          metadata: JSON-serialisable facts to keep with the step.

        Raises:
          CheckpointError: this save, or the previous one in the background, failed; earlier
            steps are untouched.
          ValueError: a leaf cannot be saved; the message names it.
        """
        leaves = {path: trees.to_saveable(path, leaf) for path, leaf in trees.flatten(tree)}
        self.wait()
        metric = float(metric) if metric is not None and math.isfinite(metric) else None
        # Through JSON here, so that a value that has no JSON form fails in the caller's thread.
        facts = json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
        extra = {"step": int(step), "metric": metric, "metadata": facts}
        response: Any = None
        with self._all_saving(step):
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._delete(step)
        with self._all_saving(step):
            response = ocp.save_async(self._folder(step), trees.nest(leaves))
        self._pending = step, self._executor.submit(self._finish, step, response, extra)
        if wait:
            self.wait()

    def restore(self, abstract: Any = None, step: int | None = None) -> tuple[Any, int] | None:
        """Restores the newest step that is committed and verified, or the step asked for.

        A damaged step is named in a warning and the one before it is used.

        Args:
          abstract: tree of the same structure as was saved, of ``jax.ShapeDtypeStruct`` (its
            ``sharding`` says where the array goes; one local device when None), jax or numpy
            arrays, or Python numbers; each leaf comes back as the same kind. None: nested dicts
            of numpy arrays, as saved.
          step: restore exactly this one.

        Returns:
          ``(tree, step)``, or None if the folder holds no committed checkpoint at all.

        Raises:
          CheckpointError: checkpoints exist but none is intact, or ``step`` is not; training must
            not start from step 0 as if there were none.
          ParameterMismatchError: the tree's names, shapes or dtypes differ from the saved ones.
        """
        self.wait()
        chosen, problem = _NONE, ""
        if jax.process_index() == 0:
            chosen, problem = self._choose(step)
        if jax.process_count() > 1:
            chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
        if chosen == _NONE:
            return None
        if chosen == _ALL_BAD:
            raise CheckpointError(problem or f"{self.directory}: see the message of process 0")
        return load_tree(self._folder(chosen), abstract), chosen

    def steps(self) -> list[int]:
        """Steps with a manifest (that is, committed), oldest first; their files are not read."""
        names = (path.name.removesuffix(_MANIFEST) for path in self._glob(f"step_*{_MANIFEST}"))
        return sorted(int(match.group(1)) for name in names if (match := STEP.fullmatch(name)))

    def latest_step(self) -> int | None:
        """Newest committed step, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Committed step with the highest ``metric`` (the newest of equals), or None."""
        scores = [(m, step) for step in self.steps() if (m := self._metric(step)) is not None]
        return max(scores)[1] if scores else None

    def metadata(self, step: int) -> dict[str, Any]:
        """The ``metadata`` given to :meth:`save` for a committed step."""
        try:
            return read_manifest(self._manifest(step))["metadata"]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"step {step} in {self.directory}: {error}") from error

    def wait(self) -> None:
        """Blocks until the save in flight is written and verified.

        Raises:
          CheckpointError: it failed; earlier steps are untouched.
        """
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        with self._all_saving(step):
            future.result()

    def close(self) -> None:
        """Waits for the save in flight and stops the background thread."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def _finish(self, step: int, response: Any, extra: dict[str, Any]) -> None:
        response.result()
        if jax.process_index() != 0:
            return
        write_manifest(self._manifest(step), self._folder(step), extra)
        best = self.best_step()
        # Only now, with the new step whole, may older ones go. A step above this one can only be
        # a damaged one that a resume fell back from.
        committed = [other for other in self.steps() if other <= step]
        for old in committed[: -self.keep]:
            if old != best:
                self._delete(old)
        self._delete_unfinished(before=step)

    def _choose(self, step: int | None) -> tuple[int, str]:
        steps = self.steps()
        if step is not None and step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            return _ALL_BAD, f"{self.directory} has no step {step}; its steps: {known}"
        unfinished = [path.name for path in self._unfinished()]
        if unfinished:
            logger.warning("%s: ignoring unfinished %s", self.directory, ", ".join(unfinished))
        damages = []
        for candidate in reversed(steps) if step is None else [step]:
            damage = find_damage(self._manifest(candidate), self._folder(candidate))
            if damage is None:
                return candidate, ""
            logger.warning(
                "checkpoint of step %d is damaged and is not used: %s", candidate, damage
            )
            damages.append(f"step {candidate}: {damage}")
        if not damages:
            return _NONE, ""
        return _ALL_BAD, (
            f"no intact checkpoint in {self.directory} ({'; '.join(damages)}). Restore the files "
            "from a copy, or choose another work directory to train from the start."
        )

    def _unfinished(self) -> list[Path]:
        steps = {f"step_{step:08d}" for step in self.steps()}
        return [path for path in self._glob("step_*") if path.is_dir() and path.name not in steps]

    def _delete_unfinished(self, before: int) -> None:
        for path in self._unfinished():
            match = STEP.match(path.name)
            if match and int(match.group(1)) <= before:
                remove_folder(path)

    def _delete(self, step: int) -> None:
        # The manifest first: a kill in between leaves an unfinished step, not a damaged one.
        self._manifest(step).unlink(missing_ok=True)
        if self._folder(step).exists():
            remove_folder(self._folder(step))

    def _metric(self, step: int) -> float | None:
        try:
            return read_manifest(self._manifest(step))["metric"]
        except (OSError, ValueError):
            return None

    @contextlib.contextmanager
    def _all_saving(self, step: int) -> Iterator[None]:
        """A part of a save that has failed everywhere if it fails on one process."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = anywhere(error is not None)
        if error is not None:
            raise self._save_error(step, error) from error
        if failed:
            raise CheckpointError(f"saving step {step} failed on another process, which says why")

    def _save_error(self, step: int, error: Exception) -> CheckpointError:
        if isinstance(error, CheckpointError):
            return error
        return CheckpointError(
            f"saving step {step} to {self.directory} failed: {type(error).__name__}: {error}. "
            f"Earlier checkpoints are kept (newest: {self.latest_step()})."
        )

    def _glob(self, pattern: str) -> list[Path]:
        return sorted(self.directory.glob(pattern))

    def _folder(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def _manifest(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}{_MANIFEST}"
