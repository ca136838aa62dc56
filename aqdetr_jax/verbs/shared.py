"""What verbs share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what it imports, help need not wait for
    from aqdetr_jax.training.config import ExperimentConfig


def experiment(
    arguments: argparse.Namespace, overrides: Sequence[str], **options: Any
) -> ExperimentConfig:
    """The configuration that the arguments name, with its overrides."""
    from aqdetr_jax.training.experiment import load_experiment

    return load_experiment(arguments.config, tuple(overrides), **options)


def counter(verb: str, things: str) -> Callable[[int, int], None]:
    """Shows "VERB 3/20 THINGS", rewritten on a terminal, else once at the end."""

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else "\r"
        if sys.stderr.isatty() or done == total:
            print(f"{verb} {done}/{total} {things}", end=end, file=sys.stderr, flush=True)

    return show


def show_line(text: str) -> None:
    """Shows what is being done on a terminal, rewritten."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="\r", file=sys.stderr, flush=True)


def show_stages() -> Callable[[str, int, int], None]:
    """Shows "THINGS done 3/20", rewritten on a terminal, else once at the end of each."""

    def show(things: str, done: int, total: int) -> None:
        counter(things, "batches")(done, total)

    return show
