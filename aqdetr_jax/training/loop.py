"""A training run from beginning to end, phase by phase; run it again and it goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
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
from aqdetr_jax.parallel.hosts import agree, is_main, one_for_all, say, stop_request
from aqdetr_jax.parallel.mesh import make_mesh, put_batch, replicated
from aqdetr_jax.parallel.placement import MODEL_PARALLEL, parameter_shardings
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.quant.report import bit_report, format_bit_report
from aqdetr_jax.training import initial, setup, sizing
from aqdetr_jax.training import optimizer as optim
from aqdetr_jax.training.bundles import run_bundle
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.data_check import check_data
from aqdetr_jax.training.metrics import MetricsWriter, Progress
from aqdetr_jax.training.notices import check_step, counts_by_image, say_limits
from aqdetr_jax.training.resume import facts
from aqdetr_jax.training.state import TrainState
from aqdetr_jax.training.step import (
    detection_loss_fn,
    jit_train_step,
    make_train_step,
    pretrain_loss_fn,
)
from aqdetr_jax.training.workdir import prepare_workdir

TRAINED_KEYS = ("images", "mask", "boxes", "labels", "valid")
"""The entries of a batch that the training step reads; the rest stays on the host."""


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
      ValueError, FileNotFoundError and their kin: bad input; the message names it.
    """
    # --- devices and data -------------------------------------------------------------------
    given, config = config, sizing.with_batch(config)
    mesh = make_mesh(
        sizing.devices_along_data(config, config.train.batch_size // config.train.accumulate),
        config.mesh.model,
    )
    train_set = open_dataset(config.data, train=True)
    eval_set = open_dataset(config.data, train=False)
    config = check_data(config, train_set, eval_set)
    sizing.say_sizes(given, config, train_set)
    known = facts(config, Path(workdir), train_set, eval_set)
    with prepare_workdir(workdir, from_dataclass(config), **known) as folder, jax.set_mesh(mesh):
        if folder.changes:
            say(f"{config.name}: changed since the last start: {'; '.join(folder.changes)}")
        return _Run(config, folder.path, mesh, train_set, eval_set).run()


class _Run:
    def __init__(self, config, path, mesh, train_set, eval_set):
        self.config: ExperimentConfig = config
        self.path: Path = path
        self.mesh = mesh
        self.train_set: DetectionDataset = train_set
        self.eval_set: DetectionDataset = eval_set
        self.module = setup.build_module(config)
        self.frozen_norms = config.model.backbone.norm == "frozen"
        self.evaluator: Evaluator | None = None

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
            optimizer, state, restored = self._state(checkpoints)
            first = int(restored or 0)
            self._write_bits(state)

            # --- the step ---------------------------------------------------------------------
            if isinstance(self.module, Detector):
                loss_fn = detection_loss_fn(config, self.module, teacher_module)
            else:
                loss_fn = pretrain_loss_fn(config, self.module)
            step = jit_train_step(make_train_step(config, loss_fn, optimizer), state, self.mesh)

            # --- loop -------------------------------------------------------------------------
            block = detections = None
            with (
                # A run that was killed before its first checkpoint logs from step 1 again.
                _writer(self.path, first) as writer,
                stop_request() as stop,
                contextlib.closing(
                    self._loop(state, first, step, teacher_variables, writer)
                ) as steps,
            ):
                for done, state in steps:
                    last = done == config.train.steps
                    stopping = not last and stop.seen(done)
                    if self._due(done, config.train.checkpoint_every) or last or stopping:
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
        save_model(self.path / MODEL_FOLDER, bundle)
        if block is not None and detections is not None and is_main():
            detections.write(self.path)
            write_json_atomic(self.path / "results.json", block)
        return RunResult(config, load_model(self.path), block, detections)

    # ------------------------------------------------------------------------------------------

    def _finished(self) -> RunResult | None:
        """What a finished run left in the work directory, else None."""
        results = self.path / "results.json"  # written last of all
        if isinstance(self.module, Detector):
            if not agree(results.is_file()):
                return None
            block = read_json(results)
            found = Detections.read(self.path, block["seconds"])
            return RunResult(self.config, load_model(self.path), block, found)
        done = agree((self.path / MODEL_FOLDER).is_dir())
        return RunResult(self.config, load_model(self.path)) if done else None

    def _state(self, checkpoints: Checkpoints):
        """Optimizer, state on the mesh, and the restored step (None = a fresh start)."""
        config = self.config
        fresh = agree(checkpoints.latest_step() is None)
        images, mask = example_input(config.data.buckets[0])
        key = jax.random.key(0)
        if fresh:
            first = one_for_all(self._first_variables())
        else:
            first = jax.eval_shape(self.module.init, key, images, mask)
        params, stats = first["params"], first["batch_stats"]
        arguments = (params, config.optimizer)
        rules = MODEL_PARALLEL if config.mesh.model > 1 else ()
        optimizer = optim.make_optimizer(
            *arguments, config.train.steps, frozen_norms=self.frozen_norms, rules=rules
        )

        def create(params, stats):
            return TrainState.create(params, stats, optimizer, ema=config.optimizer.ema > 0)

        abstract = jax.eval_shape(create, params, stats)
        shardings = parameter_shardings(abstract, self.mesh, rules)
        if fresh:
            state = jax.jit(create, out_shardings=shardings)(params, stats)
            trainable = optim.count_trainable(*arguments, frozen_norms=self.frozen_norms)
            total = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
            say(f"{config.name}: {total:,} parameters, {trainable:,} of them trained")
            return optimizer, state, None
        wanted = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
        )
        restored = checkpoints.restore(wanted)
        assert restored is not None
        say(f"{config.name}: going on from step {restored[1]} in {self.path}")
        return optimizer, restored[0], restored[1]

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

    def _loop(self, state, first, step, teacher_variables, writer) -> Generator:
        """Yields (steps done, state) after every step; logs."""
        config = self.config
        pipeline = setup.pipeline_config(config, train=True, start_step=first)
        batches = make_train_pipeline(self.train_set, pipeline)
        rate = jax.jit(optim.learning_rate(config.optimizer, config.train.steps))
        progress = Progress(
            config.train.steps,
            self.path,
            batch_size=config.train.batch_size,
            start=first,
            stream=None if is_main() else io.StringIO(),
        )
        clock, counted = time.perf_counter(), first
        skipped, abort_after = int(state.skipped), config.train.abort_after
        try:
            for number in range(first, config.train.steps):
                batch = next(batches)
                placed = put_batch({k: batch[k] for k in TRAINED_KEYS}, self.mesh)
                with jax.transfer_guard("disallow"):
                    state, metrics = step(state, teacher_variables, placed)
                done = number + 1
                if self._due(done, config.train.log_every) or done == config.train.steps:
                    metrics = jax.device_get(metrics)
                    values = {k: float(np.sum(v)) for k, v in metrics.items()}
                    now = time.perf_counter()
                    images = (done - counted) * config.train.batch_size
                    values["images_per_second"] = images / (now - clock)
                    # Skipped updates do not advance the schedule.
                    updates = max(number - int(values["skipped"]), 0)
                    values["learning_rate"] = float(rate(updates)) * config.optimizer.lr
                    clock, counted = now, done
                    values["truncated_boxes"] = float(batches.stats.truncated_boxes)
                    values["skipped_images"] = float(batches.stats.skipped_images)
                    writer.write(done, values)
                    new = int(values["skipped"]) - skipped
                    replaced = counts_by_image(
                        metrics.get("replaced_costs"), batch["image_index"], self.train_set
                    )
                    check_step(done, values, replaced, new, abort_after)
                    skipped = int(values["skipped"])
                    progress.update(done, _shown(values))
                yield done, state
                if self._due(done, config.train.eval_every):
                    clock, counted = time.perf_counter(), done
        finally:
            batches.close()
            progress.close()
            if batches.stats.summary():
                say(f"{self.train_set.name}: left out since the start: {batches.stats.summary()}")

    def _evaluate(self, state: TrainState) -> tuple[dict[str, Any], Detections]:
        assert isinstance(self.module, Detector)
        if self.evaluator is None:
            self.evaluator = Evaluator(
                self.module,
                self.eval_set,
                setup.pipeline_config(self.config, train=False),
                self.mesh,
            )
        metrics, detections = self.evaluator.evaluate(state.evaluated)
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


def _writer(path: Path, first: int) -> contextlib.AbstractContextManager:
    """The metrics writer; a run killed before its first checkpoint logs from step 1 again."""
    if is_main():
        return MetricsWriter(path, resume_step=first)
    return contextlib.nullcontext(_NoWriter())


class _NoWriter:
    def write(self, step: int, metrics: object) -> None:
        """Other processes than the main one write nothing."""


def _shown(values: dict[str, float]) -> dict[str, float]:
    """The few terms that fit a progress line."""
    shown = ("loss", "loss_ce", "loss_bbox", "loss_giou", "loss_distill_encoder")
    return {name: values[name] for name in shown if name in values}


def _flat_results(block: dict[str, Any]) -> dict[str, float]:
    """The 12 numbers as ``eval/AP`` etc."""
    return {f"eval/{k}": v for k, v in block.items() if k.startswith(("AP", "AR"))}
