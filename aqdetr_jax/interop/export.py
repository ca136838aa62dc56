"""The way back: a model folder of ours becomes one that Hugging Face transformers loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from aqdetr_jax.checkpoint.model_folder import ModelBundle, load_model, without_auxiliary
from aqdetr_jax.interop import huggingface, names
from aqdetr_jax.interop.checkpoints import write_safetensors
from aqdetr_jax.interop.convert import LONG_SIDE, SHORT_SIDE, first_variables
from aqdetr_jax.interop.labels import GAP
from aqdetr_jax.io import check_folder, whole_folder, write_json_atomic
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.detector import record_ops
from aqdetr_jax.quant.calibrate import weight_specs
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.quant.dequantize import dequantized_parameters
from aqdetr_jax.quant.record import OpRecord
from aqdetr_jax.quant.report import bit_report
from aqdetr_jax.quant.spec import GRID_PARAMETERS

Flat = dict[str, np.ndarray]

REPORT = "export_report.json"
"""File of an exported folder that says what was written and what was left out."""

WEIGHTS, SETTINGS, PREPROCESSING = (
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
)


@dataclasses.dataclass(frozen=True)
class Export:
    """What an export writes.

    Attributes:
      state: arrays by transformers' names.
      settings: config.json.
      preprocessing: preprocessor_config.json.
      report: export_report.json.
    """

    state: Flat
    settings: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    report: Mapping[str, Any]

    def summary(self) -> str:
        """One line for people."""
        title, written = self.settings["architectures"][0], self.report["written"]
        return (
            f"{title}: {written['numbers']} numbers in {written['arrays']} arrays, "
            f"{self.report['weights']}"
        )


def export(model: str | Path, folder: str | Path, *, fake_quantized: bool = False) -> Export:
    """Writes a model for transformers; the folder appears whole or not at all.

    Args:
      model: a run or its model folder.
      folder: the folder to write; an earlier export of that name is replaced, nothing else is.
      fake_quantized: write the weights of a quantized model as the values on their grids.

    Raises:
      FileNotFoundError, FileExistsError: model or folder.
      ValueError: transformers has no such model, or ``fake_quantized`` is not what the model is;
        the message names the key and what to do.
    """
    check_folder(folder, REPORT)
    made = export_bundle(load_model(model), str(model), fake_quantized=fake_quantized)
    with whole_folder(folder, REPORT) as partial:
        write_safetensors(partial / WEIGHTS, made.state)
        write_json_atomic(partial / SETTINGS, dict(made.settings))
        write_json_atomic(partial / PREPROCESSING, dict(made.preprocessing))
        write_json_atomic(partial / REPORT, dict(made.report))
    return made


def export_bundle(bundle: ModelBundle, source: str, *, fake_quantized: bool = False) -> Export:
    """What ``export`` writes of a model in memory; ``source`` is its name in messages."""
    # Auxiliary queries exist only in training.
    config = dataclasses.replace(bundle.config, num_auxiliary=0, auxiliary_groups=1)

    # --- can it be said ----------------------------------------------------------------------
    try:
        module = bundle.module()
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    reasons = huggingface.unsupported(config)
    if reasons:
        raise ValueError(f"{source}: transformers has no such model: {'; '.join(reasons)}")
    policy = f"quant.policy={bundle.quant.policy!r}" + ", quant.rules" * bool(bundle.quant.rules)
    if bundle.quant.quantized and not fake_quantized:
        raise ValueError(
            f"{source}: is quantized ({policy}), and its float weights are no model "
            "without their grids: --fake-quantized writes the values on the grids (activations "
            "and attention stay float), or export the float teacher"
        )
    if module.policy.align_queries:
        raise ValueError(
            f"{source}: normalises its decoder's queries (quant.align_queries), which "
            "transformers' model does not: --format=packed or --format=onnx export all of it"
        )
    if fake_quantized and not bundle.quant.quantized:
        raise ValueError(f"{source}: is a float model: leave out --fake-quantized")

    # --- its parameters ----------------------------------------------------------------------
    given = traverse_util.flatten_dict(bundle.variables["params"], sep="/")
    params = traverse_util.flatten_dict(without_auxiliary(bundle.variables["params"]), sep="/")
    stats = traverse_util.flatten_dict(bundle.variables["batch_stats"], sep="/")
    rows: list[OpRecord] = []
    if bundle.quant.quantized:
        rows = record_ops(module, bundle.variables, (SHORT_SIDE, LONG_SIDE))
        params = dequantized_parameters(params, rows)
    _check_complete(config, params, stats, source)
    table = huggingface.naming(config)
    once = names.untranslate(params, stats, table)
    state = names.untranslate(params, stats, table, huggingface.with_copies(list(once), config))

    # --- what is said of it ------------------------------------------------------------------
    labels = (*bundle.class_names, *(GAP,) * (config.num_classes - len(bundle.class_names)))
    preprocessing, notes = huggingface.preprocessor_json(config, bundle.input)
    if len(labels) > len(bundle.class_names):
        notes.append(f"classes without a name are called {GAP!r}")
    report = {
        "format": "huggingface",
        "name": bundle.info.get("name", ""),
        "weights": _weights(rows, bundle.quant),
        "written": {
            "arrays": len(state),
            # Of parameters and running statistics, copies counted once.
            "numbers": sum(value.size for value in once.values()),
            "copies": sorted(state.keys() - once.keys()),
        },
        "left_out": _left_out(given),
        "operations": _operations(rows),
        "category_ids": bundle.category_ids,
        "notes": notes + _notes(bundle),
    }
    return Export(state, huggingface.config_json(config, labels), preprocessing, report)


def _check_complete(config: DetrConfig, params: Flat, stats: Flat, source: str) -> None:
    """Nothing may be missing: transformers starts at random what a file lacks.

    Raises:
      ValueError: the parameters are not those of the float model; names the first that differ.
    """
    wanted = jax.eval_shape(first_variables(config, config.family))
    for ours, theirs in zip((params, stats), wanted, strict=True):
        unlike = sorted(
            path
            for path in ours.keys() | theirs.keys()
            if path not in ours
            or path not in theirs
            or (ours[path].shape, ours[path].dtype) != (theirs[path].shape, theirs[path].dtype)
        )
        if unlike:
            raise ValueError(
                f"{source}: its parameters are not those of its configuration: {len(unlike)} are "
                f"missing, too many or of another shape or type ({', '.join(unlike[:3])})"
            )


def _weights(rows: list[OpRecord], quant: QuantConfig) -> str:
    """What the written weights are, in words."""
    if not quant.quantized:
        return "float, as they are"
    bits = [spec.bits for spec in weight_specs(rows).values()]
    kinds = ", ".join(f"{bits.count(b)} kernels of {b} bits" for b in sorted(set(bits)))
    return f"{kinds or 'no kernel'} dequantized (integers times step)"


def _left_out(given: Flat) -> list[dict[str, Any]]:
    """What a quantized or training model has and transformers' has not."""
    grids = [path for path in given if path.endswith(GRID_PARAMETERS)]
    training = [path for path in given if path == "auxiliary_queries"]
    reasons = (
        (
            "auxiliary queries",
            training,
            "they exist only in training",
        ),
        (
            "step sizes, zero points, offsets, shifts and scales",
            grids,
            "weights are written as integers times step; activations, residual sums and attention "
            "are float in transformers, and biases are not rounded",
        ),
    )
    return [
        {"what": what, "count": len(paths), "parameters": paths, "why": why}
        for what, paths, why in reasons
        if paths
    ]


