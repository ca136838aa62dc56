"""Deformable DETR (Zhu et al., ICLR 2021) at low bits, with auxiliary queries (AQ-DETR).

All official variants: one or several feature levels, DC5, iterative box refinement, two stages.
The auxiliary queries enter as in ``Detr``: appended to the object queries, kept apart from them in
self-attention, sharing everything else, gone at inference. With two stages the encoder's best
N + M proposals start them, the first N the object queries (H-DETR).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.deformable_attention import DeformableAttention
from aqdetr_jax.models.heads import TORCH_LINEAR, BoxHead, normalize_images
from aqdetr_jax.models.layers import FLOAT, GroupNorm, LayerNorm
from aqdetr_jax.models.output import DetrOutput
from aqdetr_jax.models.quantized import QConv, QDense
from aqdetr_jax.models.resnet import ResNet
from aqdetr_jax.models.transformer import TransformerLayer
from aqdetr_jax.ops import deformable
from aqdetr_jax.ops.boxes import inverse_sigmoid
from aqdetr_jax.ops.deformable import LevelShapes
from aqdetr_jax.ops.position import (
    downsample_mask,
    encode_coordinates,
    sine_position_encoding,
)
from aqdetr_jax.quant.policy import Policy
from aqdetr_jax.quant.record import OpRecord, record

CLASS_PRIOR = -math.log((1 - 0.01) / 0.01)
"""Start of the class head's bias: every class has probability 0.01."""


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
            jnp.dtype(c.dtype),
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
    ):
        """[B, S, d] x 2, [B, S, L, 2], bool [B, S] -> ([B, S, d], maps)."""
        attention = self.deformable("self_attention")

        def attend(y):
            return attention(y + position, reference, y, valid, shapes)

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
    ):
        """[B, Q, d] x 2, [B, Q, L, 2 or 4], [B, S, d], bool [B, S] -> (x, self, cross maps)."""
        self_attention = self.attention("self_attention")
        cross_attention = self.deformable("cross_attention")

        def attend_self(y):
            q = y + query
            return self_attention(q, q, y, train=train, query_sets=query_sets)

        def attend_cross(y):
            return cross_attention(y + query, reference, memory, valid, shapes)

        x, self_maps = self.residual(x, attend_self, "norm1", train)
        x, cross_maps = self.residual(x, attend_cross, "norm2", train)
        return self.feed_forward(x, "norm3", train), self_maps, cross_maps


