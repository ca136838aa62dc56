"""Deformable DETR's transformer layers and stacks."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.deformable_attention import MIXED, DeformableAttention
from aqdetr_jax.models.layers import LayerNorm
from aqdetr_jax.models.transformer import TransformerLayer
from aqdetr_jax.ops.deformable import LevelShapes
from aqdetr_jax.quant.policy import Policy

KEPT = jax.checkpoint_policies.save_only_these_names(MIXED)
"""A layer that is computed again takes what its samples made from before: sampling costs most."""


class _DeformableLayer(TransformerLayer):
    def deformable(self, name: str) -> DeformableAttention:
        """A deformable attention sub-layer."""
        c = self.config
        return DeformableAttention(
            c.dim,
            c.heads,
            c.deformable.levels,
            c.deformable.points,
            self.policy,
            c.deformable.sampling,
            bool(c.remat),
            c.carrier,
            name == "cross_attention",
            name=name,
        )


class DeformableEncoderLayer(_DeformableLayer):
    """Deformable self-attention over all levels and a feed-forward network."""

    @nn.compact
    def __call__(
        self,
        x: Array,
        position: Array,
        reference: Array,
        valid: Array,
        shapes: LevelShapes,
        train: bool,
        float_path: bool,
    ):
        """[B, S, d] x 2, [B, S, L, 2], bool [B, S] -> ([B, S, d], maps)."""
        attention = self.deformable("self_attention")

        def attend(y):
            query = y + position
            return attention(query, reference, y, valid, shapes, float_path=float_path)

        x, maps = self.residual(x, attend, "norm1", train)
        return self.feed_forward(x, "norm2", train), maps


class DeformableDecoderLayer(_DeformableLayer):
    """Self-attention per query set, deformable cross-attention, feed-forward network."""

    @nn.compact
    def __call__(
        self,
        x: Array,
        query: Array,
        reference: Array,
        memory: Array,
        valid: Array,
        shapes: LevelShapes,
        query_sets: tuple[int, ...],
        train: bool,
        float_path: bool,
    ):
        """[B, Q, d] x 2, [B, Q, L, 2 or 4], [B, S, d], bool [B, S] -> (x, self, cross maps)."""
        self_attention = self.attention("self_attention")
        cross_attention = self.deformable("cross_attention")

        def attend_self(y):
            q = y + query
            return self_attention(
                q, q, y, train=train, query_sets=query_sets, float_path=float_path
            )

        def attend_cross(y):
            q = y + query
            return cross_attention(q, reference, memory, valid, shapes, float_path=float_path)

        x, self_maps = self.residual(x, attend_self, "norm1", train)
        x, cross_maps = self.residual(x, attend_cross, "norm2", train)
        return self.feed_forward(x, "norm3", train), self_maps, cross_maps


class DeformableEncoder(nn.Module):
    """The stack of encoder layers."""

    config: DetrConfig
    policy: Policy = Policy()

    @nn.compact
    def __call__(self, x, position, reference, valid, shapes, train, float_path=False):
        """[B, S, d] -> ([B, S, d], maps per layer)."""
        layer = DeformableEncoderLayer
        if self.config.remat is True:
            layer = nn.remat(layer, static_argnums=(5, 6, 7), policy=KEPT)
        maps = []
        for i in range(self.config.encoder_layers):
            x, m = layer(self.config, self.policy, name=f"layer_{i}")(
                x, position, reference, valid, shapes, train, float_path
            )
            maps.append(m)
        return (LayerNorm(name="norm")(x) if self.config.pre_norm else x), tuple(maps)


class DeformableDecoder(nn.Module):
    """The stack of decoder layers; predicts boxes on the way, and refines them layer by layer."""

    config: DetrConfig
    policy: Policy = Policy()

    @nn.compact
    def __call__(
        self,
        x: Array,
        query: Array,
        reference: Array,
        memory: Array,
        valid: Array,
        ratios: Array,
        shapes: LevelShapes,
        query_sets: tuple[int, ...],
        train: bool,
        predict: Callable[[int, Array, Array], Array],
        float_path: bool = False,
    ):
        """Runs the layers.

        Args:
          x: [B, Q, d] targets.
          query: [B, Q, d] query embeddings.
          reference: [B, Q, 2 or 4] first reference points or boxes, in units of the real image.
          memory: [B, S, d].
          valid: bool [B, S].
          ratios: [B, L, 2] valid part of each level.
          shapes: of the levels.
          query_sets: sizes of the sets kept apart in self-attention.
          train: dropout on.
          predict: boxes [B, Q, 4] of layer i from its output and its reference.
          float_path: the maps of the attentions' float paths too.

        Returns:
          (outputs [L, B, Q, d], boxes [L, B, Q, 4], self maps, cross maps).
        """
        c = self.config
        layer = DeformableDecoderLayer
        if c.remat is True:
            layer = nn.remat(layer, static_argnums=(6, 7, 8, 9), policy=KEPT)
        norm = LayerNorm(name="norm") if c.pre_norm else None
        outputs, boxes, self_maps, cross_maps = [], [], [], []
        for i in range(c.decoder_layers):
            repeats = reference.shape[-1] // 2
            on_levels = reference[:, :, None] * jnp.tile(ratios, repeats)[:, None]
            x, s, m = layer(c, self.policy, name=f"layer_{i}")(
                x, query, on_levels, memory, valid, shapes, query_sets, train, float_path
            )
            outputs.append(x if norm is None else norm(x))
            boxes.append(predict(i, outputs[-1], reference))
            self_maps.append(s)
            cross_maps.append(m)
            if c.deformable.box_refine:
                # Each layer learns to improve what it is given, not to give.
                reference = lax.stop_gradient(boxes[-1])
        return jnp.stack(outputs), jnp.stack(boxes), tuple(self_maps), tuple(cross_maps)
