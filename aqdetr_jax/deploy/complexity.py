"""What a model costs: parameters, multiply-adds, bits, and bytes of the packed file, by part.

All of it comes from what the operations say of themselves while the model is traced
(``quant.record``, ``quant.report``); nothing is computed or compiled, and no weights are needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from flax import traverse_util

from aqdetr_jax.checkpoint.model_folder import InputRule
from aqdetr_jax.config_types import ConfigError
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.deploy import published
from aqdetr_jax.deploy.archive import is_archive
from aqdetr_jax.deploy.load import open_model
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.detector import (
    build_detector,
    deployed_ops,
    level_strides,
    record_first_ops,
)
from aqdetr_jax.paths import as_path
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.quant.record import OpRecord
from aqdetr_jax.quant.report import PACKED_PARTS, bit_report, columns
from aqdetr_jax.quant.spec import GRID_PARAMETERS
from aqdetr_jax.training import sizing
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.optimizer import count_trainable
from aqdetr_jax.training.setup import build_module

COCO_SIZE = (800, 1333)
"""Height and width of the largest image that the papers evaluate on, pixels."""

GROUPS = (
    ("backbone", ("backbone",)),
    ("projections", ("input_proj*", "input_norm*")),
    ("encoder", ("encoder",)),
    ("decoder", ("decoder",)),
    ("heads", ("class_head*", "box_head*", "dense_class", "dense_box")),
    ("queries", ("reference_points", "proposal_*", "query_proj", "query_norm")),
    ("embeddings", ("query_embed", "level_embed", "position")),
)
"""Rows of the table, and the first names of the module paths that belong to them."""

_NO_COUNT = (
    ("model.num_auxiliary", "auxiliary queries exist only in training"),
    ("model.auxiliary_groups", "auxiliary queries exist only in training"),
    *(
        (f"model.{key}", "it changes no count")
        for key in ("query_start", "dropout", "remat", "dtype", "pixel_*", "deformable.sampling")
    ),
    ("quant.calibration_*", "it changes no count"),
    ("quant.equalize", "it changes no count"),
    ("data.augment.*", "it is of training"),
)
_COUNTED = ("model.*", "quant.*", "data.*", "optimizer.frozen")


class _Cpu:
    platform = "cpu"


def given_size(height: int | None, width: int | None) -> tuple[int, int] | None:
    """The size of an image from two options, None without them.

    Raises:
      ValueError: one is missing, or not positive.
    """
    if height is None and width is None:
        return None
    if height is None or width is None:
        raise ValueError("--height and --width belong together: give both, or neither")
    if min(height, width) < 1:
        raise ValueError(f"--height={height} --width={width}: both must be positive")
    return height, width


def check_complexity_keys(overrides: Sequence[str], *, model: str | None = None) -> None:
    """Refuses keys of the command line that change no count.

    Args:
      overrides: ``a.b=value`` texts.
      model: the folder of a model that is counted, which is as it was saved.

    Raises:
      ConfigError: one of them does; the message says why.
    """
    for text in overrides:
        key = text.partition("=")[0]
        reasons = [reason for pattern, reason in _NO_COUNT if fnmatchcase(key, pattern)]
        if not any(fnmatchcase(key, pattern) for pattern in _COUNTED):
            reasons = [f"counts follow from {', '.join(_COUNTED)}"]
        if model:
            reasons = [f"{model} is counted as it was saved"]
        if reasons:
            raise ConfigError(f"command line: config.{key} has no effect: {reasons[0]}")


def complexity_of_config(
    config: ExperimentConfig, size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """What the model of a configuration costs; see ``count``.

    Args:
      config: the experiment; what it leaves open is taken from its data, or is COCO's.
      size: height and width of an image, pixels; None = the largest that its evaluation sees.

    Raises:
      ValueError: a size cannot be, or is open.
    """
    config, notes = _resolved(config, size)
    if size is None:
        size = COCO_SIZE if config.data.fit else _largest(InputRule.from_data(config.data))
    if config.task == "pretrain":
        notes.append("a dense pretraining: its float network as it is, of which nothing is packed")
    check_size(config.model, size)
    rows, variables = record_first_ops(build_module(config), size)
    if config.task != "pretrain":
        rows = deployed_ops(rows, config.model)
    made = count(config.model, config.quant, rows, variables, size)
    weights = _without_grids(variables["params"])
    made["parameters"]["trained"] = count_trainable(
        traverse_util.unflatten_dict(weights, sep="/"),
        config.optimizer,
        frozen_norms=config.model.backbone.norm == "frozen",
    )
    return {"name": config.name, **made, "notes": notes}


def complexity_of_model(folder: str | Path, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """What the model of a folder costs; see ``count``.

    Args:
      folder: a run, its model folder, or a packed model.
      size: height and width of an image, pixels; None = the largest that its input rule makes.

    Raises:
      FileNotFoundError: there is no model.
      ValueError: it is a backbone, or a size cannot be.
    """
    bundle = open_model(folder)
    size = size or _largest(bundle.input)
    try:
        bundle.module()
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    check_size(bundle.config, size)
    # By its configuration: a packed model is no longer what its operations are traced in.
    module = build_detector(bundle.config, bundle.quant.build())
    rows, variables = record_first_ops(module, size)
    made = count(bundle.config, bundle.quant, deployed_ops(rows, bundle.config), variables, size)
    notes = []
    if is_archive(folder):
        files = sum(file.stat().st_size for file in as_path(folder).iterdir())
        notes.append(f"packed: its folder has {files:,} bytes, headers and manifest included")
    return {"name": bundle.info.get("name", str(folder)), **made, "notes": notes}


def count(
    config: DetrConfig,
    quant: QuantConfig,
    rows: Sequence[OpRecord],
    variables: Mapping[str, Any],
    size: tuple[int, int],
) -> dict[str, Any]:
    """Everything from the records of one inference.

    Args:
      config: sizes.
      quant: bits.
      rows: of one image, see ``models.detector.deployed_ops``.
      variables: "params" and "batch_stats", arrays or shapes.
      size: height and width of the image, pixels.

    Returns:
      JSON-serialisable dict:
        ``height``, ``width``, ``family``, ``policy`` (with ``+rules`` where it has rows of its
        own);
        ``parameters``: "learnable" (as papers count), "weights" (frozen norms too), "state" (and
        their statistics), "grids" (steps and the like);
        ``macs``, ``macs_by_bits``, ``float_bytes``, ``packed_bytes``, ``packed_parts``: of
        ``quant.report.bit_report``, as are the ``operations``;
        ``groups``: the same by part of the network, "group" its name;
        ``papers``: of ``deploy.published.as_papers_count``.
    """
    report = bit_report(rows)
    operations = report.pop("rows")
    groups = []
    for name, patterns in GROUPS:
        members = [r for r in rows if _belongs(r, patterns)]
        if members:
            part = bit_report(members)
            numbers = sum(row["parameters"] for row in part.pop("rows"))
            groups.append({"group": name, "parameters": numbers, **part})
    state = _state(variables)
    return {
        "height": size[0],
        "width": size[1],
        "family": config.family,
        "policy": quant.policy + "+rules" * bool(quant.rules),
        "parameters": {
            "learnable": state["weights"] - state["frozen"] * (config.backbone.norm == "frozen"),
            "weights": state["weights"],
            "state": state["state"],
            "grids": state["grids"],
        },
        **report,
        "groups": groups,
        "papers": published.as_papers_count(config, rows, state["state"]),
        "operations": operations,
    }


def check_size(config: DetrConfig, size: tuple[int, int]) -> None:
    """Refuses images that have no cell on the coarsest level.

    Raises:
      ValueError: a side is smaller than its stride.
    """
    stride = max(level_strides(config))
    for name, side in zip(("height", "width"), size, strict=True):
        if side < stride:
            raise ValueError(
                f"images of --height={size[0]} --width={size[1]}: the {name} must be at least "
                f"{stride} pixels, the stride of the model's last level"
            )


def _resolved(
    config: ExperimentConfig, size: tuple[int, int] | None
) -> tuple[ExperimentConfig, list[str]]:
    """The configuration of the deployed model, its sizes filled in; what was assumed."""
    given = dataclasses.replace(config.model, num_auxiliary=0, auxiliary_groups=1, dtype="float32")
    config = dataclasses.replace(config, model=given)
    there = sizing.has_data(config.data)
    if there and (not given.num_queries or (config.data.fit and size is None)):
        train_set = open_dataset(config.data, train=True)
        return sizing.with_data_alone(config, train_set, _Cpu()), []
    if not given.num_queries:
        raise ValueError(
            "config.model.num_queries is open and follows from the data, and there are none at "
            f"config.data.root={config.data.root!r}: give model.num_queries=N, or set data.root"
        )
    notes = []
    if not given.num_classes and there:
        classes = open_dataset(config.data, train=True).num_classes
    else:
        classes = given.num_classes or sizing.COCO_CLASSES
    if not given.num_classes and not there:
        notes.append(
            f"model.num_classes={classes}: COCO's official head (no data are read; "
            "model.num_classes=N for others)"
        )
    model = dataclasses.replace(given, num_classes=classes)
    return dataclasses.replace(config, model=model), notes


def _largest(rule: InputRule) -> tuple[int, int]:
    """Height and width of the largest image that a rule makes: not its padding, if it resizes."""
    if rule.short_side and rule.max_size:
        return rule.short_side, rule.max_size
    return max(rule.buckets, key=lambda bucket: bucket[0] * bucket[1])


def _belongs(row: OpRecord, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(row.path.split("/")[0], pattern) for pattern in patterns)


def _without_grids(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the float model, flat."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {path: leaf for path, leaf in flat.items() if not path.endswith(GRID_PARAMETERS)}


def _state(variables: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of parameters: all, without statistics, of batch norms, of grids."""
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    plain = _without_grids(variables["params"])
    statistics = traverse_util.flatten_dict(variables.get("batch_stats", {}), sep="/")
    norms = {path.rpartition("/")[0] for path in statistics}
    weights = sum(leaf.size for leaf in plain.values())
    return {
        "state": weights + sum(leaf.size for leaf in statistics.values()),
        "weights": weights,
        "frozen": sum(
            leaf.size for path, leaf in plain.items() if path.rpartition("/")[0] in norms
        ),
        "grids": sum(leaf.size for path, leaf in flat.items() if path not in plain),
    }


