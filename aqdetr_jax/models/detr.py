"""DETR (Carion et al., 2020) at low bits, with auxiliary queries in training (AQ-DETR).

Q-CNN, Q-Encoder and Q-Decoder are the same modules as the float ones under a quantization policy.
Where the auxiliary queries enter is one line in ``Detr.__call__``: they are appended to the object
queries, kept apart from them in self-attention, and share everything else. At inference they are
not appended and their parameter is not read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from aqdetr_jax.models.attention import AttentionMaps, MultiHeadAttention
from aqdetr_jax.models.layers import FLOAT, FeedForward, LayerNorm
from aqdetr_jax.models.quantized import QConv, QDense, module_path
from aqdetr_jax.models.resnet import BackboneConfig, ResNet
from aqdetr_jax.ops.position import (
    downsample_mask,
    encode_points,
    sine_position_encoding,
    spread_points,
)
from aqdetr_jax.quant.policy import Policy
from aqdetr_jax.quant.record import OpRecord, record

TORCH_LINEAR = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
"""torch's default start of linear and convolution weights, U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""


@dataclasses.dataclass(frozen=True)
class DetrConfig:
    """A DETR by its sizes; defaults are DETR-R50 on COCO.

    Attributes:
      backbone: ResNet sizes.
      num_classes: C, real classes; the class head has C + 1 outputs (91 + 1 for COCO).
      num_queries: N object queries.
      num_auxiliary: M auxiliary queries, used in training only (0 = none).
      auxiliary_groups: G sets of M/G auxiliary queries, apart from each other in self-attention.
      dim: model width d.
      heads: attention heads.
      encoder_layers: number of encoder layers.
      decoder_layers: number of decoder layers.
      ffn: hidden width of the feed-forward networks.
      query_start: "normal" as in DETR, or "points": the encodings of points spread over the image,
        a start with a place for every query that helps short trainings from scratch.
      dropout: rate everywhere DETR has dropout.
      pre_norm: norm before each sub-layer instead of after it (the original's option).
      remat: recompute transformer layers in the backward pass to save memory.
      dtype: carrier dtype of products, "float32" or "bfloat16"; sums and norms are float32.
      pixel_mean: RGB mean of images in [0, 1].
      pixel_std: RGB standard deviation.
    """

    backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    num_classes: int = 91
    num_queries: int = 100
    num_auxiliary: int = 0
    auxiliary_groups: int = 1
    dim: int = 256
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn: int = 2048
    query_start: Literal["normal", "points"] = "normal"
    dropout: float = 0.1
    pre_norm: bool = False
    remat: bool = False
    dtype: str = "float32"
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        if self.num_auxiliary % self.auxiliary_groups:
            raise ValueError(
                f"{self.num_auxiliary} auxiliary queries do not split into "
                f"{self.auxiliary_groups} equal groups"
            )

    @property
    def query_sets(self) -> tuple[int, ...]:
        """Sizes of the query sets in training: the object queries, then each auxiliary group."""
        if not self.num_auxiliary:
            return (self.num_queries,)
        size = self.num_auxiliary // self.auxiliary_groups
        return (self.num_queries, *(size,) * self.auxiliary_groups)


class DetrOutput(NamedTuple):
    """Everything a loss may look at; what is not used is never computed (under jit).

    Attributes:
      logits: [L, B, N, C+1] class scores of the object queries after each decoder layer; the last
        class means "no object".
      boxes: [L, B, N, 4] (cx, cy, w, h) in [0, 1] of the image without its padding.
      auxiliary_logits: [L, B, M, C+1], or None without auxiliary queries.
      auxiliary_boxes: [L, B, M, 4], or None.
      encoder_attention: per encoder layer, the self-attention maps.
      decoder_self_attention: per decoder layer, maps of the object queries.
      decoder_cross_attention: per decoder layer, maps of all queries (object queries first).
      memory: [B, S, d] encoder output.
      decoder_features: [L, B, N, d] decoder output of the object queries, after the final norm.
      memory_valid: bool [B, S], False for padding.
    """

    logits: Array
    boxes: Array
    auxiliary_logits: Array | None
    auxiliary_boxes: Array | None
    encoder_attention: tuple[AttentionMaps, ...]
    decoder_self_attention: tuple[AttentionMaps, ...]
    decoder_cross_attention: tuple[AttentionMaps, ...]
    memory: Array
    decoder_features: Array
    memory_valid: Array


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


