"""Names of the original repositories: facebookresearch/detr, fundamentalvision/Deformable-DETR.

Both wrap torchvision's ResNet, and keep q, k and v of torch's attention in one matrix.
"""

from __future__ import annotations

from aqdetr_jax.interop.names import Row, layer, layers, scaled
from aqdetr_jax.interop.tables.resnet import torch_resnet

BACKBONE: tuple[Row, ...] = torch_resnet("backbone.0.body.")


def attention(name: str, path: str) -> tuple[Row, ...]:
    """A MultiheadAttention of torch."""
    packed = tuple(f"{path}/{part}_proj" for part in "qkv")
    return (
        Row(f"{name}.in_proj_weight", tuple(f"{part}/kernel" for part in packed), "dense"),
        Row(f"{name}.in_proj_bias", tuple(f"{part}/bias" for part in packed)),
        *layer(f"{name}.out_proj", f"{path}/out_proj"),
    )


def deformable_attention(name: str, path: str) -> tuple[Row, ...]:
    """MSDeformAttn."""
    parts = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    return layers(name, path, *parts)


_ENCODER, _OUR_ENCODER = "transformer.encoder.layers.{n}", "encoder/layer_{n}"
_DECODER, _OUR_DECODER = "transformer.decoder.layers.{n}", "decoder/layer_{n}"

DETR: tuple[Row, ...] = (
    *BACKBONE,
    *layer("input_proj", "input_proj", "conv"),
    Row("query_embed.weight", "query_embed"),
    *attention(_ENCODER + ".self_attn", _OUR_ENCODER + "/self_attention"),
    *scaled(_ENCODER + ".norm1", _OUR_ENCODER + "/norm1"),
    *layers(_ENCODER, _OUR_ENCODER + "/feed_forward", "linear1", "linear2"),
    *scaled(_ENCODER + ".norm2", _OUR_ENCODER + "/norm2"),
    *scaled("transformer.encoder.norm", "encoder/norm"),  # with --pre_norm only
    *attention(_DECODER + ".self_attn", _OUR_DECODER + "/self_attention"),
    *scaled(_DECODER + ".norm1", _OUR_DECODER + "/norm1"),
    *attention(_DECODER + ".multihead_attn", _OUR_DECODER + "/cross_attention"),
    *scaled(_DECODER + ".norm2", _OUR_DECODER + "/norm2"),
    *layers(_DECODER, _OUR_DECODER + "/feed_forward", "linear1", "linear2"),
    *scaled(_DECODER + ".norm3", _OUR_DECODER + "/norm3"),
    *scaled("transformer.decoder.norm", "decoder/norm"),
    *layer("class_embed", "class_head"),
    *layer("bbox_embed.layers.{k}", "box_head/layer_{k}"),
)
"""DETR, DC5 and ResNet-101 included."""

_DEFORMABLE: tuple[Row, ...] = (
    *BACKBONE,
    *layer("input_proj.{l}.0", "input_proj_{l}", "conv"),
    *scaled("input_proj.{l}.1", "input_norm_{l}"),
    Row("transformer.level_embed", "level_embed"),
    Row("query_embed.weight", "query_embed"),
    *layer("transformer.reference_points", "reference_points"),
    *deformable_attention(_ENCODER + ".self_attn", _OUR_ENCODER + "/self_attention"),
    *scaled(_ENCODER + ".norm1", _OUR_ENCODER + "/norm1"),
    *layers(_ENCODER, _OUR_ENCODER + "/feed_forward", "linear1", "linear2"),
    *scaled(_ENCODER + ".norm2", _OUR_ENCODER + "/norm2"),
    # Numbered in the order of their making, which is not that of their use.
    *attention(_DECODER + ".self_attn", _OUR_DECODER + "/self_attention"),
    *scaled(_DECODER + ".norm2", _OUR_DECODER + "/norm1"),
    *deformable_attention(_DECODER + ".cross_attn", _OUR_DECODER + "/cross_attention"),
    *scaled(_DECODER + ".norm1", _OUR_DECODER + "/norm2"),
    *layers(_DECODER, _OUR_DECODER + "/feed_forward", "linear1", "linear2"),
    *scaled(_DECODER + ".norm3", _OUR_DECODER + "/norm3"),
    *layer("transformer.enc_output", "proposal_proj"),
    *scaled("transformer.enc_output_norm", "proposal_norm"),
    *layer("transformer.pos_trans", "query_proj"),
    *scaled("transformer.pos_trans_norm", "query_norm"),
)

DEFORMABLE: tuple[Row, ...] = (
    *_DEFORMABLE,
    *layer("class_embed.{n}", "class_head_{n}"),
    *layer("bbox_embed.{n}.layers.{k}", "box_head_{n}/layer_{k}"),
    # Listed again where the decoder uses them: boxes always, classes with two stages.
    *layer("transformer.decoder.class_embed.{n}", "class_head_{n}"),
    *layer("transformer.decoder.bbox_embed.{n}.layers.{k}", "box_head_{n}/layer_{k}"),
)
"""Deformable DETR with box refinement, one or two stages: every layer has its own heads."""

DEFORMABLE_SHARED: tuple[Row, ...] = (
    *_DEFORMABLE,
    *layer("class_embed.{n}", "class_head"),
    *layer("bbox_embed.{n}.layers.{k}", "box_head/layer_{k}"),
)
"""Deformable DETR without refinement: one head for all layers, listed once a layer."""
