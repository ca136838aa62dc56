"""Whether transformers loads the folders that ``aqdetr export`` writes, and computes the same."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from flax import traverse_util

from aqdetr_jax.checkpoint.model_folder import InputRule, ModelBundle, save_model
from aqdetr_jax.interop import names
from aqdetr_jax.interop.export import export
from aqdetr_jax.interop.labels import placeholders
from aqdetr_jax.interop.names import Row
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.detector import record_ops
from aqdetr_jax.quant.calibrate import calibrated_parameters
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.quant.policy import Rule
from experiments.parity import models as parity_models
from experiments.parity.theirs import normalized

FOUR_BIT_WEIGHTS = QuantConfig(
    rules=(
        Rule("(class_head|box_head|reference_points)", None, None, None),
        Rule(".*", weight=4, activation=None, attention=None),
    )
)
"""The weights of w4a4 with everything else float: what can be exported of it."""


def bundle_of(
    config: DetrConfig, given: dict[str, np.ndarray], state: dict[str, np.ndarray], rows: Any
) -> ModelBundle:
    """A model of ours with transformers' parameters."""
    params, stats = (
        traverse_util.unflatten_dict(part, sep="/") for part in names.translate(state, rows)
    )
    height, width = given["images"].shape[1:3]
    return ModelBundle(
        config,
        QuantConfig(),
        InputRule(((height, width), (width, height)), min(height, width), max(height, width)),
        placeholders(config.num_classes),
        tuple(range(config.num_classes)),
        {"params": params, "batch_stats": stats},
    )


def with_four_bits(bundle: ModelBundle) -> ModelBundle:
    """The same with weights on 4-bit grids, their steps those of least squared error."""
    student = dataclasses.replace(bundle, quant=FOUR_BIT_WEIGHTS)
    height, width = bundle.input.buckets[0]
    image = np.zeros((1, height, width, 3), np.uint8), np.ones((1, height, width), bool)
    shapes = jax.eval_shape(student.module().init, jax.random.key(0), *image)
    params = {
        path: np.zeros(value.shape, value.dtype)
        for path, value in traverse_util.flatten_dict(shapes["params"], sep="/").items()
    } | traverse_util.flatten_dict(bundle.variables["params"], sep="/")
    ops = record_ops(student.module(), shapes, (height, width))
    params = traverse_util.unflatten_dict(calibrated_parameters(params, ops, {}), sep="/")
    return dataclasses.replace(student, variables={**bundle.variables, "params": params})


def load(folder: Path) -> torch.nn.Module:
    """The model of an exported folder, for evaluation.

    Raises:
      RuntimeError: names that transformers misses or does not know.
    """
    transformers.logging.disable_progress_bar()
    loaded, report = transformers.AutoModelForObjectDetection.from_pretrained(
        folder, output_loading_info=True
    )
    if any(report.values()):
        raise RuntimeError(f"transformers did not load all of it: {report}")
    return loaded.eval()


@torch.no_grad()
def outputs(model: torch.nn.Module, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits and boxes of the last layer, in double precision."""
    found = model.double()(
        pixel_values=torch.from_numpy(normalized(given)),
        pixel_mask=torch.from_numpy(given["mask"].astype(np.int64)),
    )
    return {"logits": found.logits.numpy(), "boxes": found.pred_boxes.numpy()}


def our_outputs(bundle: ModelBundle, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same of our model, in single precision."""
    found = jax.jit(bundle.module().apply)(bundle.variables, given["images"], given["mask"])
    return {"logits": np.asarray(found.logits[-1]), "boxes": np.asarray(found.boxes[-1])}


def differences(
    config: DetrConfig,
    given: dict[str, np.ndarray],
    state: dict[str, np.ndarray],
    rows: tuple[Row, ...],
) -> dict[str, float]:
    """Models are exported, and loaded by ``from_pretrained``.

    Args:
      config: sizes that transformers can express.
      given: the batch.
      state: parameters of transformers' model.
      rows: the table of their names.

    Returns:
      Greatest differences of logits and boxes: "exported" of the float model from transformers'
      model that the parameters are from, "fake_quantized" of 4-bit weights from our quantized
      forward.

    Raises:
      RuntimeError: names that transformers misses or does not know.
    """
    bundle = bundle_of(config, given, state, rows)
    student = with_four_bits(bundle)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "float", bundle)
        save_model(folder / "student", student)
        export(folder / "float", folder / "exported")
        export(folder / "student", folder / "fake_quantized", fake_quantized=True)
        wants = {
            "exported": outputs(parity_models.build(config), given),
            "fake_quantized": our_outputs(student, given),
        }
        for kind, want in wants.items():
            own = outputs(load(folder / kind), given)
            for key, value in want.items():
                found[f"{kind}/{key}"] = float(np.abs(own[key] - value).max())
    return found
