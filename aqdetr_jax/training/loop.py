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
from aqdetr_jax.checkpoint.transfer import match_classes
from aqdetr_jax.config_types import from_dataclass
from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.data.pipeline import make_train_pipeline
from aqdetr_jax.evaluation.coco import results_block
from aqdetr_jax.evaluation.evaluator import Detections, Evaluator
from aqdetr_jax.host import StoppedError
from aqdetr_jax.io import read_json, write_json_atomic, write_text_atomic
from aqdetr_jax.models.detector import Detector, example_input, record_ops
from aqdetr_jax.parallel.hosts import agree, agreed, is_main, one_for_all, say, stop_request
from aqdetr_jax.parallel.mesh import (
    bytes_a_device,
    make_mesh,
    on_accelerators,
    put_batch,
    replicated,
)
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.quant.report import bit_report, format_bit_report
from aqdetr_jax.training import initial, remedies, setup, sizing
from aqdetr_jax.training import optimizer as optim
from aqdetr_jax.training.assemble import TRAINED_KEYS, Assembly, assemble
from aqdetr_jax.training.bundles import run_bundle
from aqdetr_jax.training.clock import RunClock
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.data_check import check_data
from aqdetr_jax.training.log import StepLog, open_writer
from aqdetr_jax.training.notices import say_limits
from aqdetr_jax.training.places import place_of
from aqdetr_jax.training.profile import STEP, StepTrace, check_profile
from aqdetr_jax.training.programs import step_programs
from aqdetr_jax.training.resume import facts
from aqdetr_jax.training.state import TrainState
from aqdetr_jax.training.workdir import Workdir, prepare_workdir

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
      DoesNotFitError: a bucket's step needs more memory than a device has.
      ValueError, FileNotFoundError and their kin: bad input; the message names it.
    """
    clock = RunClock()
    # --- devices and data -------------------------------------------------------------------
    given, config = config, sizing.with_batch(config)
    mesh = make_mesh(
        sizing.devices_along_data(config, config.train.batch_size // config.train.accumulate),
        config.mesh.model,
    )
    with agreed():
        place = place_of(workdir)
        train_set = open_dataset(config.data, train=True)
        eval_set = open_dataset(config.data, train=False)
        config = check_data(config, train_set, eval_set)
        sizing.say_sizes(given, config, train_set)
        known = facts(config, place, train_set, eval_set)
        check_profile(config)
    with (
        prepare_workdir(place, from_dataclass(config), **known) as folder,
        jax.set_mesh(mesh),
        contextlib.closing(clock),
    ):
        if folder.changes:
            say(f"{config.name}: changed since the last start: {'; '.join(folder.changes)}")
        run = _Run(given, config, folder, mesh, train_set, eval_set, clock)
        try:
            return run.run()
        except StoppedError:  # when the progress line has ended
            run.say_times()
            raise


class _Run:
    def __init__(self, given, config, folder, mesh, train_set, eval_set, clock):
        self.given: ExperimentConfig = given
        self.config: ExperimentConfig = config
        self.folder: Workdir = folder
        self.path: Path = folder.path
        self.mesh = mesh
        self.train_set: DetectionDataset = train_set
        self.eval_set: DetectionDataset = eval_set
        self.clock: RunClock = clock
        self.module = setup.build_module(config)
        self.evaluator: Evaluator | None = None
        self.resumed = False

    def run(self) -> RunResult:
        config = self.config
        finished = self._finished()
        if finished is not None:
            say(f"{config.name}: this run is finished; its results are in {self.path}")
            return finished
        say_limits(config, self.train_set, self.eval_set)

        # --- teacher ------------------------------------------------------------------------
        teacher = setup.load_teacher(config)
        teacher_module = teacher.module() if teacher else None
        teacher_variables = jax.device_put(
            teacher.variables if teacher else {}, replicated(self.mesh)
        )

        # --- state: restored, or made ---------------------------------------------------------
        with Checkpoints(self.path / "checkpoints", config.train.keep_checkpoints) as checkpoints:
            assembly, state, restored = self._state(checkpoints)
            first, self.resumed = int(restored or 0), restored is not None
            self._write_bits(state)

            # --- the step ---------------------------------------------------------------------
            step = assembly.step(self.module, teacher_module)
            devices = self.mesh.shape["data"]
            helps = remedies.for_run(self.given.data, config, devices, resumed=self.resumed)
            programs = step_programs(config, step, self.mesh, helps)
            if on_accelerators(self.mesh):
                # All of them, so that what does not fit is found now and not when it first comes.
                with self.clock.within("compile"):
                    programs.compile_all(state, teacher_variables)
                    if isinstance(self.module, Detector):
                        self._evaluator(state).compile(state.evaluated)

            # --- loop -------------------------------------------------------------------------
            block = detections = None
            with (
                # A run that was killed before its first checkpoint logs from step 1 again.
                open_writer(self.path, first) as writer,
                stop_request() as stop,
                contextlib.closing(
                    self._loop(state, first, programs, teacher_variables, writer)
                ) as steps,
            ):
                for done, state in steps:
                    last = done == config.train.steps
                    stopping = not last and stop.seen(done)
                    if self._due(done, config.train.checkpoint_every) or last or stopping:
                        with self.clock.within("checkpoint"):
                            self.folder.check()
                            writer.sync()
                            checkpoints.save(done, state, wait=last or stopping)
                    if stopping:
                        raise StoppedError(
                            f"stopped at step {done} as asked; the state is saved in {self.path}: "
                            "run the same command to go on"
                        )
                    # After the save: an evaluation that fails, or is too long for the time that a
                    # preempted machine is given, costs no training.
                    if isinstance(self.module, Detector) and (
                        last or self._due(done, config.train.eval_every)
                    ):
                        block, detections = self._evaluate(state)
                        writer.write(done, _flat_results(block))
                if block is None and isinstance(self.module, Detector):  # killed while evaluating
                    block, detections = self._evaluate(state)
                    writer.write(config.train.steps, _flat_results(block))

        # --- what is kept ---------------------------------------------------------------------
        bundle = run_bundle(
            config, self.train_set, self.eval_set, jax.device_get(state.evaluated), block
        )
        with self.clock.within("checkpoint"):
            save_model(self.path / MODEL_FOLDER, bundle)
        if block is not None and detections is not None and is_main():
            detections.write(self.path)
            write_json_atomic(self.path / "results.json", block)
        self.say_times()
        return RunResult(config, load_model(self.path), block, detections)

    # ------------------------------------------------------------------------------------------

    def say_times(self) -> None:
        """What the time went into."""
        self.clock.lap()
        say(f"{self.config.name}: {self.clock.summary()}")

    def _finished(self) -> RunResult | None:
        """What a finished run left in the work directory, else None."""
        results = self.path / "results.json"  # written last of all
        if isinstance(self.module, Detector):
            if not agree(results.is_file()):
                return None
            block = read_json(results)
            found = Detections.read(self.path, block["seconds"])
            return RunResult(self.config, load_model(self.path), block, found)
        done = agree((self.path / MODEL_FOLDER / "manifest.json").is_file())
        return RunResult(self.config, load_model(self.path)) if done else None

    def _state(self, checkpoints: Checkpoints) -> tuple[Assembly, TrainState, int | None]:
        """What the run is made of, its state on the mesh, the restored step (None = a start)."""
        config = self.config
        fresh = agree(checkpoints.latest_step() is None)
        if fresh:
            first = one_for_all(self._first_variables())
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
        restored = checkpoints.restore(assembly.state)
        assert restored is not None
        say(f"{config.name}: going on from step {restored[1]} in {self.path}")
        return assembly, *restored

    def _first_variables(self) -> dict[str, Any]:
        config = self.config
        source = setup.load_source(config.init_from, "init_from") if config.init_from else None
        if source is not None:
            source = match_classes(source, self.train_set.class_names)
        with contextlib.closing(setup.calibration_pipeline(config, self.train_set)) as batches:
            values, report = initial.initial_variables(config, self.module, source, batches)
        if report is not None:
            say(f"{config.init_from}: {report.summary()}")
        elif config.task == "detect":
            say(
                f"training from scratch on {len(self.train_set)} images: a DETR needs pretrained "
                "features (aqdetr pretrain, then config.init_from); expect a low AP"
            )
        return values

    def _write_bits(self, state: TrainState) -> None:
        """The bit report of the inference model, with every run."""
        if isinstance(self.module, Detector):
            bucket = (self.config.data.eval_buckets or self.config.data.buckets)[0]
            shapes = jax.eval_shape(lambda s: s.evaluated, state)
            rows = record_ops(self.module, shapes, bucket)
            setup.check_patterns(self.config, [row.path for row in rows], state.params)
            report = bit_report(rows)
            if not is_main():
                return
            write_json_atomic(self.path / "bit_report.json", report)
            write_text_atomic(self.path / "bit_report.txt", format_bit_report(report) + "\n")

    def _loop(self, state, first, programs, teacher_variables, writer) -> Generator:
        """Yields (steps done, state) after every step; logs.

        Between the host and the devices go the batch, by ``put_batch``, and what is logged, by
        ``log.put`` and ``log.fetch``; anything else is an error.
        """
        config, clock = self.config, self.clock
        pipeline = setup.pipeline_config(config, train=True, start_step=first)
        batches = make_train_pipeline(self.train_set, pipeline)
        log = StepLog(config, self.path, writer, clock, self.train_set, batches.stats, state, first)
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
                        program = programs((state, teacher_variables), (placed,))
                    state, metrics = clock.step(program, state, teacher_variables, placed)
                trace.after(done, metrics)
                if self._due(done, config.train.log_every) or done == config.train.steps:
                    with jax.transfer_guard(GUARD):
                        log.step(done, metrics, batch["image_index"])
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

    def _evaluate(self, state: TrainState) -> tuple[dict[str, Any], Detections]:
        with self.clock.within("evaluation"):
            metrics, detections = self._evaluator(state).evaluate(state.evaluated)
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


def _flat_results(block: dict[str, Any]) -> dict[str, float]:
    """The 12 numbers as ``eval/AP`` etc."""
    return {f"eval/{k}": v for k, v in block.items() if k.startswith(("AP", "AR"))}
