"""Deployed detectors: the networks of both families in JAX, behind the model's own door."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jax import Array

from aqdetr_jax.checkpoint.model_folder import ModelBundle
from aqdetr_jax.deploy import deformable, detr
from aqdetr_jax.deploy.jax_operations import JaxOperations
from aqdetr_jax.deploy.network import Network
from aqdetr_jax.deploy.operations import Operations, Tensor
from aqdetr_jax.evaluation.coco import MAX_DETECTIONS
from aqdetr_jax.models.config import DetrConfig


def detect(
    ops: Operations, network: Network, images: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """Class scores and boxes, see the families' functions of this name."""
    family = deformable if network.config.family == "deformable" else detr
    return family.detect(ops, network, images, sizes)


def read_out(
    ops: Operations, network: Network, logits: Tensor, boxes: Tensor, sizes: Tensor, classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Detections as ``evaluation.coco.postprocess`` makes them, within the deployed network.

    Args:
      ops: what computes.
      network: whose output it is.
      logits: [B, N, columns].
      boxes: [B, N, 4].
      sizes: int32 [B, 2], (height, width) of the real images.
      classes: that count, the first ones.

    Returns:
      (scores floats [B, K], labels whole numbers [B, K], boxes floats [B, K, 4] as x1, y1, x2, y2
      in pixels of the real image, not clipped); sorted by query (softmax) or by score (sigmoids).
    """
    batch, queries, columns = ops.shape(logits)
    if network.config.class_loss == "softmax":
        found = ops.part(ops.softmax(logits), 2, 0, min(columns - 1, classes))
        scores, labels = ops.greatest(found)
    else:
        classes = min(columns, classes)
        count = min(MAX_DETECTIONS, queries * classes)
        flat = ops.sigmoid(ops.part(logits, 2, 0, classes))
        flat = ops.reshape(flat, (batch, queries * classes))
        chosen = ops.best(flat, count)
        scores = ops.rows(ops.reshape(flat, (batch, queries * classes, 1)), chosen)
        scores = ops.reshape(scores, (batch, count))
        query, labels = ops.divided(chosen, classes)
        boxes = ops.rows(boxes, query)
    height, width = (ops.part(ops.floats(sizes), 1, i, i + 1) for i in range(2))
    scale = ops.reshape(ops.concatenate([width, height], 1), (batch, 1, 2))
    centre, half = ops.part(boxes, 2, 0, 2), ops.multiply(ops.part(boxes, 2, 2, 4), 0.5)
    corners = [f(centre, half) for f in (ops.subtract, ops.add)]
    return scores, labels, ops.concatenate([ops.multiply(x, scale) for x in corners], 2)


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

    @property
    def network(self) -> Network:
        """The variables."""
        return cast(Network, self.variables)

    def module(self) -> Any:
        """What computes it."""
        return DeployedDetector(self.config)
