"""Deployed detectors: the networks of both families, computed in JAX, behind the model's own door."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from aqdetr_jax.checkpoint.model_folder import ModelBundle
from aqdetr_jax.deploy import deformable, detr
from aqdetr_jax.deploy.jax_operations import JaxOperations
from aqdetr_jax.deploy.network import Network
from aqdetr_jax.deploy.operations import Operations, Tensor
from aqdetr_jax.models.config import DetrConfig


def detect(
    ops: Operations, network: Network, images: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """Class scores and boxes, see the families' functions of this name."""
    family = deformable if network.config.family == "deformable" else detr
    return family.detect(ops, network, images, sizes)


def image_sizes(mask: Array) -> Array:
    """(height, width) of the real images, int32 [B, 2], from their masks [B, H, W]."""
    height = jnp.sum(mask[:, :, 0], 1, dtype=jnp.int32)
    width = jnp.sum(mask[:, 0, :], 1, dtype=jnp.int32)
    return jnp.stack([height, width], -1)


class Output(NamedTuple):
    """What readers of a ``models.output.DetrOutput`` look at for detections.

    Attributes:
      logits: [1, B, N, C].
      boxes: [1, B, N, 4].
    """

    logits: Array
    boxes: Array


@dataclasses.dataclass(frozen=True)
class DeployedDetector:
    """A deployed network where a Flax module is expected.

    Attributes:
      config: sizes.
    """

    config: DetrConfig

    def apply(self, network: Network, images: Array, mask: Array) -> Output:
        """Detects; see ``models.detr.Detr``."""
        logits, boxes = detect(JaxOperations(), network, images, image_sizes(mask))
        return Output(logits[None], boxes[None])

    def apply_with_codes(
        self, network: Network, images: Array, mask: Array, given: Mapping[str, Array] | None = None
    ) -> tuple[Output, dict[str, Array]]:
        """Detects, and returns what every grid was given, by site.

        Args:
          network: its parameters.
          images: uint8 [B, H, W, 3].
          mask: bool [B, H, W].
          given: codes that go on instead of those that are computed, by site.
        """
        ops = JaxOperations(given)
        logits, boxes = detect(ops, network, images, image_sizes(mask))
        return Output(logits[None], boxes[None]), ops.codes


@dataclasses.dataclass(frozen=True)
class DeployedBundle(ModelBundle):
    """A model whose variables are a deployed ``Network``."""

    def module(self) -> Any:
        """What computes it."""
        return DeployedDetector(self.config)
