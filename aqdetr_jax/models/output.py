"""What a detector returns."""

from __future__ import annotations

from typing import NamedTuple

from jax import Array

from aqdetr_jax.models.attention import AttentionMaps
from aqdetr_jax.models.deformable_attention import DeformableMaps


class DetrOutput(NamedTuple):
    """Everything a loss may look at; what is not used is never computed (under jit).

    Attributes:
      logits: [L, B, N, C+1] class scores of the object queries after each decoder layer; the last
        class means "no object" (DETR). [L, B, N, C], one sigmoid a class (Deformable DETR).
      boxes: [L, B, N, 4] (cx, cy, w, h) in [0, 1] of the image without its padding.
      auxiliary_logits: [L, B, M, C+1], or None without auxiliary queries.
      auxiliary_boxes: [L, B, M, 4], or None.
      encoder_attention: per encoder layer, the self-attention maps (``DeformableMaps`` for a
        deformable encoder).
      decoder_self_attention: per decoder layer, maps of the object queries.
      decoder_cross_attention: per decoder layer, maps of all queries (object queries first).
      memory: [B, S, d] encoder output.
      decoder_features: [L, B, N, d] decoder output of the object queries, after the final norm.
      memory_valid: bool [B, S], False for padding.
      proposal_logits: [1, B, S, C] class scores of the encoder's tokens (two stages), or None.
      proposal_boxes: [1, B, S, 4] their boxes, or None.
    """

    logits: Array
    boxes: Array
    auxiliary_logits: Array | None
    auxiliary_boxes: Array | None
    encoder_attention: tuple[AttentionMaps | DeformableMaps, ...]
    decoder_self_attention: tuple[AttentionMaps, ...]
    decoder_cross_attention: tuple[AttentionMaps | DeformableMaps, ...]
    memory: Array
    decoder_features: Array
    memory_valid: Array
    proposal_logits: Array | None = None
    proposal_boxes: Array | None = None


def split_queries(x: Array, count: int) -> tuple[Array, Array | None]:
    """[L, B, Q, ...] of all queries: that of the object queries, and of the others (or None)."""
    return x[:, :, :count], x[:, :, count:] if x.shape[2] > count else None
