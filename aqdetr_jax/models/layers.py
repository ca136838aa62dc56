"""Norms and the feed-forward network of the transformer layers.

Norms compute in float32 and return the dtype of their input, which carries it between layers.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from aqdetr_jax.models.dropout import dropout
from aqdetr_jax.models.quantized import OBSERVED, QDense, module_path, observing
from aqdetr_jax.quant import lsq
from aqdetr_jax.quant.policy import Policy
from aqdetr_jax.quant.quantizer import SumSteps
from aqdetr_jax.quant.record import OpRecord, record

FLOAT = "float by choice"

NORM_EPS = 1e-5
"""torch's: what norms add to variances."""


class LayerNorm(nn.Module):
    """Layer norm over the last axis, eps 1e-5 as in torch; stays float."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        return _layer_norm(self, x)


def _layer_norm(module: nn.Module, x: Array) -> Array:
    """Declares ``scale`` and ``bias`` on ``module`` and normalises ``x`` over its last axis."""
    scale = module.param("scale", nn.initializers.ones, (x.shape[-1],))
    bias = module.param("bias", nn.initializers.zeros, (x.shape[-1],))
    record(OpRecord(module_path(module), "norm", parameters=2 * x.shape[-1], note=FLOAT))
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return (centred * (lax.rsqrt(variance + NORM_EPS) * scale) + bias).astype(x.dtype)


class DistributionAlignment(nn.Module):
    """``(q - μ) / sqrt(σ² + 1e-5) γ + β`` of a co-attention's query (Q-DETR, eq. 9).

    μ and σ² are those of each query's channels, γ and β are learned, one a channel: a layer norm.
    A Gaussian of larger variance has larger entropy, ½ log 2πeσ², which a grid is to keep.

    It belongs to the quantizers: calibration, which looks at the float model, passes the query as
    it is, and leaves ``statistics`` [2, n] of its queries (means, deviations) for the start of β
    and γ; see ``quant.calibrate.aligned_parameters``.
    """

    policy: Policy = Policy()

    @nn.compact
    def __call__(self, q: Array) -> Array:
        """[..., D] -> [..., D]."""
        if observing(self):
            rows = q.reshape(-1, q.shape[-1]).astype(jnp.float32)
            found = jnp.stack([jnp.mean(rows, 1), jnp.std(rows, 1)])
            self.variable(OBSERVED, "statistics", lambda: found).value = found
        return q if self.policy.arithmetic == "observe" else _layer_norm(self, q)


class GroupNorm(nn.Module):
    """Group norm over space and the channels of a group, eps 1e-5 as in torch; stays float.

    As in Deformable DETR the statistics of an image include its padding.
    """

    groups: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H, W, C]; C is divisible by the groups."""
        batch, height, width, channels = x.shape
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        record(OpRecord(module_path(self), "norm", parameters=2 * channels, note=FLOAT))
        wide = x.astype(jnp.float32)
        grouped = wide.reshape(batch, height, width, self.groups, channels // self.groups)
        axes = (1, 2, 4)
        centred = grouped - jnp.mean(grouped, axes, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axes, keepdims=True)
        normal = (centred * lax.rsqrt(variance + NORM_EPS)).reshape(x.shape)
        return (normal * scale + bias).astype(x.dtype)


def norm_affine(scale: Array, bias: Array, mean: Array, var: Array) -> tuple[Array, Array]:
    """A batch norm as an affine of every channel, ``(x - mean) scale / sqrt(var + eps) + bias``.

    Args: [C] each.

    Returns:
      (factor, bias), [C] each: ``factor x + bias``.
    """
    factor = scale * lax.rsqrt(var + NORM_EPS)
    return factor, bias - mean * factor


class BatchNorm(nn.Module):
    """Batch norm over [B, H, W], eps 1e-5: frozen as in DETR, or learning.

    Frozen, it is a constant per-channel affine ``(x - mean) * scale / sqrt(var + eps) + bias`` that
    folds into the convolution before it (``models.fold``); no gradient reaches its four vectors.
    Learning, it normalises by the statistics of the global batch (under a global-view jit the mean
    over the batch axis is global without a word) and updates the running ones in the collection
    ``batch_stats``. Both have the same variables, so a backbone pretrained with a learning norm is
    used frozen without conversion.

    Attributes:
      frozen: see above.
      momentum: weight of the old running statistics in an update.
      zero_scale: start the scale at 0 (the last norm of a residual branch).
    """

    frozen: bool = True
    momentum: float = 0.9
    zero_scale: bool = False

    @nn.compact
    def __call__(self, x: Array, steps: SumSteps | None = None, *, train: bool = False) -> Array:
        """[B, H, W, C] -> [B, H, W, C]; learning only if ``train`` and not frozen.

        Args:
          x: what the convolution before it returned.
          steps: its steps, if its sums are integers: unless it learns, the norm's bias is then a
            whole number of their unit.
          train: see above.
        """
        shape = (x.shape[-1],)
        start = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
        scale = self.param("scale", start, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        note = "affine, folds into the convolution's scale"
        size = 4 * x.shape[-1]
        record(OpRecord(module_path(self), "norm", parameters=size, folds=True, note=note))
        if self.frozen:
            scale, bias = lax.stop_gradient(scale), lax.stop_gradient(bias)
        if self.frozen or not train:
            factor, bias = norm_affine(scale, bias, mean.value, var.value)
            if steps is not None:
                bias = lsq.round_bias(bias, steps.unit(factor))
            return (x * factor + bias).astype(x.dtype)
        wide = x.astype(jnp.float32)
        batch_mean = jnp.mean(wide, axis=(0, 1, 2))
        batch_var = jnp.mean(jnp.square(wide - batch_mean), axis=(0, 1, 2))
        if not self.is_initializing():
            m = self.momentum
            mean.value = m * mean.value + (1 - m) * lax.stop_gradient(batch_mean)
            var.value = m * var.value + (1 - m) * lax.stop_gradient(batch_var)
        factor, bias = norm_affine(scale, bias, batch_mean, batch_var)
        return (wide * factor + bias).astype(x.dtype)


class FeedForward(nn.Module):
    """``W2 relu(W1 x + b1) + b2`` (two Q-FC layers; the second sees an unsigned input).

    Attributes:
      dim: model width.
      hidden: width between the layers.
      policy: bits by module path.
      dropout: rate after the ReLU, in training.
      dtype: carrier dtype of products.
    """

    dim: int
    hidden: int
    policy: Policy = Policy()
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """[B, S, dim] -> [B, S, dim]."""
        dense = functools.partial(QDense, policy=self.policy, dtype=self.dtype)
        x = dense(self.hidden, name="linear1")(x)
        x = dropout(self, x, self.dropout, train=train)
        # Dropout, too, may come before the ReLU: it leaves signs alone.
        return dense(self.dim, name="linear2", rectified=True)(x)