class DeformableEncoder(nn.Module):
    """The stack of encoder layers."""

    config: DetrConfig
    policy: Policy = Policy()

    @nn.compact
    def __call__(self, x, position, reference, valid, shapes, train):
        """[B, S, d] -> ([B, S, d], maps per layer)."""
        layer = DeformableEncoderLayer
        if self.config.remat:
            layer = nn.remat(layer, static_argnums=(5, 6))
        maps = []
        for i in range(self.config.encoder_layers):
            x, m = layer(self.config, self.policy, name=f"layer_{i}")(
                x, position, reference, valid, shapes, train
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

        Returns:
          (outputs [L, B, Q, d], boxes [L, B, Q, 4], self maps, cross maps).
        """
        c = self.config
        layer = DeformableDecoderLayer
        if c.remat:
            layer = nn.remat(layer, static_argnums=(6, 7, 8))
        norm = LayerNorm(name="norm") if c.pre_norm else None
        outputs, boxes, self_maps, cross_maps = [], [], [], []
        for i in range(c.decoder_layers):
            repeats = reference.shape[-1] // 2
            on_levels = reference[:, :, None] * jnp.tile(ratios, repeats)[:, None]
            x, s, m = layer(c, self.policy, name=f"layer_{i}")(
                x, query, on_levels, memory, valid, shapes, query_sets, train
            )
            outputs.append(x if norm is None else norm(x))
            boxes.append(predict(i, outputs[-1], reference))
            self_maps.append(s)
            cross_maps.append(m)
            if c.deformable.box_refine:
                # Each layer learns to improve what it is given, not to give.
                reference = lax.stop_gradient(boxes[-1])
        return jnp.stack(outputs), jnp.stack(boxes), tuple(self_maps), tuple(cross_maps)


class DeformableDetr(nn.Module):
    """Deformable DETR under a quantization policy.

    Attributes:
      config: sizes; ``family`` "deformable".
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

        Raises:
          ValueError: auxiliary queries asked for that the model has not; fewer tokens than
            proposals wanted.
        """
        c, policy, options = self.config, self.policy, self.config.deformable
        if auxiliary and not c.num_auxiliary:
            raise ValueError("auxiliary=True, but the model has num_auxiliary=0")
        auxiliary = c.num_auxiliary > 0 and (auxiliary or self.is_initializing())
        sets = c.query_sets if auxiliary else (c.num_queries,)

        # --- encoder --------------------------------------------------------------------------
        levels, masks = feature_levels(c, policy, images, mask, train)
        embedding = self.param("level_embed", nn.initializers.normal(1.0), (len(levels), c.dim))
        record(OpRecord("level_embed", "embedding", parameters=embedding.size, note=FLOAT))
        tokens, position = join_levels(levels, masks, embedding)
        shapes = tuple((m.shape[1], m.shape[2]) for m in masks)
        ratios = deformable.valid_ratios(masks)
        valid = jnp.concatenate([m.reshape(m.shape[0], -1) for m in masks], axis=1)
        centres = deformable.encoder_reference_points(shapes, ratios)
        memory, encoder_maps = DeformableEncoder(c, policy, name="encoder")(
            tokens, position, centres, valid, shapes, train
        )

        # --- heads: one for all layers, or one for each (and one for the proposals) -------------
        class_heads, box_heads = self._heads()

        def predict(layer: int, x: Array, reference: Array) -> Array:
            start = inverse_sigmoid(reference)
            if start.shape[-1] == 2:
                start = jnp.pad(start, [(0, 0)] * (start.ndim - 1) + [(0, 2)])
            return jax.nn.sigmoid(box_heads[layer](x) + start)

        # --- queries --------------------------------------------------------------------------
        proposal_logits = proposal_boxes = None
        if options.two_stage:
            proposal_logits, coordinates = self._proposals(
                memory, masks, class_heads[-1], box_heads[-1]
            )
            proposal_boxes = jax.nn.sigmoid(coordinates)
            target, query, reference = self._best(proposal_logits, coordinates, sum(sets))
        else:
            target, query, reference = self._learned(images.shape[0], auxiliary)

        # --- decoder --------------------------------------------------------------------------
        decoded, boxes, self_maps, cross_maps = DeformableDecoder(c, policy, name="decoder")(
            target, query, reference, memory, valid, ratios, shapes, sets, train, predict
        )
        logits = jnp.stack([head(x) for head, x in zip(class_heads, decoded, strict=False)])
        n, extra = c.num_queries, len(sets) > 1
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
            None if proposal_logits is None else proposal_logits[None],
            None if proposal_boxes is None else proposal_boxes[None],
        )

    def _heads(self) -> tuple[list[QDense], list[BoxHead]]:
        """Class and box heads of every decoder layer, then (two stages) those of the proposals."""
        c, options = self.config, self.config.deformable
        zeros, prior = nn.initializers.zeros, nn.initializers.constant(CLASS_PRIOR)

        def small(_key, shape, dtype=jnp.float32):
            # Boxes start at sigmoid(-2), an eighth of the image, where nothing else sets a size.
            return jnp.array([0.0, 0.0, -2.0, -2.0], dtype).reshape(shape)

        def pair(suffix: str, bias) -> tuple[QDense, BoxHead]:
            return (
                QDense(
                    c.class_outputs,
                    self.policy,
                    kernel_init=TORCH_LINEAR,
                    bias_init=prior,
                    name=f"class_head{suffix}",
                ),
                BoxHead(c.dim, self.policy, zeros, bias, name=f"box_head{suffix}"),
            )

        if not options.box_refine:
            pairs = [pair("", small)] * c.decoder_layers
        else:
            count = c.decoder_layers + options.two_stage
            first = zeros if options.two_stage else small
            pairs = [pair(f"_{i}", zeros if i else first) for i in range(count)]
        return [x for x, _ in pairs], [x for _, x in pairs]

    def _learned(self, batch: int, auxiliary: bool) -> tuple[Array, Array, Array]:
        """Targets, query embeddings [B, Q, d] and reference points [B, Q, 2] as parameters."""
        c = self.config
        start = nn.initializers.normal(1.0)
        queries = self.param("query_embed", start, (c.num_queries, 2 * c.dim))
        record(OpRecord("query_embed", "embedding", parameters=queries.size, note=FLOAT))
        if auxiliary:
            more = self.param("auxiliary_queries", start, (c.num_auxiliary, 2 * c.dim))
            queries = jnp.concatenate([queries, more])
        query, target = jnp.split(queries, 2, axis=-1)
        reference = jax.nn.sigmoid(QDense(2, self.policy, name="reference_points")(query))
        target, query, reference = (
            jnp.broadcast_to(x, (batch, *x.shape)) for x in (target, query, reference)
        )
        return target, query, reference

    def _proposals(self, memory, masks, class_head, box_head) -> tuple[Array, Array]:
        """Class scores [B, S, C] and unbounded boxes [B, S, 4] of the encoder's tokens."""
        boxes, allowed = deformable.encoder_proposals(masks)
        x = jnp.where(allowed[..., None], memory, 0.0)
        x = LayerNorm(name="proposal_norm")(
            QDense(self.config.dim, self.policy, name="proposal_proj")(x)
        )
        start = jnp.where(allowed[..., None], jnp.log(boxes / (1 - boxes)), jnp.inf)
        return class_head(x), box_head(x) + start

    def _best(self, logits, coordinates, count: int) -> tuple[Array, Array, Array]:
        """The ``count`` proposals with the best first class become the decoder's queries."""
        c = self.config
        if count > logits.shape[1]:
            raise ValueError(
                f"{count} proposals wanted of {logits.shape[1]} tokens: use fewer queries, or "
                "larger images"
            )
        best = lax.top_k(lax.stop_gradient(logits[..., 0]), count)[1]
        chosen = lax.stop_gradient(jnp.take_along_axis(coordinates, best[..., None], axis=1))
        reference = jax.nn.sigmoid(chosen)
        encoded = encode_coordinates(2 * math.pi * reference, c.dim // 2)
        x = LayerNorm(name="query_norm")(QDense(2 * c.dim, self.policy, name="query_proj")(encoded))
        query, target = jnp.split(x, 2, axis=-1)
        return target, query, reference


def feature_levels(
    config: DetrConfig, policy: Policy, images: Array, mask: Array, train: bool
) -> tuple[list[Array], list[Array]]:
    """Backbone and input projections.

    Makes its modules in the module that calls it, so that models share their names.

    Returns:
      (feature maps [B, H_l, W_l, d], masks bool [B, H_l, W_l]), one of each per level.
    """
    c, options = config, config.deformable
    x = normalize_images(images, mask, c)
    dtype = jnp.dtype(c.dtype)
    features = ResNet(c.backbone, policy, dtype, name="backbone")(x, train=train)
    features = features[-min(options.stages, options.levels, len(features)) :]
    levels: list[Array] = []
    for i in range(options.levels):
        # Beyond the backbone: a strided convolution of its last stage, then of that, and so on.
        given = i < len(features)
        source = features[i] if given else features[-1] if i == len(features) else levels[-1]
        size, stride = (1, 1) if given else (3, 2)
        projected = QConv(
            c.dim,
            (size, size),
            policy,
            stride,
            use_bias=True,
            unsigned=i <= len(features),
            kernel_init=nn.initializers.xavier_uniform(),
            dtype=dtype,
            name=f"input_proj_{i}",
        )(source)
        levels.append(GroupNorm(options.norm_groups, name=f"input_norm_{i}")(projected))
    masks = [downsample_mask(mask, x.shape[1], x.shape[2]) for x in levels]
    return levels, masks


def join_levels(levels: list[Array], masks: list[Array], embedding: Array) -> tuple[Array, Array]:
    """The tokens of all levels, level by level, and their position encodings, [B, S, d] each.

    Args:
      levels: [B, H_l, W_l, d] feature maps.
      masks: bool [B, H_l, W_l].
      embedding: [L, d], added to the encodings of each level.
    """
    batch, dim = levels[0].shape[0], levels[0].shape[-1]
    tokens = jnp.concatenate([x.reshape(batch, -1, dim) for x in levels], axis=1)
    record(OpRecord("position", "position", note=FLOAT))
    positions = [
        sine_position_encoding(mask, dim, offset=-0.5).reshape(batch, -1, dim) + embedding[i]
        for i, mask in enumerate(masks)
    ]
    return tokens, jnp.concatenate(positions, axis=1)
