"""Training, and what becomes of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from aqdetr_jax import host
from aqdetr_jax.verbs.shared import experiment


def train(arguments: argparse.Namespace, overrides: Sequence[str], **options: Any) -> None:
    """Trains one run."""
    from aqdetr_jax.parallel.hosts import initialize_distributed, is_main
    from aqdetr_jax.reporting import report_training
    from aqdetr_jax.training.loop import train

    initialize_distributed()
    result = train(experiment(arguments, overrides, **options), arguments.workdir)
    if is_main():
        report_training(result, arguments.workdir)


def pretrain(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Pretrains a backbone."""
    train(arguments, overrides, pretrain=True)


def rerun(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Does a run again from its manifest."""
    from aqdetr_jax.parallel.hosts import initialize_distributed, say
    from aqdetr_jax.training.rerun import format_rerun, rerun

    initialize_distributed()
    made = rerun(arguments.manifest, arguments.workdir)
    say(format_rerun(made))
    return int(not made["equal"])


def replay(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Takes the step of a dump again."""
    from aqdetr_jax.training.dump import format_replay, replay

    made = replay(arguments.dump)
    print(format_replay(made))
    return int(not made["reproduced"])


def quickstart(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Compresses the packaged teacher."""
    from aqdetr_jax.quickstart import quickstart

    quickstart(
        arguments.workdir,
        model=arguments.model,
        from_scratch=arguments.from_scratch,
        baseline=arguments.baseline,
        overrides=tuple(overrides),
    )


def finetune(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Trains on a folder of images."""
    from aqdetr_jax.finetune import finetune
    from aqdetr_jax.paths import as_path

    finetune(
        arguments.data,
        arguments.workdir or f"runs/finetune-{as_path(arguments.data).resolve().name}",
        family=arguments.model,
        source=arguments.source or "",
        baseline=arguments.baseline,
        effort=arguments.effort,
        overrides=overrides,
    )


def plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Compiles for TPUs."""
    from aqdetr_jax.io import write_json_atomic
    from aqdetr_jax.planning.plan import KINDS, as_json, make_plan
    from aqdetr_jax.planning.table import format_plan

    host.use_cpu()
    plan = make_plan(
        experiment(arguments, overrides),
        arguments.topology,
        per_chip=arguments.per_chip,
        bucket=arguments.bucket,
        kinds=KINDS if arguments.kind == "both" else (arguments.kind,),
        images=arguments.images,
        fast=arguments.fast,
        search=arguments.search,
    )
    print(format_plan(plan))
    if arguments.out:
        print(f"written to {write_json_atomic(arguments.out, as_json(plan))}")
    return int(not plan.fits)


def config(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Prints a configuration."""
    from aqdetr_jax.config_types import from_dataclass

    print(json.dumps(from_dataclass(experiment(arguments, overrides)), indent=2))
