"""What stands before and after the transformer: images in, queries, boxes out."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.quantized import QDense
from aqdetr_jax.ops.position import encode_points, spread_points
from aqdetr_jax.quant.policy import Policy

TORCH_LINEAR = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
"""torch's default start of linear and convolution weights, U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""


def normalize_images(images: Array, mask: Array, config: DetrConfig) -> Array:
    """Pixels to network input: uint8 [B, H, W, 3] -> float32, 0 where ``mask`` is False.

    Floating-point images are taken as normalised already.
    """
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    mean = jnp.asarray(config.pixel_mean, jnp.float32)
    std = jnp.asarray(config.pixel_std, jnp.float32)
    x = (images.astype(jnp.float32) / 255.0 - mean) / std
    return jnp.where(mask[..., None], x, 0.0)


class BoxHead(nn.Module):
    """Three-layer perceptron whose sigmoid is a box (cx, cy, w, h) in [0, 1].

    Attributes:
      dim: model width.
      policy: bits by module path.
      last_kernel: initializer of the last layer.
      last_bias: initializer of its bias.
    """

    dim: int
    policy: Policy = Policy()
    last_kernel: nn.initializers.Initializer = TORCH_LINEAR
    last_bias: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., d] -> [..., 4]."""
        dense = functools.partial(QDense, policy=self.policy, kernel_init=TORCH_LINEAR)
        x = jax.nn.relu(dense(self.dim, name="layer_0")(x))
        x = jax.nn.relu(dense(self.dim, name="layer_1", unsigned=True)(x))
        last = QDense(4, self.policy, True, self.last_kernel, self.last_bias, name="layer_2")
        return last(x)


def query_start(config: DetrConfig, first: int) -> nn.initializers.Initializer:
    """Initializer of query embeddings; ``first`` is the number of queries before these."""
    if config.query_start == "normal":
        return nn.initializers.normal(1.0)

    def init(_key, shape, dtype=jnp.float32):
        points = 2 * math.pi * spread_points(shape[0], first)
        return encode_points(jnp.asarray(points), shape[1]).astype(dtype)

    return init
