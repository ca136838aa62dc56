"""A model as a folder: parameters with everything that is needed to use them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from aqdetr_jax.checkpoint.checksums import read_manifest
from aqdetr_jax.checkpoint.params import load_params, save_params
from aqdetr_jax.config_types import from_dataclass, to_dataclass
from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.detector import Detector, build_detector, grid_parameters
from aqdetr_jax.paths import as_path
from aqdetr_jax.quant.config import QuantConfig, saved_quant

MODEL_FOLDER = "model"
"""Name of the model's folder inside a run's work directory."""

PACKAGED = "packaged:"
"""Prefix of the names of models that come with the package."""

TEACHERS: dict[str, str | Path] = {
    "detr": f"{PACKAGED}shapes_teacher",
    "deformable": f"{PACKAGED}shapes_deformable_teacher",
}
"""The float teachers of the embedded set that come with the package."""


@dataclasses.dataclass(frozen=True)
class InputRule:
    """How images become network input at inference.

    Attributes:
      buckets: (height, width) of padded images, pixels.
      short_side: resize of the short side, None = as they are.
      max_size: limit of the long side, None = none.
    """

    buckets: tuple[tuple[int, int], ...]
    short_side: int | None = None
    max_size: int | None = None

    def describe(self) -> str:
        """In words, for one line."""
        sizes = ", ".join(f"{height}x{width}" for height, width in self.buckets)
        if self.short_side is None:
            return f"images as they are, padded to {sizes} (height x width)"
        limit = f", long side at most {self.max_size}" if self.max_size else ""
        return f"short side {self.short_side}{limit}, padded to {sizes} (height x width)"

    def pipeline(self) -> dict[str, Any]:
        """The rule as fields of a ``PipelineConfig``."""
        return {
            "buckets": self.buckets,
            "eval_short_side": self.short_side,
            "eval_max_size": self.max_size,
        }

    @classmethod
    def from_data(cls, data: DataConfig) -> InputRule:
        """The evaluation rule of a data configuration."""
        return cls(data.eval_buckets or data.buckets, data.eval_short_side, data.eval_max_size)


@dataclasses.dataclass(frozen=True)
class ModelBundle:
    """A trained model in memory.

    Attributes:
      config: sizes (no auxiliary queries: they exist only in training).
      quant: bits.
      input: image rule.
      class_names: names of the contiguous labels 0..C-1.
      category_ids: the data's ids of those labels.
      variables: what ``module()`` is applied to: {"params": ..., "batch_stats": ...}, nested dicts
        of arrays.
      info: facts for people: configuration name, seed, commit, results.
    """

    config: DetrConfig
    quant: QuantConfig
    input: InputRule
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    variables: Any
    info: dict[str, Any] = dataclasses.field(default_factory=dict)

    def module(self) -> Detector:
        """The module that the variables belong to.

        Raises:
          ValueError: the model is a pretrained or imported backbone and has no decoder, or it is
            quantized and lacks steps.
        """
        if "decoder" not in self.variables["params"]:
            raise ValueError(
                "this model is a backbone (of a dense pretraining, or imported): it has no decoder "
                "and can only start a detector: aqdetr train with --config.init_from=FOLDER"
            )
        policy = self.quant.build()
        if self.quant.quantized:
            have = traverse_util.flatten_dict(self.variables["params"], sep="/")
            wanted = grid_parameters(self.config, policy, self.input.buckets[0])
            missing = [path for path in wanted if path not in have]
            if missing:
                raise ValueError(
                    f"this model ({self.quant.policy}) lacks {len(missing)} parameters of its "
                    f"grids ({missing[0]}, ...): it was saved by another version. Train it again, "
                    "or go on from its weights (calibrated anew): aqdetr train with "
                    "--config.init_from=FOLDER"
                )
        return build_detector(self.config, policy)


def without_auxiliary(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of inference: no auxiliary queries, no pretraining head."""
    training_only = ("auxiliary_queries", "dense_class", "dense_box")
    return {key: value for key, value in params.items() if key not in training_only}


def save_model(
    path: str | Path, bundle: ModelBundle, more: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Writes a model folder; it appears whole or not at all.

    Args:
      path: the folder; an earlier model of that name is replaced.
      bundle: what to write.
      more: further JSON files for people, by file name.
    """
    variables = {
        "params": without_auxiliary(bundle.variables["params"]),
        "batch_stats": bundle.variables["batch_stats"],
    }
    metadata = {
        "format": 1,
        "model": from_dataclass(
            dataclasses.replace(bundle.config, num_auxiliary=0, auxiliary_groups=1)
        ),
        "quant": from_dataclass(bundle.quant),
        "input": from_dataclass(bundle.input),
        "class_names": list(bundle.class_names),
        "category_ids": list(bundle.category_ids),
        "info": bundle.info,
    }
    save_params(path, variables, metadata, more)


def model_folder(path: str | Path) -> Path:
    """Where the model of a path is, see ``load_model``; whether there is one is not looked at."""
    if str(path).startswith(PACKAGED):
        path = Path(__file__).parents[1] / "assets" / str(path).removeprefix(PACKAGED)
        if not path.is_dir():
            known = ", ".join(sorted(PACKAGED + p.name for p in path.parent.glob("*/")))
            raise FileNotFoundError(
                f"no packaged model {path.name!r}; there are: {known or 'none'}"
            )
    path = as_path(path)
    return path / MODEL_FOLDER if (path / MODEL_FOLDER).is_dir() else path


def model_checksum(path: str | Path) -> str | None:
    """SHA-256 over the files of a model folder (what is loaded is checked against it), hex.

    Args:
      path: as for ``load_model``.

    Returns:
      The checksum, the same wherever a copy of the folder lies; None where there is no model.
    """
    try:
        files = read_manifest(model_folder(path) / "manifest.json")["files"]
    except (OSError, ValueError, KeyError):  # said when it is loaded
        return None
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def load_model(path: str | Path) -> ModelBundle:
    """Reads a model folder, or the model of a run's work directory.

    Args:
      path: ``RUN/model`` or ``RUN``, or ``packaged:NAME`` for a model that comes along.

    Raises:
      FileNotFoundError: there is no model; the message says what the folder is instead.
      CheckpointError: a file is damaged.
    """
    folder = model_folder(path)
    variables, metadata = load_params(folder)
    missing = {"model", "quant", "input", "class_names", "category_ids"} - set(metadata)
    if missing:
        raise ValueError(f"{folder} is not a model folder: its metadata lacks {sorted(missing)}")
    return ModelBundle(
        config=to_dataclass(DetrConfig, metadata["model"], f"{folder}: model"),
        quant=to_dataclass(QuantConfig, saved_quant(metadata["quant"]), f"{folder}: quant"),
        input=to_dataclass(InputRule, metadata["input"], f"{folder}: input"),
        class_names=tuple(metadata["class_names"]),
        category_ids=tuple(metadata["category_ids"]),
        variables=jax.tree.map(np.asarray, variables),
        info=metadata.get("info", {}),
    )
