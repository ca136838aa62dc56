"""The configuration of an experiment, as frozen dataclasses.

Configuration files are ml_collections files (``configs/``); at the boundary they are converted once
to these dataclasses, which check every key and value, are hashable, and are what the code passes
around.
"""

from __future__ import annotations

import dataclasses
import itertools
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
    """Distillation from a float teacher, or from the student's own float path.

    Attributes:
      source: "teacher" (another network), or "float_path": the target of an attention is the same
        attention unquantized, with its weights of that step and on its own input.
      teacher: folder of the teacher's parameters; "" = the model of ``init_from``.
      weights: what is distilled and how much; all 0 = no distillation.
    """

    source: Literal["teacher", "float_path"] = "teacher"
    teacher: str = ""
    weights: DistillationWeights = dataclasses.field(default_factory=DistillationWeights)

    def __post_init__(self):
        if self.source == "float_path" and self.weights.foreground:
            raise ValueError(
                "distill.weights.foreground compares with another network's queries: set "
                "distill.source='teacher', or the weight to 0"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher network runs in a step."""
        return self.weights.active and self.source == "teacher"

    @property
    def from_float_path(self) -> bool:
        """Whether a step computes attentions' float paths."""
        return self.weights.active and self.source == "float_path"


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
class PhaseConfig:
    """A part of a run in which less is quantized, or less is trained, or at other rates.

    Attributes:
      begin: fraction of the run's steps after which it begins.
      end: fraction at which it ends.
      quantized: regular expressions of operations that are quantized as ``quant`` says; the others
        are float. () = all.
      trained: regular expressions of paths of the parameters that are trained, as far as they are
        otherwise; the others stay as they are. () = all.
      from_average: begins from the moving average of the parameters (``optimizer.ema``).
      rate: factor on the learning rates that the schedule gives.
    """

    begin: float = 0.0
    end: float = 1.0
    quantized: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    from_average: bool = False
    rate: float = 1.0

    def __post_init__(self):
        for pattern in (*self.quantized, *self.trained):
            check_pattern(pattern)
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(
                f"begin={self.begin} and end={self.end} must be fractions of the run in order: "
                "0 <= begin < end <= 1"
            )
        if not (self.quantized or self.trained or self.from_average or self.rate != 1):
            raise ValueError(
                "a phase without quantized, trained, from_average or rate is the run as it is: "
                "give one of them, or leave the phase out"
            )
        if self.rate <= 0:
            raise ValueError(f"rate must be positive, got {self.rate}: see trained for what stays")
        if self.from_average and not self.begin:
            raise ValueError("from_average needs begin > 0: before the first step there is none")


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
      phases: parts of the run in which not all is quantized or trained, in their order.
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
    phases: tuple[PhaseConfig, ...] = ()

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
        for one, other in itertools.pairwise(self.phases):
            if one.end > other.begin:
                raise ValueError(
                    f"phases must follow one another: one ends at {one.end}, the next begins at "
                    f"{other.begin}"
                )


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
        weights, teacher = self.distill.weights, self.distill.needs_teacher
        two_stage = self.model.deformable.two_stage
        if two_stage and teacher and weights.decoder_self + weights.decoder_cross > 0:
            raise ValueError(
                "distill.weights.decoder_self and decoder_cross must be 0 with two stages: the "
                "teacher's queries are its own proposals and do not correspond to the student's"
            )
        if self.distill.from_float_path and not self.quant.quantized:
            raise ValueError(
                "distill.source='float_path' compares a quantized attention with the same one "
                "unquantized, and quant.policy is 'float'"
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
        if self.task == "pretrain" and self.train.phases:
            raise ValueError("train.phases are of a detector's training, and task is 'pretrain'")
        for phase in self.train.phases:
            if phase.quantized and not self.quant.quantized:
                raise ValueError(
                    "train.phases: one has 'quantized', and quant.policy is 'float': leave it out"
                )
            if phase.from_average and not self.optimizer.ema:
                raise ValueError("train.phases: one has 'from_average', and optimizer.ema is 0")
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
