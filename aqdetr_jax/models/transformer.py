"""DETR's transformer layers: encoder, decoder, and the sub-layers that both families share."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from aqdetr_jax.models.attention import MultiHeadAttention
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.dropout import dropout
from aqdetr_jax.models.layers import FLOAT, FeedForward, LayerNorm
from aqdetr_jax.models.quantized import module_path
from aqdetr_jax.quant.policy import Policy
from aqdetr_jax.quant.record import OpRecord, record


class TransformerLayer(nn.Module):
    """Sub-layers with their residual sums and norms."""

    config: DetrConfig
    policy: Policy = Policy()

    def attention(self, name: str) -> MultiHeadAttention:
        """An attention sub-layer."""
        c, crossed = self.config, name == "cross_attention"
        return MultiHeadAttention(
            c.dim, c.heads, self.policy, c.dropout, c.carrier, crossed, name=name
        )

    def residual(self, x: Array, sublayer, norm: str, train: bool):
        """Post-norm ``norm(x + f(x))`` or pre-norm ``x + f(norm(x))``; f returns (y, maps)."""
        layer_norm = LayerNorm(name=norm)
        y, maps = sublayer(layer_norm(x) if self.config.pre_norm else x)
        record(OpRecord(f"{module_path(self)}/{norm}_sum", "add", note=FLOAT))
        x = x + dropout(self, y, self.config.dropout, train=train)
        return (x if self.config.pre_norm else layer_norm(x)), maps

    def feed_forward(self, x: Array, norm: str, train: bool) -> Array:
        """The FFN sub-layer."""
        c = self.config
        ffn = FeedForward(c.dim, c.ffn, self.policy, c.dropout, c.carrier, name="feed_forward")
        return self.residual(x, lambda y: (ffn(y, train=train), None), norm, train)[0]


class EncoderLayer(TransformerLayer):
    """Self-attention over the feature map (Q-MHSA) and a feed-forward network."""

    @nn.compact
    def __call__(self, x: Array, position: Array, valid: Array, train: bool, float_path: bool):
        """[B, S, d], [B, S, d], bool [B, S] -> ([B, S, d], maps)."""
        attention = self.attention("self_attention")

        def attend(y):
            q = y + position
            return attention(q, q, y, valid, train=train, float_path=float_path)

        x, maps = self.residual(x, attend, "norm1", train)
        return self.feed_forward(x, "norm2", train), maps


class DecoderLayer(TransformerLayer):
    """Self-attention per query set (Q-MHSA), cross-attention (Q-MHCA), feed-forward network."""

    @nn.compact
    def __call__(
        self,
        x: Array,
        query: Array,
        memory: Array,
        position: Array,
        valid: Array,
        query_sets: tuple[int, ...],
        train: bool,
        float_path: bool,
    ):
        """[B, Q, d], query embedding [B, Q, d], [B, S, d] x 2, bool [B, S] -> (x, self, cross)."""
        self_attention = self.attention("self_attention")
        cross_attention = self.attention("cross_attention")

        def attend_self(y):
            q = y + query
            return self_attention(
                q, q, y, train=train, query_sets=query_sets, float_path=float_path
            )

        def attend_cross(y):
            key = memory + position
            return cross_attention(
                y + query, key, memory, valid, train=train, float_path=float_path
            )

        x, self_maps = self.residual(x, attend_self, "norm1", train)
        x, cross_maps = self.residual(x, attend_cross, "norm2", train)
        return self.feed_forward(x, "norm3", train), self_maps, cross_maps


class Encoder(nn.Module):
    """The stack of encoder layers."""

    config: DetrConfig
    policy: Policy = Policy()

    @nn.compact
    def __call__(
        self, x: Array, position: Array, valid: Array, train: bool, float_path: bool = False
    ):
        """[B, S, d] -> ([B, S, d], maps per layer)."""
        layer = (
            nn.remat(EncoderLayer, static_argnums=(4, 5))
            if self.config.remat is True
            else EncoderLayer
        )
        maps = []
        for i in range(self.config.encoder_layers):
            x, m = layer(self.config, self.policy, name=f"layer_{i}")(
                x, position, valid, train, float_path
            )
            maps.append(m)
        return (LayerNorm(name="norm")(x) if self.config.pre_norm else x), tuple(maps)


class Decoder(nn.Module):
    """The stack of decoder layers; every layer's output passes the shared final norm."""

    config: DetrConfig
    policy: Policy = Policy()

    @nn.compact
    def __call__(self, query, memory, position, valid, query_sets, train, float_path=False):
        """Query embedding [B, Q, d] -> ([L, B, Q, d], self maps, cross maps)."""
        layer = (
            nn.remat(DecoderLayer, static_argnums=(6, 7, 8))
            if self.config.remat is True
            else DecoderLayer
        )
        norm = LayerNorm(name="norm")
        x = jnp.zeros_like(query)
        outputs, self_maps, cross_maps = [], [], []
        for i in range(self.config.decoder_layers):
            x, s, c = layer(self.config, self.policy, name=f"layer_{i}")(
                x, query, memory, position, valid, query_sets, train, float_path
            )
            outputs.append(norm(x))
            self_maps.append(s)
            cross_maps.append(c)
        return jnp.stack(outputs), tuple(self_maps), tuple(cross_maps)
