"""A folder of one's own images becomes a low-bit detector: every stage in one command."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from aqdetr_jax.checkpoint.model_folder import ModelBundle, load_model
from aqdetr_jax.compress import compress
from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.losses.criterion import LossWeights
from aqdetr_jax.parallel.hosts import say
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.training import setup, sizing
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.data_check import check_data
from aqdetr_jax.training.effects import idle
from aqdetr_jax.training.estimate import estimate
from aqdetr_jax.training.experiment import load_experiment
from aqdetr_jax.training.loop import train
from aqdetr_jax.training.metrics import format_seconds

STUDENT_KEYS = ("quant.", "auxiliary.", "distill.")
"""Overrides of these groups are the student's; those below hold for every stage."""
SHARED_KEYS = ("seed", "data.", "model.", "train.", "mesh.", "optimizer.")

AUXILIARY_KEYS = ("model.num_auxiliary", "model.auxiliary_groups")
"""Not of plain LSQ, which has no auxiliary queries."""

FINE_LR, FINE_LR_BACKBONE = 2e-4, 2e-5
"""Learning rates from a detector that was trained elsewhere: Deformable DETR's own."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The stages of a run, in order.

    Attributes:
      stages: name (its folder in the work directory) -> configuration, as given.
      resolved: the same with the sizes that follow from the data.
      teacher: folder of the float model that the low-bit stages start from.
    """

    stages: dict[str, ExperimentConfig]
    resolved: dict[str, ExperimentConfig]
    teacher: Path


