"""Deformable DETR (Zhu et al., ICLR 2021) at low bits, with auxiliary queries (AQ-DETR).

All official variants: one or several feature levels, DC5, iterative box refinement, two stages.
The auxiliary queries enter as in ``Detr``: appended to the object queries, kept apart from them in
self-attention, sharing everything else, gone at inference. With two stages the encoder's best
N + M proposals start them, the first N the object queries (H-DETR).
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.deformable_transformer import DeformableDecoder
from aqdetr_jax.models.heads import TORCH_LINEAR, BoxHead
from aqdetr_jax.models.layers import FLOAT, LayerNorm
from aqdetr_jax.models.levels import encode_levels
from aqdetr_jax.models.output import DetrOutput, split_queries
from aqdetr_jax.models.quantized import QDense
from aqdetr_jax.ops import deformable
from aqdetr_jax.ops.boxes import inverse_sigmoid
from aqdetr_jax.ops.position import encode_coordinates
from aqdetr_jax.quant.policy import Policy
from aqdetr_jax.quant.record import OpRecord, record

CLASS_PRIOR = -math.log((1 - 0.01) / 0.01)
"""Start of the class head's bias: every class has probability 0.01."""


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
        self,
        images: Array,
        mask: Array,
        *,
        train: bool = False,
        auxiliary: bool = False,
        float_path: bool = False,
    ) -> DetrOutput:
        """Detects.

        Args:
          images: uint8 [B, H, W, 3] (normalised here), or float32, normalised already; data, to
            which no gradient flows.
          mask: bool [B, H, W], True = real pixel.
          train: dropout and learning norms on (which draws by ``models.dropout.drawing``).
          auxiliary: run the auxiliary queries too.
          float_path: in the maps also those of the same attentions unquantized.

        Returns:
          See ``DetrOutput``.

        Raises:
          ValueError: auxiliary queries asked for that the model has not; fewer tokens than
            proposals wanted.
        """
        c, policy, options = self.config, self.policy, self.config.deformable
        sets = c.active_sets(auxiliary, self.is_initializing())

        # --- encoder --------------------------------------------------------------------------
        encoded = encode_levels(self, c, policy, images, mask, train, float_path)
        memory, valid = encoded.memory, encoded.valid

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
                memory, encoded.masks, class_heads[-1], box_heads[-1]
            )
            proposal_boxes = jax.nn.sigmoid(coordinates)
            target, query, reference = self._best(proposal_logits, coordinates, sum(sets))
        else:
            target, query, reference = self._learned(images.shape[0], auxiliary=len(sets) > 1)
        target, query = (x.astype(memory.dtype) for x in (target, query))

        # --- decoder --------------------------------------------------------------------------
        decoded, boxes, self_maps, cross_maps = DeformableDecoder(c, policy, name="decoder")(
            target,
            query,
            reference,
            memory,
            valid,
            encoded.ratios,
            encoded.shapes,
            sets,
            train,
            predict,
            float_path,
        )
        logits = jnp.stack([head(x) for head, x in zip(class_heads, decoded, strict=False)])
        logits, auxiliary_logits = split_queries(logits, c.num_queries)
        boxes, auxiliary_boxes = split_queries(boxes, c.num_queries)
        return DetrOutput(
            logits,
            boxes,
            auxiliary_logits,
            auxiliary_boxes,
            encoded.maps,
            self_maps,
            cross_maps,
            memory,
            decoded[:, :, : c.num_queries],
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

    def _learned(self, batch: int, *, auxiliary: bool) -> tuple[Array, Array, Array]:
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
                f"{count} proposals wanted of {logits.shape[1]} tokens: so many "
                "(model.num_queries) need larger images"
            )
        best = lax.top_k(lax.stop_gradient(logits[..., 0]), count)[1]
        chosen = lax.stop_gradient(jnp.take_along_axis(coordinates, best[..., None], axis=1))
        reference = jax.nn.sigmoid(chosen)
        encoded = encode_coordinates(2 * math.pi * reference, c.dim // 2)
        x = LayerNorm(name="query_norm")(QDense(2 * c.dim, self.policy, name="query_proj")(encoded))
        query, target = jnp.split(x, 2, axis=-1)
        return target, query, reference