class _TransformerLayer(nn.Module):
    config: DetrConfig
    policy: Policy = Policy()

    def attention(self, name: str) -> MultiHeadAttention:
        """An attention sub-layer."""
        c = self.config
        return MultiHeadAttention(
            c.dim, c.heads, self.policy, c.dropout, jnp.dtype(c.dtype), name=name
        )

    def residual(self, x: Array, sublayer, norm: str, train: bool):
        """Post-norm ``norm(x + f(x))`` or pre-norm ``x + f(norm(x))``; f returns (y, maps)."""
        layer_norm = LayerNorm(name=norm)
        dropout = nn.Dropout(self.config.dropout, deterministic=not train)
        y, maps = sublayer(layer_norm(x) if self.config.pre_norm else x)
        record(OpRecord(f"{module_path(self)}/{norm}_sum", "add", note=FLOAT))
        x = x + dropout(y)
        return (x if self.config.pre_norm else layer_norm(x)), maps

    def feed_forward(self, x: Array, norm: str, train: bool) -> Array:
        """The FFN sub-layer."""
        c = self.config
        ffn = FeedForward(
            c.dim, c.ffn, self.policy, c.dropout, jnp.dtype(c.dtype), name="feed_forward"
        )
        return self.residual(x, lambda y: (ffn(y, train=train), None), norm, train)[0]


class EncoderLayer(_TransformerLayer):
    """Self-attention over the feature map (Q-MHSA) and a feed-forward network."""

    @nn.compact
    def __call__(self, x: Array, position: Array, valid: Array, train: bool):
        """[B, S, d], [B, S, d], bool [B, S] -> ([B, S, d], maps)."""
        attention = self.attention("self_attention")

        def attend(y):
            q = y + position
            return attention(q, q, y, valid, train=train)

        x, maps = self.residual(x, attend, "norm1", train)
        return self.feed_forward(x, "norm2", train), maps


class DecoderLayer(_TransformerLayer):
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
    ):
        """[B, Q, d], query embedding [B, Q, d], [B, S, d] x 2, bool [B, S] -> (x, self, cross)."""
        self_attention = self.attention("self_attention")
        cross_attention = self.attention("cross_attention")

        def attend_self(y):
            q = y + query
            return self_attention(q, q, y, train=train, query_sets=query_sets)

        def attend_cross(y):
            return cross_attention(y + query, memory + position, memory, valid, train=train)

        x, self_maps = self.residual(x, attend_self, "norm1", train)
        x, cross_maps = self.residual(x, attend_cross, "norm2", train)
        return self.feed_forward(x, "norm3", train), self_maps, cross_maps


class Encoder(nn.Module):
    """The stack of encoder layers."""

    config: DetrConfig
    policy: Policy = Policy()

    @nn.compact
    def __call__(self, x: Array, position: Array, valid: Array, train: bool):
        """[B, S, d] -> ([B, S, d], maps per layer)."""
        layer = nn.remat(EncoderLayer, static_argnums=(4,)) if self.config.remat else EncoderLayer
        maps = []
        for i in range(self.config.encoder_layers):
            x, m = layer(self.config, self.policy, name=f"layer_{i}")(x, position, valid, train)
            maps.append(m)
        return (LayerNorm(name="norm")(x) if self.config.pre_norm else x), tuple(maps)


class Decoder(nn.Module):
    """The stack of decoder layers; every layer's output passes the shared final norm."""

    config: DetrConfig
    policy: Policy = Policy()

    @nn.compact
    def __call__(self, query, memory, position, valid, query_sets, train):
        """Query embedding [B, Q, d] -> ([L, B, Q, d], self maps, cross maps)."""
        layer = nn.remat(DecoderLayer, static_argnums=(6, 7)) if self.config.remat else DecoderLayer
        norm = LayerNorm(name="norm")
        x = jnp.zeros_like(query)
        outputs, self_maps, cross_maps = [], [], []
        for i in range(self.config.decoder_layers):
            x, s, c = layer(self.config, self.policy, name=f"layer_{i}")(
                x, query, memory, position, valid, query_sets, train
            )
            outputs.append(norm(x))
            self_maps.append(s)
            cross_maps.append(c)
        return jnp.stack(outputs), tuple(self_maps), tuple(cross_maps)