# --- as text -------------------------------------------------------------------------------------


def format_complexity(made: Mapping[str, Any]) -> str:
    """What ``aqdetr complexity`` prints."""
    counts, papers = made["parameters"], made["papers"]
    rows = [("", "parameters", "GMACs", "float32 bytes", "packed bytes", *PACKED_PARTS)]
    for part in (*made["groups"], {**made, "group": "all", "parameters": made["float_bytes"] // 4}):
        sizes = [part["float_bytes"], part["packed_bytes"], *part["packed_parts"].values()]
        numbers = [f"{size:,}" for size in sizes]
        rows.append(
            (part["group"], f"{part['parameters']:,}", f"{part['macs'] / 1e9:.3f}", *numbers)
        )
    table = columns(rows)
    kinds = {
        "learnable": "learnable",
        "weights": "with frozen norms",
        "state": "with their statistics",
        "trained": "trained by this configuration",
        "grids": "of grids (steps and the like)",
    }
    return "\n".join(
        [
            f"{made['name']}: {made['policy']}, one image of {made['height']} x {made['width']} "
            "(height x width)",
            *(f"({note})" for note in made["notes"]),
            "",
            *table,
            "",
            "parameters: "
            + ", ".join(f"{counts[key]:,} {text}" for key, text in kinds.items() if key in counts),
            "multiply-adds by bits (weights x inputs; of attention both operands):",
            *(f"  {part['group']}: {_shares(part)}" for part in made["groups"] if part["macs"]),
            f"  all: {_shares(made)}",
            f"packed: 1/{made['float_bytes'] / made['packed_bytes']:.2f} of float32, file headers "
            f"and manifest not counted{_as_float(made)}",
            *published.format_papers(papers),
        ]
    )


def _shares(part: Mapping[str, Any]) -> str:
    return ", ".join(f"{bits} {share:.1%}" for bits, share in part["macs_by_bits"].items())


def _as_float(made: Mapping[str, Any]) -> str:
    if made["packed_parts"]["codes"]:
        return ""
    return "; no weight is quantized, only norms fold: a packed file is a float file"