def finetune(
    root: str,
    workdir: str | Path,
    *,
    family: str | None = None,
    source: str = "",
    baseline: bool = False,
    effort: float = 1.0,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Backbone, float teacher, calibrated and trained low-bit student, report.

    Run it again to go on after an interruption, at any stage; what is finished is not done again.

    Args:
      root: folder of the data set, in any layout of ``data.layout``.
      workdir: folder for everything; one folder a stage.
      family: "deformable" (None) or "detr"; of a detector to start from, what it is.
      source: a float model to start from (a converted checkpoint, a run): a detector is fine-tuned
        as it is, a backbone gets this family's transformer. "" = a small model from scratch.
      baseline: also train plain LSQ for as many steps.
      effort: factor on the length of every stage; 1 is the recipe.
      overrides: ``a.b=value`` texts.

    Returns:
      The content of ``results.json``: a results block for each model.

    Raises:
      ValueError, FileNotFoundError and their kin: bad input, before anything is trained.
    """
    start = time.perf_counter()
    git_commit()  # remembered from here on: results belong to the code that is running now
    workdir = Path(workdir)
    plan = make_plan(
        root,
        workdir,
        family=family,
        source=source,
        baseline=baseline,
        effort=effort,
        overrides=overrides,
    )
    for name in plan.stages:
        if name in ("pretrain", "teacher"):
            print(f"\n{TITLES[name]}")
            train(plan.stages[name], workdir / name)
    low = [name for name in plan.stages if name not in ("pretrain", "teacher")]
    return compress(
        workdir,
        teacher=load_model(plan.teacher),
        configs={name: plan.stages[name] for name in low},
        runs={name: name for name in low},
        curves={name: name for name in plan.stages if name == "teacher"},
        title=f"{Path(root).resolve().name}: from images to a low-bit detector",
        start=start,
    )


TITLES = {
    "pretrain": "backbone and encoder, by dense pretraining on these images",
    "teacher": "float teacher",
    "student": "low-bit student (AQ-DETR)",
    "baseline": "low-bit baseline (LSQ)",
}


def make_plan(
    root: str,
    workdir: Path,
    *,
    family: str | None = None,
    source: str = "",
    baseline: bool = False,
    effort: float = 1.0,
    overrides: Sequence[str] = (),
) -> Plan:
    """The stages of ``finetune`` with a time for each; says what was found and what it will take.

    Raises:
      ValueError, FileNotFoundError and their kin: see ``finetune``.
    """
    if not effort > 0:
        raise ValueError(f"--effort must be positive, got {effort}")
    for text in overrides:
        key = _key(text)
        if key in ("data.root", "data.kind", "init_from", "name", "task") or not key.startswith(
            (*STUDENT_KEYS, *SHARED_KEYS)
        ):
            raise ValueError(
                f"finetune sets config.{key} itself; overrides are of "
                f"{', '.join(k.rstrip('.') for k in (*SHARED_KEYS, *STUDENT_KEYS))}"
            )
    shared = tuple(o for o in overrides if o.startswith(SHARED_KEYS))
    shared += ("data.kind=auto", f"data.root={root}")
    student = tuple(o for o in overrides if o.startswith(STUDENT_KEYS))
    bundle = setup.load_source(source, "--from") if source else None
    if bundle is not None and bundle.quant.quantized:
        raise ValueError(
            f"--from={source} is quantized ({bundle.quant.policy}): give the float model that it "
            "comes from"
        )
    if bundle is not None and "decoder" in bundle.variables["params"]:
        if family not in (None, bundle.config.family):
            raise ValueError(
                f"--model={family} does not fit --from={source}, which is a {bundle.config.family} "
                "model: leave --model out"
            )
        family = bundle.config.family
    family = family or "deformable"

    def stage(kind: str, init_from: str | Path, overrides: tuple[str, ...]) -> ExperimentConfig:
        config = load_experiment(f"custom:{family}-{kind}", overrides, init_from=str(init_from))
        config = _with_effort(config, effort)
        return config if bundle is None else _with_source(config, bundle, overrides)

    stages: dict[str, ExperimentConfig] = {}
    origin: str | Path = source
    if bundle is None:
        # What is of the decoder is of the later stages alone.
        patterns = [pattern for pattern, _ in idle(load_experiment(f"custom:{family}-pretrain"))]
        own = tuple(o for o in shared if not any(fnmatchcase(_key(o), p) for p in patterns))
        stages["pretrain"] = stage("pretrain", "", own)
        origin = workdir / "pretrain"
    stages["teacher"] = stage("teacher", origin, shared)
    stages["student"] = stage("aqdetr", workdir / "teacher", shared + student)
    if baseline:
        own = tuple(o for o in shared if _key(o) not in AUXILIARY_KEYS)
        own += tuple(o for o in student if o.startswith("quant."))
        stages["baseline"] = stage("lsq", workdir / "teacher", own)

    data = stages["teacher"].data
    train_set, eval_set = (open_dataset(data, train=which) for which in (True, False))
    resolved = {name: check_data(c, train_set, eval_set) for name, c in stages.items()}
    sizing.say_sizes(stages["student"], resolved["student"], train_set)
    _say_times(workdir, resolved, train_set, eval_set)
    return Plan(stages, resolved, workdir / "teacher")


def _key(override: str) -> str:
    return override.partition("=")[0]


def _with_effort(config: ExperimentConfig, effort: float) -> ExperimentConfig:
    train = config.train
    steps = max(1, round(train.steps * effort)) if train.steps else 0
    return dataclasses.replace(
        config, train=dataclasses.replace(train, steps=steps, epochs=train.epochs * effort)
    )


def _with_source(
    config: ExperimentConfig, bundle: ModelBundle, overrides: Sequence[str]
) -> ExperimentConfig:
    """The configuration of a stage that starts from a given model, and not from scratch."""
    backbone = dataclasses.replace(bundle.config.backbone, norm="frozen")
    if "decoder" not in bundle.variables["params"]:
        model = dataclasses.replace(config.model, backbone=backbone)
        return dataclasses.replace(config, model=model)
    pinned = {_key(text) for text in overrides}
    auxiliary = config.model.num_auxiliary
    model = dataclasses.replace(
        bundle.config,
        backbone=backbone,
        num_classes=0,
        num_auxiliary=auxiliary,
        dropout=config.model.dropout,
    )
    optimizer = config.optimizer
    rates: dict[str, Any] = {"lr": FINE_LR, "lr_backbone": FINE_LR_BACKBONE}
    optimizer = dataclasses.replace(
        optimizer, **{k: v for k, v in rates.items() if f"optimizer.{k}" not in pinned}
    )
    if model.deformable.two_stage and "reference_points/" in optimizer.slow:
        slow = tuple(p for p in optimizer.slow if p != "reference_points/")
        optimizer = dataclasses.replace(optimizer, slow=slow)
    loss = LossWeights(cls=2.0, kind="focal") if model.family == "deformable" else LossWeights()
    distill = config.distill
    if model.deformable.two_stage:  # the queries of teacher and student do not correspond
        weights = dataclasses.replace(distill.weights, decoder_self=0.0, decoder_cross=0.0)
        distill = dataclasses.replace(distill, weights=weights)
    return dataclasses.replace(config, model=model, optimizer=optimizer, loss=loss, distill=distill)


def _say_times(
    workdir: Path,
    resolved: Mapping[str, ExperimentConfig],
    train_set: DetectionDataset,
    eval_set: DetectionDataset,
) -> None:
    """Measures and says what each stage that is left will take on this machine."""
    left = [n for n in resolved if not (workdir / n / "model").is_dir()]
    if not left:
        return
    say(f"measuring {len(left)} kinds of step on this machine (compiled once, then kept) ...")
    total = 0.0
    for name in left:
        config = resolved[name]
        found = estimate(config, train_set, eval_set)
        total += found.seconds
        say(
            f"  {TITLES[name]}: {found.steps} steps of {config.train.batch_size} images at "
            f"{found.step:.2f} s, about {format_seconds(found.seconds)}"
        )
    say(f"about {format_seconds(total)} in all; every stage goes on where it was stopped")