class BoxHead(nn.Module):
    """Three-layer perceptron with sigmoid output: (cx, cy, w, h) in [0, 1]."""

    dim: int
    policy: Policy = Policy()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., d] -> [..., 4]."""
        dense = functools.partial(QDense, policy=self.policy, kernel_init=TORCH_LINEAR)
        x = jax.nn.relu(dense(self.dim, name="layer_0")(x))
        x = jax.nn.relu(dense(self.dim, name="layer_1", unsigned=True)(x))
        return jax.nn.sigmoid(dense(4, name="layer_2", unsigned=True)(x))


def _query_start(config: DetrConfig, first: int) -> nn.initializers.Initializer:
    """Initializer of query embeddings; ``first`` is the number of queries before these."""
    if config.query_start == "normal":
        return nn.initializers.normal(1.0)

    def init(_key, shape, dtype=jnp.float32):
        points = 2 * math.pi * spread_points(shape[0], first)
        return encode_points(jnp.asarray(points), shape[1]).astype(dtype)

    return init


class Detr(nn.Module):
    """DETR under a quantization policy.

    Attributes:
      config: sizes.
      policy: which operation gets which bits; the default is the float model.
    """

    config: DetrConfig
    policy: Policy = Policy()

    @nn.compact
    def __call__(
        self, images: Array, mask: Array, *, train: bool = False, auxiliary: bool = False
    ) -> DetrOutput:
        """Detects.

        Args:
          images: uint8 [B, H, W, 3] (normalised here), or float32, normalised already.
          mask: bool [B, H, W], True = real pixel.
          train: dropout and learning norms on (needs an rng "dropout" if the rate is positive).
          auxiliary: run the auxiliary queries too.

        Returns:
          See ``DetrOutput``.
        """
        c, policy = self.config, self.policy
        x = normalize_images(images, mask, c)
        features = ResNet(c.backbone, policy, jnp.dtype(c.dtype), name="backbone")(x, train=train)
        x = features[-1]
        batch, height, width, _ = x.shape
        cells = downsample_mask(mask, height, width)
        position = sine_position_encoding(cells, c.dim).reshape(batch, -1, c.dim)
        record(OpRecord(f"{module_path(self)}position".strip("/"), "position", note=FLOAT))
        x = QConv(
            c.dim,
            (1, 1),
            policy,
            use_bias=True,
            kernel_init=TORCH_LINEAR,
            dtype=jnp.dtype(c.dtype),
            name="input_proj",
        )(x)
        valid = cells.reshape(batch, -1)
        memory, encoder_maps = Encoder(c, policy, name="encoder")(
            x.reshape(batch, -1, c.dim), position, valid, train
        )

        queries = self.param("query_embed", _query_start(c, 0), (c.num_queries, c.dim))
        record(OpRecord("query_embed", "embedding", parameters=queries.size, note=FLOAT))
        sets: tuple[int, ...] = (c.num_queries,)
        if c.num_auxiliary and (auxiliary or self.is_initializing()):
            more = self.param(
                "auxiliary_queries", _query_start(c, c.num_queries), (c.num_auxiliary, c.dim)
            )
            queries, sets = jnp.concatenate([queries, more]), c.query_sets
        elif auxiliary:
            raise ValueError("auxiliary=True, but the model has num_auxiliary=0")
        query = jnp.broadcast_to(queries, (batch, *queries.shape))
        decoded, self_maps, cross_maps = Decoder(c, policy, name="decoder")(
            query, memory, position, valid, sets, train
        )
        logits = QDense(c.num_classes + 1, policy, kernel_init=TORCH_LINEAR, name="class_head")(
            decoded
        )
        boxes = BoxHead(c.dim, policy, name="box_head")(decoded)
        n = c.num_queries
        extra = len(sets) > 1
        return DetrOutput(
            logits[:, :, :n],
            boxes[:, :, :n],
            logits[:, :, n:] if extra else None,
            boxes[:, :, n:] if extra else None,
            encoder_maps,
            self_maps,
            cross_maps,
            memory,
            decoded[:, :, :n],
            valid,
        )
