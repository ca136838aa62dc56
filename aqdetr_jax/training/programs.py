"""The programs of a run: its step in every phase, for every bucket."""

from __future__ import annotations

from typing import Any

import jax

from aqdetr_jax.models.dense import DensePretrainer
from aqdetr_jax.models.detector import Detector
from aqdetr_jax.parallel.compiled import Programs
from aqdetr_jax.parallel.hosts import say
from aqdetr_jax.parallel.mesh import batch_sharding
from aqdetr_jax.training.assemble import Assembly, batch_shapes
from aqdetr_jax.training.phases import Phase, phase_of, run_phases


class StepPrograms:
    """The training step as one program for each phase and bucket; its batch is one mapping.

    Args:
      assembly: of the run, its configuration resolved.
      module: of the run.
      teacher: the teacher's, if there is one.
      remedies: what helps if a program does not fit, see ``remedies.for_run``.
      first: steps done so far; phases that are over are not compiled.
    """

    def __init__(
        self,
        assembly: Assembly,
        module: Detector | DensePretrainer,
        teacher: Detector | None,
        remedies: str,
        first: int = 0,
    ):
        config, split = assembly.config, batch_sharding(assembly.mesh)
        self._phases = [phase for phase in run_phases(config) if phase.stop > first]
        self._now: Phase | None = None
        self._told = len(config.train.phases) > 0

        def batch(bucket: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
            shapes = batch_shapes(config, bucket, config.train.batch_size)
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), shapes
            )

        batches = [(batch(bucket),) for bucket in config.data.buckets]
        self._programs = {
            phase: Programs(
                assembly.step(module, teacher, phase),
                batches,
                name=f"training step{f' ({phase.first + 1} to {phase.stop})' * self._told}",
                remedies=remedies,
            )
            for phase in self._phases
        }

    def compile_all(self, *held: Any) -> None:
        """See ``Programs.compile_all``; of all phases that are not over."""
        for programs in self._programs.values():
            programs.compile_all(*held)

    def __call__(self, done: int, held: tuple[Any, ...], batch: tuple[Any, ...]) -> Any:
        """The program of the step after ``done`` steps, see ``Programs``."""
        phase = phase_of(self._phases, done)
        if phase is not self._now:
            self._now = phase
            if self._told:
                say(phase.describe())
        return self._programs[phase](held, batch)
