"""Whether transformers loads what we write, and computes the same with it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import parity_models
import torch
import transformers
from parity_theirs import normalized
from safetensors.numpy import save_file

from aqdetr_jax.interop import names
from aqdetr_jax.interop.names import Row
from aqdetr_jax.models.config import DetrConfig


@torch.no_grad()
def differences(
    config: DetrConfig,
    given: dict[str, np.ndarray],
    state: dict[str, np.ndarray],
    rows: tuple[Row, ...],
) -> dict[str, float]:
    """Their parameters made ours, written as a safetensors file, and loaded by ``from_pretrained``.

    Args:
      config: sizes, without dilation (for which transformers needs timm).
      given: the batch.
      state: parameters of transformers' model.
      rows: the table of their names.

    Returns:
      Greatest difference of logits and boxes from those of the model that the parameters are from.

    Raises:
      RuntimeError: names that transformers misses or does not know.
    """
    written = names.untranslate(*names.translate(state, rows), rows)
    model = parity_models.build(config)
    with tempfile.TemporaryDirectory() as folder:
        save_file(written, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        transformers.logging.disable_progress_bar()
        loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    if any(report.values()):
        raise RuntimeError(f"transformers did not load all of it: {report}")
    inputs = {
        "pixel_values": torch.from_numpy(normalized(given)),
        "pixel_mask": torch.from_numpy(given["mask"].astype(np.int64)),
    }
    want, found = (m.double().eval()(**inputs) for m in (model, loaded))
    return {
        f"exported/{key}": float((found[field] - want[field]).abs().max())
        for key, field in (("logits", "logits"), ("boxes", "pred_boxes"))
    }
