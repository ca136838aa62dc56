"""The configuration of an experiment, as frozen dataclasses.

Configuration files are ml_collections files (``configs/``); at the boundary they are converted once
to these dataclasses, which check every key and value, are hashable, and are what the code passes
around.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.losses.criterion import LossWeights
from aqdetr_jax.losses.distillation import DistillationWeights
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.quant.policy import check_pattern


@dataclasses.dataclass(frozen=True)
class AuxiliaryConfig:
    """Matching and start of the auxiliary queries; their number M and groups G are in ``model``.

    Attributes:
      weight: λ_aux.
      repeats: K, queries matched to each ground-truth box in each group.
      start: "object" (copies of the object queries plus noise, when parameters are imported) or
        "random".
      noise: standard deviation of that noise, relative to the object queries' own.
    """

    weight: float = 1.0
    repeats: int = 3
    start: Literal["object", "random"] = "object"
    noise: float = 0.1


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Distillation from a float teacher.

    Attributes:
      teacher: folder of the teacher's parameters; "" = the model of ``init_from``.
      weights: what is distilled and how much; all 0 = no teacher.
    """

    teacher: str = ""
    weights: DistillationWeights = dataclasses.field(default_factory=DistillationWeights)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW in groups.

    Attributes:
      lr: learning rate of the transformer, heads and queries.
      lr_backbone: learning rate of the backbone.
      lr_steps: learning rate of the step sizes, *relative to the step*: one Adam update of size 1
        changes a step by this fraction of itself.
      weight_decay: decoupled; not on norms, biases and step sizes.
      clip_norm: limit on the global gradient norm; 0 = off.
      warmup: steps of linear warm-up.
      schedule: "step" (x0.1 at each of ``drop_at``), "cosine" or "constant".
      drop_at: fractions of the run at which a "step" schedule drops.
      final: rate at the end of a cosine, as a fraction of ``lr``.
      slow: regular expressions of parameter paths that are trained at ``slow_factor`` times ``lr``
        (Deformable DETR's sampling offsets and reference points).
      slow_factor: see ``slow``.
      frozen: regular expressions of parameter paths that are not trained.
      ema: decay of the exponential moving average of the parameters that is evaluated and kept;
        0 = none.
      reference_batch: images a step that ``lr``, ``lr_backbone`` and ``lr_steps`` are meant for; at
        another batch they follow it by ``batch_rule``. 0 = they are taken as they stand.
      batch_rule: "sqrt" (of Adam: Malladi et al., arXiv:2205.10287) or "linear" in the batch.
    """

    lr: float = 1e-4
    lr_backbone: float = 1e-5
    lr_steps: float = 1e-3
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    warmup: int = 0
    schedule: Literal["step", "cosine", "constant"] = "step"
    drop_at: tuple[float, ...] = (0.8,)
    final: float = 0.01
    slow: tuple[str, ...] = ()
    slow_factor: float = 0.1
    frozen: tuple[str, ...] = ()
    ema: float = 0.0
    reference_batch: int = 0
    batch_rule: Literal["sqrt", "linear"] = "sqrt"

    def __post_init__(self):
        for pattern in (*self.slow, *self.frozen):
            check_pattern(pattern)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
      steps: optimizer steps of the whole run; 0 = as ``epochs`` says.
      epochs: passes over the training set; 0 = as ``steps`` says. Of both, what ends first; one of
        them on the command line stands in place of both.
      batch_size: images a step, over all devices and micro-batches.
      batch_per_chip: images that each device along ``mesh.data`` takes at a time; the batch is as
        many times the devices and ``accumulate``. 0 = as ``batch_size`` says.
      accumulate: micro-batches that a step's batch is cut into, which are computed one after the
        other; the step is that of the whole batch.
      eval_batch_size: images a batch in evaluation.
      eval_batch_per_chip: images of it on each device; 0 = as ``eval_batch_size`` says.
      eval_every: steps between evaluations; 0 = only at the end.
      checkpoint_every: steps between checkpoints; 0 = only at the end.
      keep_checkpoints: newest checkpoints kept.
      on_save_error: "stop" (a checkpoint that cannot be written ends the run) or "go_on" (it is
        told, and the run goes on without it; what was saved before is kept either way).
      log_every: steps between metric lines.
      quantizers_every: steps between looks at every quantizer (share of clipped values and of codes
        in use); 0 = never.
      abort_after: stop after this many steps in a row with a non-finite loss, gradient or step
        size.
      watchdog: seconds without a step, after which the run ends with the stacks of all threads of
        all hosts; 0 = however long it takes.
      pictures: validation images drawn in the report.
      profile: "FIRST:LAST", steps whose profiler trace is written; "" = none.
    """

    steps: int = 0
    epochs: float = 0.0
    batch_size: int = 32
    batch_per_chip: int = 0
    accumulate: int = 1
    eval_batch_size: int = 50
    eval_batch_per_chip: int = 0
    eval_every: int = 0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    on_save_error: Literal["stop", "go_on"] = "stop"
    log_every: int = 20
    quantizers_every: int = 1000
    abort_after: int = 20
    watchdog: float = 1800.0
    pictures: int = 8
    profile: str = ""

    @property
    def profiled(self) -> tuple[int, int] | None:
        """The first and the last step of ``profile``, counted from 1; None without one."""
        if not self.profile:
            return None
        found = re.fullmatch(r"(\d+):(\d+)", self.profile)
        first, last = map(int, found.groups()) if found else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(
                f"train.profile={self.profile!r}: write FIRST:LAST, two steps counted from 1 in "
                "order, such as 100:110"
            )
        return first, last

    def __post_init__(self):
        _ = self.profiled  # refuses another text


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices: ``data`` x ``model``; data = -1 takes all that are left."""

    data: int = -1
    model: int = 1


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """One run.

    Attributes:
      name: shown in results.
      task: "detect" (DETR) or "pretrain" (dense pretraining of backbone and encoder).
      seed: everything random is a function of it and the step.
      init_from: folder with parameters to start from ("" = from scratch); a run's folder or its
        ``model`` folder.
      data: images.
      model: sizes; ``num_classes=0`` takes the data's.
      quant: bits.
      auxiliary: matching of the auxiliary queries.
      distill: teacher and distillation weights.
      loss: set-loss weights.
      optimizer: AdamW.
      train: the loop.
      mesh: devices.
    """

    name: str = "experiment"
    task: Literal["detect", "pretrain"] = "detect"
    seed: int = 0
    init_from: str = ""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: DetrConfig = dataclasses.field(default_factory=DetrConfig)
    quant: QuantConfig = dataclasses.field(default_factory=QuantConfig)
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    distill: DistillConfig = DistillConfig()
    loss: LossWeights = dataclasses.field(default_factory=LossWeights)
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        wanted = self.model.class_loss
        if self.loss.kind != wanted:
            raise ValueError(
                f"loss.kind must be {wanted!r} with model.family={self.model.family!r}: DETR's "
                "class head has a no-object output, Deformable DETR's one sigmoid a class"
            )
        weights = self.distill.weights
        if self.model.deformable.two_stage and weights.decoder_self + weights.decoder_cross > 0:
            raise ValueError(
                "distill.weights.decoder_self and decoder_cross must be 0 with two stages: the "
                "teacher's queries are its own proposals and do not correspond to the student's"
            )
        if self.task == "pretrain" and self.quant.quantized:
            raise ValueError("task='pretrain' trains a float backbone: set quant.policy='float'")
        for name in ("batch_size", "accumulate", "eval_batch_size", "log_every", "abort_after"):
            if getattr(self.train, name) < 1:
                raise ValueError(f"train.{name} must be at least 1")
        for name in (
            *("epochs", "steps", "batch_per_chip", "eval_batch_per_chip"),
            *("quantizers_every", "watchdog"),
        ):
            if getattr(self.train, name) < 0:
                raise ValueError(f"train.{name} must not be negative")
        if self.optimizer.reference_batch < 0:
            raise ValueError("optimizer.reference_batch must not be negative")
        if self.train.accumulate > 1:
            self._check_accumulation()

    def _check_accumulation(self):
        wanted = "train.accumulate must be 1 with "
        if self.task == "pretrain" or self.model.backbone.norm == "batch":
            raise ValueError(
                f"{wanted}model.backbone.norm='batch' (and in a pretraining): norms that learn "
                "need the whole batch at once"
            )
        if self.distill.weights.active and self.distill.weights.kind == "output":
            raise ValueError(
                f"{wanted}distill.weights.kind='output': it is relative to the teacher's values in "
                "the whole batch; 'kl', 'mse' and 'logits' are not"
            )
