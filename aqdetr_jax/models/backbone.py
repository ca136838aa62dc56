"""The backbones behind one door."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from aqdetr_jax.models.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig
from aqdetr_jax.models.resnet import BackboneConfig, ResNet
from aqdetr_jax.quant.policy import Policy

AnyBackboneConfig = BackboneConfig | EfficientNetLiteConfig


def build_backbone(
    config: AnyBackboneConfig, policy: Policy | None = None, dtype: DTypeLike = jnp.float32
) -> ResNet | EfficientNetLite:
    """The module of a configuration, under the name that every model gives it.

    Args:
      config: sizes.
      policy: bits by module path; None = float.
      dtype: carrier dtype of the convolutions.
    """
    policy = policy or Policy()
    if isinstance(config, EfficientNetLiteConfig):
        return EfficientNetLite(config, policy, dtype, name="backbone")
    return ResNet(config, policy, dtype, name="backbone")
