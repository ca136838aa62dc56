"""The float model whose weights are those that a quantized model multiplies with.

Only weights can go that way: the grids of activations and attention are no parameters of a float
model. What is left is the quantized model with all its activations float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aqdetr_jax.quant import lsq
from aqdetr_jax.quant.calibrate import weight_specs
from aqdetr_jax.quant.record import OpRecord
from aqdetr_jax.quant.spec import GRID_PARAMETERS


def dequantized_parameters(
    parameters: Mapping[str, Any], rows: Sequence[OpRecord]
) -> dict[str, np.ndarray]:
    """Parameters with every quantized kernel on its grid, ``W_hat = W_bar s`` (LSQ eq. 2).

    A layer with centred input computes ``((x - m) / e) Q(e W) + (m W + b)`` (see
    ``models.quantized.channel_affine``). Without a grid for its input that is the dense layer with
    the kernel ``Q(e W) / e``, integer times step over channel scale, and the bias
    ``b + m (W - Q(e W) / e)``.

    Args:
      parameters: flat, ``path`` -> array, of the quantized model.
      rows: records of a forward pass of it.

    Returns:
      Flat dict of the float model's parameters: no step sizes, zero points, shifts and scales;
      what is not quantized is the same array.
    """
    out = {
        path: np.asarray(value)
        for path, value in parameters.items()
        if not path.endswith(GRID_PARAMETERS)
    }
    for path, spec in weight_specs(rows).items():
        kernel, step = out[path], np.asarray(parameters[f"{path}_step"])
        layer = path.removesuffix("kernel")
        if f"{layer}input_scale" not in parameters:
            out[path] = _on_grid(kernel, step, spec.lower, spec.upper)
            continue
        scale = np.asarray(parameters[f"{layer}input_scale"])[:, None]
        shift = np.asarray(parameters[f"{layer}input_shift"])
        out[path] = _on_grid(kernel * scale, step, spec.lower, spec.upper) / scale
        out[f"{layer}bias"] = out[f"{layer}bias"] + shift @ (kernel - out[path])
    return out


def _on_grid(kernel: np.ndarray, step: np.ndarray, lower: int, upper: int) -> np.ndarray:
    """``[..., N]`` on the grids of its N output channels."""
    return np.asarray(lsq.fake_quantize(kernel, step, float(lower), float(upper)))