def _operations(rows: list[OpRecord]) -> list[dict[str, Any]]:
    """Every operation with bits, and what became of them."""
    became = {"weight": "dequantized", "activation": "float", "attention": "float"}
    result = []
    for row in bit_report(rows)["rows"]:
        bits = {kind: row[f"{kind}_bits"] for kind in became}
        bits = {kind: number for kind, number in bits.items() if number not in (None, "float")}
        if bits:
            result.append(
                {
                    "operation": row["path"],
                    "kind": row["kind"],
                    **{f"{kind}_bits": number for kind, number in bits.items()},
                    "became": {kind: became[kind] for kind in bits},
                }
            )
    return result


def _notes(bundle: ModelBundle) -> list[str]:
    """What a reader of the folder may stumble over."""
    config = bundle.config
    notes = []
    if huggingface.is_dilated(config.backbone):
        notes.append("transformers builds a dilated backbone with timm, which must be installed")
    options = config.deformable
    if config.family == "deformable" and options.box_refine and not options.two_stage:
        notes.append(
            "transformers 5 warns that it does not tie class_embed: that is right, every layer has "
            "its own (leave tie_word_embeddings as it is)"
        )
    if config.backbone.norm == "batch":
        notes.append("batch norms are frozen in transformers: they use the running statistics")
    if config.dtype != "float32":
        notes.append(f"products are {config.dtype} here and float32 in transformers")
    return notes
