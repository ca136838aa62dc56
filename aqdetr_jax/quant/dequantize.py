"""The float model whose weights are those that a quantized model multiplies with.

Only weights can go that way: the grids of activations and attention are no parameters of a float
model. What is left is the quantized model with all its activations float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
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
        grid = np.float32(spec.lower), np.float32(spec.upper)
        layer = path.removesuffix("kernel")
        if f"{layer}input_scale" not in parameters:
            out[path] = np.asarray(_on_grid(kernel, step, *grid))
            continue
        scale = np.asarray(parameters[f"{layer}input_scale"])[:, None]
        shift = np.asarray(parameters[f"{layer}input_shift"])
        out[path] = np.asarray(_on_grid(kernel * scale, step, *grid)) / scale
        out[f"{layer}bias"] = out[f"{layer}bias"] + shift @ (kernel - out[path])
    return out


@jax.jit
def _on_grid(kernel, step, lower, upper):
    """``[..., N]`` on the grids of its N output channels."""
    # Compiled and broadcast as in the forward pass: XLA multiplies by 1 / s, and a weight half-way
    # between two codes may go to another one than by division.
    step = step.reshape((1,) * (kernel.ndim - 1) + (-1,))
    return lsq.fake_quantize(kernel, step, lower, upper)
