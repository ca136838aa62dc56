"""A training run from beginning to end, phase by phase; run it again and it goes on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aqdetr_jax.checkpoint.model_folder import MODEL_FOLDER, ModelBundle, load_model, save_model
from aqdetr_jax.checkpoint.steps import Checkpoints
from aqdetr_jax.config_types import from_dataclass
from aqdetr_jax.data.batching import PipelineStats
from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.data.pipeline import make_train_pipeline
from aqdetr_jax.evaluation.coco import results_block
from aqdetr_jax.evaluation.evaluator import Detections, Evaluator
from aqdetr_jax.host import StoppedError
from aqdetr_jax.io import write_json_atomic
from aqdetr_jax.models.detector import Detector, example_input
from aqdetr_jax.parallel.hosts import (
    StopRequest,
    agree,
    check_same,
    is_main,
    one_for_all,
    say,
    stop_request,
    together,
)
from aqdetr_jax.parallel.mesh import (
    bytes_a_device,
    make_mesh,
    on_accelerators,
    put_batch,
    replicated,
)
from aqdetr_jax.parallel.watch import Position, Watch
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.training import beginning, remedies, setup, sizing
from aqdetr_jax.training import optimizer as optim
from aqdetr_jax.training.assemble import TRAINED_KEYS, Assembly, assemble, restore
from aqdetr_jax.training.bundles import run_bundle
from aqdetr_jax.training.clock import RunClock
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.data_check import check_data
from aqdetr_jax.training.dump import write_dump
from aqdetr_jax.training.health import QuantizerHealth
from aqdetr_jax.training.log import StepLog, flat_results, has_metric, open_writer
from aqdetr_jax.training.notices import TrainingDivergedError, in_one_line, say_limits
from aqdetr_jax.training.phases import run_phases
from aqdetr_jax.training.places import place_of
from aqdetr_jax.training.profile import STEP, StepTrace, check_profile
from aqdetr_jax.training.programs import StepPrograms
from aqdetr_jax.training.resume import facts, shared_facts
from aqdetr_jax.training.saving import Saver
from aqdetr_jax.training.state import TrainState
from aqdetr_jax.training.workdir import Workdir, check_shared, note_result, prepare_workdir

GUARD = "disallow"
"""``jax.transfer_guard`` of the loop: what is transferred is transferred explicitly."""


@dataclasses.dataclass
class RunResult:
    """What a run leaves behind in memory; the same is in the work directory.

    Attributes:
      config: the experiment, with what depended on the data filled in.
      bundle: the trained model (moving average if there is one).
      block: results block of the last evaluation, None after a pretraining.
      detections: detections of that evaluation.
    """

    config: ExperimentConfig
    bundle: ModelBundle
    block: dict[str, Any] | None = None
    detections: Detections | None = None


def train(config: ExperimentConfig, workdir: str | Path) -> RunResult:
    """Trains, evaluates, and writes everything a run keeps.

    Args:
      config: the experiment.
      workdir: folder of the run; if it holds this run already, training goes on from its newest
        intact checkpoint, bit for bit as if it had never stopped.

    Returns:
      ``RunResult``.

    Raises:
      StoppedError: after SIGTERM or SIGINT, with the state saved.
      TrainingDivergedError: see ``train.abort_after``.
      LostError: another process of the run has ended.
      DoesNotFitError: a bucket's step needs more memory than a device has.
      ValueError, FileNotFoundError and their kin: bad input; the message names it.
    """
    clock = RunClock()
    with contextlib.ExitStack() as stack:
        # What one host cannot do ends all of them: none waits for another that is gone.
        with together():
            place = place_of(workdir)
            run, known = _opened(config, place, clock)
        config = run.config
        check_same(shared_facts(config, known))
        with together():
            prepared = prepare_workdir(place, from_dataclass(config), **known)
            folder = stack.enter_context(prepared)
        check_shared(folder)
        run.folder, run.path = folder, folder.path
        stack.enter_context(jax.set_mesh(run.mesh))
        stack.enter_context(contextlib.closing(clock))
        watch = stack.enter_context(Watch(run.position, config.train.watchdog, run.path))
        if folder.changes:
            say(f"{config.name}: changed since the last start: {'; '.join(folder.changes)}")
        try:
            return run.run()
        except StoppedError:  # when the progress line has ended
            run.say_times()
            raise
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            told = in_one_line(error, watch, run.helps)
            if told is None:
                raise
            raise told from error


def _opened(config: ExperimentConfig, workdir: Path, clock: RunClock) -> tuple[_Run, Any]:
    """The run with its devices and data, and what its work directory must agree with."""
    given, config = config, sizing.with_batch(config)
    mesh = make_mesh(
        sizing.devices_along_data(config, config.train.batch_size // config.train.accumulate),
        config.mesh.model,
    )
    train_set = open_dataset(config.data, train=True)
    eval_set = open_dataset(config.data, train=False)
    config = check_data(config, train_set, eval_set)
    sizing.say_sizes(given, config, train_set)
    known = facts(config, workdir, train_set, eval_set)
    check_profile(config)
    run_phases(config)  # refuses one without a step
    return _Run(given, config, workdir, mesh, train_set, eval_set, clock), known


class _EvaluationStopped(Exception):
    """The run was asked to stop within an evaluation."""


class _Run:
    def __init__(self, given, config, path, mesh, train_set, eval_set, clock):
        self.given: ExperimentConfig = given
        self.config: ExperimentConfig = config
        self.folder = Workdir(path, False, [])  # until it is prepared
        self.path: Path = path
        self.mesh = mesh
        self.train_set: DetectionDataset = train_set
        self.eval_set: DetectionDataset = eval_set
        self.clock: RunClock = clock
        self.module = setup.build_module(config)
        self.evaluator: Evaluator | None = None
        self.resumed = False
        self.evaluated_batches = 0
        self.input: PipelineStats | None = None
        self.helps = ""

    def run(self) -> RunResult:
        config = self.config
        finished = beginning.finished(self.path, judged=isinstance(self.module, Detector))
        if finished is not None:
            say(f"{config.name}: this run is finished; its results are in {self.path}")
            return RunResult(config, *finished)
        say_limits(config, self.train_set, self.eval_set)

        # --- teacher ------------------------------------------------------------------------
        self.teacher = teacher = setup.load_teacher(config)
        teacher_module = teacher.module() if teacher else None
        teacher_variables = jax.device_put(
            teacher.variables if teacher else {}, replicated(self.mesh)
        )

        # --- state: restored, or made ---------------------------------------------------------
        with Checkpoints(self.path / "checkpoints", config.train.keep_checkpoints) as checkpoints:
            assembly, state, restored = self._state(checkpoints)
            first, self.resumed = int(restored or 0), restored is not None
            if isinstance(self.module, Detector):
                beginning.write_bits(self.path, config, self.module, state)
            go_on = config.train.on_save_error == "go_on"
            saver = Saver(checkpoints, go_on=go_on, first=restored)

            # --- the step ---------------------------------------------------------------------
            self.helps = helps = remedies.for_run(
                *(self.given.data, config, self.mesh.shape["data"]), resumed=self.resumed
            )
            programs = StepPrograms(assembly, self.module, teacher_module, helps, first)
            self.parts = assembly.optimizer.packing.names
            self.health = health = QuantizerHealth(config, self.module, self.mesh, helps)
            if on_accelerators(self.mesh):
                # All of them, so that what does not fit is found now and not when it first comes.
                with self.clock.within("compile"):
                    programs.compile_all(state, teacher_variables)
                    health.compile(state)
                    if isinstance(self.module, Detector):
                        self._evaluator(state).compile(state.evaluated)

            # --- loop -------------------------------------------------------------------------
            block = detections = None
            with (
                # A run that was killed before its first checkpoint logs from step 1 again.
                open_writer(self.path, first, keep_going=go_on) as writer,
                stop_request() as stop,
                contextlib.closing(
                    self._loop(state, first, programs, teacher_variables, writer)
                ) as steps,
            ):

                def evaluate(done: int, state: TrainState, told: bool = False) -> None:
                    nonlocal block, detections
                    try:
                        block, detections = self._evaluate(state, stop)
                    except _EvaluationStopped:
                        with self.clock.within("checkpoint"):
                            saver.save(done, state, wait=True, must=True)
                        raise self._stopped(done) from None
                    if not told:
                        writer.write(done, flat_results(block))

                detects = isinstance(self.module, Detector)
                if detects and first:  # a kill may have cut off the evaluation of this step
                    told = agree(has_metric(self.path, first, "eval/AP"))
                    due = self._due(first, config.train.eval_every)
                    if first == config.train.steps or (due and not told):
                        evaluate(first, state, told)
                for done, state in steps:
                    last = done == config.train.steps
                    stopping = not last and stop.seen(done)
                    if self._due(done, config.train.checkpoint_every) or last or stopping:
                        with self.clock.within("checkpoint"):
                            self.folder.check()
                            writer.sync()
                            saver.save(done, state, wait=last or stopping, must=stopping)
                    if stopping:
                        raise self._stopped(done)
                    # After the save: an evaluation that fails, or is too long for the time that a
                    # preempted machine is given, costs no training.
                    if detects and (last or self._due(done, config.train.eval_every)):
                        evaluate(done, state)

        # --- what is kept ---------------------------------------------------------------------
        bundle = run_bundle(
            config, self.train_set, self.eval_set, jax.device_get(state.evaluated), block
        )
        if is_main():
            note_result(self.path, bundle.variables, block)
        with self.clock.within("checkpoint"):
            save_model(self.path / MODEL_FOLDER, bundle)
        if block is not None and detections is not None and is_main():
            detections.write(self.path)
            write_json_atomic(self.path / "results.json", block)
        self.say_times()
        return RunResult(config, load_model(self.path), block, detections)

    def position(self) -> Position:
        """Where this process is; any thread may ask."""
        evaluated = self.evaluator.stats if self.evaluator else None
        reads = {"input": self.input, "evaluation": evaluated}
        return self.clock.position(reads, self.evaluated_batches)

    def _stopped(self, done: int) -> StoppedError:
        return StoppedError(
            f"stopped at step {done} as asked; the state is saved in {self.path}: run the same "
            "command to go on"
        )

    def say_times(self) -> None:
        """What the time went into."""
        self.clock.lap()
        say(f"{self.config.name}: {self.clock.summary()}")

    def _state(self, checkpoints: Checkpoints) -> tuple[Assembly, TrainState, int | None]:
        """What the run is made of, its state on the mesh, the restored step (None = a start)."""
        config = self.config
        fresh = agree(checkpoints.latest_step() is None)
        if fresh:
            first = one_for_all(beginning.first_variables(config, self.module, self.train_set))
        else:
            example = example_input(config.data.buckets[0])
            first = jax.eval_shape(self.module.init, jax.random.key(0), *example)
        assembly = assemble(config, first, self.mesh)
        if fresh:
            params = first["params"]
            trainable = optim.count_trainable(
                params, config.optimizer, frozen_norms=config.model.backbone.norm == "frozen"
            )
            total = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
            say(f"{config.name}: {total:,} parameters, {trainable:,} of them trained")
            return assembly, assembly.start(first), None
        restored = restore(checkpoints, assembly, first)
        assert restored is not None
        say(f"{config.name}: going on from step {restored[1]} in {self.path}")
        return assembly, *restored

    def _loop(self, state, first, programs, teacher_variables, writer) -> Generator:
        """Yields (steps done, state) after every step; logs.

        Between the host and the devices go the batch, by ``put_batch``, and what is logged, by
        ``log.put`` and ``log.fetch``; anything else is an error.
        """
        config, clock = self.config, self.clock
        pipeline = setup.pipeline_config(config, train=True, start_step=first)
        batches = make_train_pipeline(self.train_set, pipeline)
        self.input = batches.stats
        stats, parts = batches.stats, self.parts
        log = StepLog(config, self.path, writer, clock, self.train_set, stats, state, first, parts)
        trace = StepTrace(config, self.path, first)
        clock.started()
        try:
            for number in range(first, config.train.steps):
                done = number + 1
                trace.before(done, state)
                with (
                    jax.profiler.StepTraceAnnotation(STEP, step_num=done),
                    jax.transfer_guard(GUARD),
                ):
                    with clock.within("input"):
                        batch = next(batches)
                        placed = put_batch({k: batch[k] for k in TRAINED_KEYS}, self.mesh)
                    with clock.within("compile"):  # if this bucket's program is not made yet
                        program = programs(number, (state, teacher_variables), (placed,))
                    state, metrics = clock.step(program, state, teacher_variables, placed)
                trace.after(done, metrics)
                if self._due(done, config.train.log_every) or done == config.train.steps:
                    try:
                        with jax.transfer_guard(GUARD):
                            log.step(done, metrics, batch["image_index"], state.params)
                    except TrainingDivergedError as error:
                        where = write_dump(
                            *(self.path, config, state, batch, metrics),
                            *(self.teacher, self.train_set, str(error)),
                        )
                        raise TrainingDivergedError(
                            f"{error} aqdetr replay {where} takes the step again"
                        ) from None
                else:
                    log.note(done, metrics, batch["image_index"])
                if self.health.due(done):
                    with clock.within("other"):
                        writer.write(done, self.health.look(done, state, placed))
                yield done, state
                if self._due(done, config.train.eval_every):
                    log.restart(done)
        finally:
            batches.close()
            log.close()
            trace.close()
            if batches.stats.summary():
                say(f"{self.train_set.name}: left out since the start: {batches.stats.summary()}")

    def _evaluator(self, state: TrainState) -> Evaluator:
        assert isinstance(self.module, Detector)
        if self.evaluator is None:
            self.evaluator = Evaluator(
                self.module,
                self.eval_set,
                setup.pipeline_config(self.config, train=False),
                self.mesh,
                # Beside the state, of which the evaluated part is an argument.
                reserved=bytes_a_device(state) - bytes_a_device(state.evaluated),
                last_remedy=remedies.of_images(self.given.data, "eval", resumed=self.resumed),
            )
        return self.evaluator

    def _evaluate(self, state: TrainState, stop: StopRequest) -> tuple[dict[str, Any], Detections]:
        def progress(done: int, total: int) -> None:
            self.evaluated_batches += 1
            if stop.seen(done):
                raise _EvaluationStopped

        with self.clock.within("evaluation"):
            metrics, detections = self._evaluator(state).evaluate(state.evaluated, progress)
        block = results_block(
            metrics,
            images=len(self.eval_set),
            config=self.config.name,
            seed=self.config.seed,
            commit=git_commit(),
            seconds=detections.seconds,
        )
        say(f"AP {block['AP']:.4f}  AP50 {block['AP50']:.4f}  ({len(self.eval_set)} images)")
        return block, detections

    @staticmethod
    def _due(done: int, every: int) -> bool:
        return every > 0 and done % every == 0
