"""Frozen batch norms folded into the convolutions before them, for deployment.

A frozen batch norm is a constant affine of every channel, ``y = f x + b`` with
``f = scale / sqrt(var + eps)`` and ``b = bias - f mean``, and a convolution is linear. So in a
float network (a dequantized one too) the kernel takes the factor and only the bias is left,
``f (W * x) + b = (f W) * x + b``: ``fold_batch_norms``.

A low-bit convolution rounds its kernel *before* the norm, ``f s_x s_w (x_bar * W_bar) + b``. Folded
into the kernel, the factor would go through the rounding, and a negative one would turn a grid that
is not symmetric; so it joins the two steps as the scale of the integer sums, and the integers stay
as they are: ``sum_affine``. The bias is a whole number of that scale, for training too
(``lsq.round_bias``). Either way the norm costs nothing at inference. Training and Hugging
Face export keep norms as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array

from aqdetr_jax.models.layers import NORM_EPS, norm_affine
from aqdetr_jax.quant import lsq
from aqdetr_jax.quant.quantizer import SumSteps

ONE = np.float32(1 - NORM_EPS)
"""A running variance with which a norm's factor is its scale: ``ONE + eps`` is 1 in float32."""


def fold_batch_norms(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The same float function with every frozen batch norm's factor in the kernel before it.

    Args:
      variables: "params" and "batch_stats" of a ``ResNet`` or of a detector, nested.

    Returns:
      Variables of the same model: kernels times factors; norms with scale 1, mean 0 and variance
      ``ONE``, which add their bias and do nothing else.

    Raises:
      ValueError: a kernel has a step size, so that it must not be scaled; see ``sum_affine``.
    """
    params = dict(traverse_util.flatten_dict(variables["params"], sep="/"))
    stats = dict(traverse_util.flatten_dict(variables["batch_stats"], sep="/"))
    for path in [path for path in stats if path.endswith("/mean")]:
        norm = path.removesuffix("/mean")
        kernel = f"{convolution_of(norm)}/kernel"
        if f"{kernel}_step" in params:
            raise ValueError(
                f"{kernel} is quantized: its norm belongs to the scale of the integer sums "
                "(sum_affine), not to the kernel; dequantize the weights first for a float model"
            )
        factor, bias = norm_affine(
            params[f"{norm}/scale"],
            params[f"{norm}/bias"],
            stats[f"{norm}/mean"],
            stats[f"{norm}/var"],
        )
        params[kernel] = params[kernel] * factor
        params[f"{norm}/scale"], params[f"{norm}/bias"] = jnp.ones_like(bias), bias
        stats[f"{norm}/mean"], stats[f"{norm}/var"] = jnp.zeros_like(bias), jnp.full_like(bias, ONE)
    return {
        **variables,
        "params": traverse_util.unflatten_dict(params, sep="/"),
        "batch_stats": traverse_util.unflatten_dict(stats, sep="/"),
    }


def sum_affine(
    input_step: Array, kernel_step: Array, norm: Mapping[str, Array], stats: Mapping[str, Array]
) -> tuple[Array, Array]:
    """What a low-bit convolution's integer sums become after its norm.

    Args:
      input_step: [], step of the input.
      kernel_step: [N], steps of the kernel's output channels.
      norm: the norm's "scale" and "bias", [N].
      stats: its "mean" and "var", [N].

    Returns:
      (scale, bias), [N] each: the norm's output is ``scale * sums + bias``. Scales have the norm's
      sign; biases are whole numbers of them.
    """
    factor, bias = norm_affine(norm["scale"], norm["bias"], stats["mean"], stats["var"])
    scale = SumSteps(input_step, kernel_step).unit(factor)
    return scale, lsq.round_bias(bias, scale)


def convolution_of(norm: str) -> str:
    """The path of the convolution that a ``ResNet`` puts before a norm: norm2 follows conv2."""
    parent, _, name = norm.rpartition("/")
    match = re.fullmatch(r"norm(\d+)|(\w+)_norm", name)
    if match is None:
        raise ValueError(f"{norm} is no batch norm of a ResNet")
    own = f"conv{match[1]}" if match[1] else match[2]
    return f"{parent}/{own}" if parent else own
