"""Data sets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from aqdetr_jax.verbs.shared import counter, experiment


def prepare(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Writes a data set."""
    from aqdetr_jax.data.coco_writer import write_coco_folders
    from aqdetr_jax.data.notices import say_contents, say_findings
    from aqdetr_jax.data.official import open_official
    from aqdetr_jax.data.open import open_both
    from aqdetr_jax.data.tfds_builder import prepare

    if arguments.set and overrides:
        raise ValueError(f"{overrides[0]} has no effect: --set reads no configuration")
    if arguments.set:
        sets = open_official(arguments.set, arguments.manual, partial=arguments.partial)
    elif arguments.manual or arguments.partial:
        raise ValueError("--manual and --partial are of --set")
    else:
        sets = open_both(experiment(arguments, overrides).data)
    for dataset in sets.values():
        say_contents(dataset)
        say_findings(dataset)
    show = counter("written", "images")
    if arguments.format == "tfds":
        print(f"written to {prepare(sets, arguments.out, progress=show)}")
    else:
        for file in write_coco_folders(sets.values(), arguments.out, progress=show):
            print(f"written to {file}")


def inspect(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Checks a data set."""
    from aqdetr_jax.data.inspect import format_report, inspect_dataset
    from aqdetr_jax.data.open import open_dataset
    from aqdetr_jax.paths import as_path
    from aqdetr_jax.training.data_check import reasons_to_stop
    from aqdetr_jax.viz.contact_sheet import write_contact_sheets

    config = experiment(arguments, overrides)
    evaluation = open_dataset(config.data, train=False)
    train = open_dataset(config.data, train=True)
    queries = config.model.num_queries or None
    show = counter("read", "images")
    reports = [
        inspect_dataset(train, queries, other=evaluation, progress=show),
        inspect_dataset(evaluation, queries, progress=show),
    ]
    for report in reports:
        print(format_report(report))
    if arguments.pictures:
        sets = list(zip((train, evaluation), reports, strict=True))
        for path in write_contact_sheets(as_path(arguments.pictures), sets, seed=config.seed):
            print(f"written to {path}")
    reasons = reasons_to_stop(config, train, evaluation, reports)
    for reason in reasons:
        print(f"training would stop: {reason}")
    return int(bool(reasons))
