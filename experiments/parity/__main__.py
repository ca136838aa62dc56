"""How far our float models are from other implementations', stage by stage.

python -m experiments.parity [--full] [--only=detr_dc5,...] [--detr=CHECKOUT] [--deformable=...]

Every parameter and running statistic is random, the batch has two images of unequal size, they
compute in double precision and we in single. Tiny models of every kind against transformers
(minutes); with --full the official sizes at 256 x 320 (half an hour and 8 GB; --only picks some).
With checkouts of the original repositories, these sizes against their own code instead. Prints the
greatest difference of every stage and keeps it in experiments/results/parity.json: absolute for
outputs, relative for losses and gradients. Beside it stands "theirs_single", how far their own
single precision is from their double, in the worse of two orders of summation (one thread, two
threads): what rounding alone makes of the stage. "exported" are outputs of transformers' model that
it loads from a folder of ``aqdetr export``, against its own, "fake_quantized" of one with 4-bit
weights, against our quantized forward. Fails if a tolerance is exceeded. Needs the extra "parity".
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # single precision, as stated

import jax
import numpy as np
import torch
import transformers

from aqdetr_jax.interop.huggingface import unsupported
from aqdetr_jax.interop.names import Row
from aqdetr_jax.interop.tables import TABLES
from aqdetr_jax.io import read_json, write_json_atomic
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.provenance import git_commit
from experiments.parity import export as parity_export
from experiments.parity import original as parity_original
from experiments.parity import ours as parity_ours
from experiments.parity import theirs as parity_theirs
from experiments.parity.cases import FULL, FULL_BUCKET, FULL_SIZES, TINY, batch, table_of
from experiments.parity.store import Groups

OUT = Path(__file__).resolve().parents[1] / "results" / "parity.json"
THREADS = (1, 2)
"""Each number sums in another order: a ReLU near zero opens in one and not in the other."""

ORIGINAL = {"detr": "facebookresearch/detr", "deformable": "fundamentalvision/Deformable-DETR"}


class Comparison(NamedTuple):
    """One model of one source.

    Attributes:
      source: whose code.
      model: key in TINY or FULL.
      config: our configuration.
      given: the batch.
      theirs: computes their results in a precision.
      rows: the table of their names.
    """

    source: str
    model: str
    config: DetrConfig
    given: dict[str, np.ndarray]
    theirs: Callable[[torch.dtype], Groups]
    rows: tuple[Row, ...]


def tolerance(stage: str, model: str) -> float:
    """What a stage may differ by: 1e-5 in tiny models, 1e-4 in full ones; gradients 1e-3."""
    if stage == "gradients":
        return 1e-3
    return 1e-5 if model in TINY else 1e-4


def original_table(config: DetrConfig) -> tuple[Row, ...]:
    """The names that a model has in its original repository."""
    if config.family == "detr":
        return TABLES["detr"]
    return TABLES["deformable_detr" + ("" if config.deformable.box_refine else "_shared")]


def comparisons(options: argparse.Namespace) -> Iterator[Comparison]:
    """What is to be compared; nothing is computed yet."""
    only = set(options.only.split(",")) if options.only else None
    given = batch()
    large = batch(FULL_BUCKET, FULL_SIZES, classes=91)
    checkouts = {"detr": options.detr, "deformable": options.deformable}
    originals = any(checkouts.values())
    for name, config in {**TINY, **(FULL if options.full else {})}.items():
        if originals or (only is not None and name not in only):
            continue
        seen = given if name in TINY else large
        theirs = partial(parity_theirs.compute, config, seen)
        source = f"transformers {transformers.__version__}"
        yield Comparison(source, name, config, seen, theirs, table_of(config))
    for name, (family, _) in parity_original.MODELS.items():
        checkout = checkouts[family]
        if checkout is None or (only is not None and name not in only):
            continue
        theirs = partial(parity_original.compute, name, checkout, large)
        rows = original_table(FULL[name])
        yield Comparison(ORIGINAL[family], name, FULL[name], large, theirs, rows)


def compare(c: Comparison) -> list[dict[str, Any]]:
    """The rows of one model."""
    # One model after the other: a full one takes gigabytes.
    truth = c.theirs(torch.float64)
    single: dict[str, float] = {}
    for threads in THREADS:
        torch.set_num_threads(threads)
        for stage, value in parity_ours.differences(c.theirs(torch.float32), truth).items():
            single[stage] = max(value, single.get(stage, 0.0))
    ours = parity_ours.compute(c.config, c.given, truth, c.rows)
    if c.source in ORIGINAL.values():  # their code hands out no inner stages
        ours["output"] = {key: ours["output"][key] for key in truth["output"]}
    found = parity_ours.differences(ours, truth)
    if c.source not in ORIGINAL.values() and not unsupported(c.config):
        found |= parity_export.differences(c.config, c.given, truth["state"], c.rows)
    return [
        {
            "source": c.source,
            "model": c.model,
            "stage": stage,
            "max_abs_diff": short(value),
            # Of what we export, both sides are double.
            "theirs_single": short(single[stage]) if stage in single else None,
            "tolerance": tolerance(stage, c.model),
            "commit": git_commit(),
        }
        for stage, value in found.items()
    ]


def short(value: float) -> float:
    """Two digits."""
    return float(f"{value:.2g}")


def main() -> None:
    """Prints and keeps the table; rows of models that were not run stay."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--detr", type=Path)
    parser.add_argument("--deformable", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - {"", *TINY, *FULL}
    if unknown:
        parser.error(f"--only knows {', '.join([*TINY, *FULL])}; not {', '.join(sorted(unknown))}")
    # One step a model: XLA's expensive passes would take most of the time.
    jax.config.update("jax_disable_most_optimizations", True)
    failed = []
    for comparison in comparisons(options):
        rows = compare(comparison)
        key = comparison[:2]
        print(f"\n{key[1]} against {key[0]}")
        for row in rows:
            bad = not row["max_abs_diff"] <= row["tolerance"]
            failed += [f"{key[1]} {row['stage']}"] * bad
            own = row["theirs_single"]
            note = "" if own is None else f"  theirs in single {own:.1e}"
            note += "  EXCEEDED" * bad
            print(f"  {row['stage']:26} {row['max_abs_diff']:8.1e} of {row['tolerance']:g}{note}")
        sys.stdout.flush()
        # Read again every time: others may be at work on other models.
        kept = read_json(options.out)["rows"] if options.out.is_file() else []
        kept = [row for row in kept if (row["source"], row["model"]) != key] + rows
        for row in kept:  # of earlier runs too: one rule holds for the whole file
            row["tolerance"] = tolerance(row["stage"], row["model"])
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        write_json_atomic(options.out, {"versions": versions, "rows": kept})
    if failed:
        sys.exit(f"over the tolerance: {', '.join(failed)}")


if __name__ == "__main__":
    main()
