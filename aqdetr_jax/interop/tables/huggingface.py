"""Names of Hugging Face transformers.

Version 5 renamed what version 4 had; published files have the old names, a version 5 model in
memory the new ones, and version 5 reads both:

=============================  =================
version 4, and files           version 5
=============================  =================
``model.backbone.conv_encoder`` ``model.backbone``
``out_proj``                   ``o_proj``
``fc1``                        ``mlp.fc1``
=============================  =================

Both are read, and the old ones written, which every version loads. The backbone is transformers'
own ResNet, or timm's, whose names are torchvision's (those of the published detectors). The first
is written, which needs no timm; transformers builds DC5 with timm's only, for which
``TIMM_BACKBONE`` goes before the table.
"""

from __future__ import annotations

from aqdetr_jax.interop.names import Row, layer, layers, norm, scaled
from aqdetr_jax.interop.tables.resnet import torch_resnet

BACKBONES = ("model.backbone.conv_encoder.model.", "model.backbone.model.")
"""Where version 4 and version 5 keep the backbone."""


def resnet(prefix: str) -> tuple[Row, ...]:
    """Their own ResNet; s counts stages, b blocks, c convolutions, all from 0."""
    stem = prefix + "embedder.embedder."
    block, ours = prefix + "encoder.stages.{s}.layers.{b}.", "backbone/layer{s+1}_{b}/"
    return (
        Row(stem + "convolution.weight", "backbone/stem/kernel", "conv"),
        *norm(stem + "normalization", "backbone/stem_norm"),
        Row(block + "layer.{c}.convolution.weight", ours + "conv{c+1}/kernel", "conv"),
        *norm(block + "layer.{c}.normalization", ours + "norm{c+1}"),
        Row(block + "shortcut.convolution.weight", ours + "shortcut/kernel", "conv"),
        *norm(block + "shortcut.normalization", ours + "shortcut_norm"),
    )


RESNET_BACKBONE: tuple[Row, ...] = tuple(row for prefix in BACKBONES for row in resnet(prefix))
TIMM_BACKBONE: tuple[Row, ...] = tuple(row for prefix in BACKBONES for row in torch_resnet(prefix))


def attention(name: str, path: str) -> tuple[Row, ...]:
    """An attention with q, k and v apart."""
    return (
        *layers(name, path, "q_proj", "k_proj", "v_proj"),
        *layer(f"{name}.out_proj", f"{path}/out_proj"),
        *layer(f"{name}.o_proj", f"{path}/out_proj"),
    )


def deformable_attention(name: str, path: str) -> tuple[Row, ...]:
    """A deformable attention."""
    parts = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    return layers(name, path, *parts)


def feed_forward(name: str, path: str) -> tuple[Row, ...]:
    """The feed-forward network of layer ``name``."""
    return (
        *layer(name + ".fc1", path + "/feed_forward/linear1"),
        *layer(name + ".fc2", path + "/feed_forward/linear2"),
        *layer(name + ".mlp.fc1", path + "/feed_forward/linear1"),
        *layer(name + ".mlp.fc2", path + "/feed_forward/linear2"),
    )


def transformer(encoder_attention, cross_attention) -> tuple[Row, ...]:
    """Both stacks of layers, by the attention over the image that they use."""
    encoder, our_encoder = "model.encoder.layers.{n}", "encoder/layer_{n}"
    decoder, our_decoder = "model.decoder.layers.{n}", "decoder/layer_{n}"
    return (
        *encoder_attention(encoder + ".self_attn", our_encoder + "/self_attention"),
        *scaled(encoder + ".self_attn_layer_norm", our_encoder + "/norm1"),
        *feed_forward(encoder, our_encoder),
        *scaled(encoder + ".final_layer_norm", our_encoder + "/norm2"),
        *attention(decoder + ".self_attn", our_decoder + "/self_attention"),
        *scaled(decoder + ".self_attn_layer_norm", our_decoder + "/norm1"),
        *cross_attention(decoder + ".encoder_attn", our_decoder + "/cross_attention"),
        *scaled(decoder + ".encoder_attn_layer_norm", our_decoder + "/norm2"),
        *feed_forward(decoder, our_decoder),
        *scaled(decoder + ".final_layer_norm", our_decoder + "/norm3"),
    )


DETR: tuple[Row, ...] = (
    *RESNET_BACKBONE,
    *TIMM_BACKBONE,
    *layer("model.input_projection", "input_proj", "conv"),
    Row("model.query_position_embeddings.weight", "query_embed"),
    *transformer(attention, attention),
    *scaled("model.decoder.layernorm", "decoder/norm"),
    *layer("class_labels_classifier", "class_head"),
    *layer("bbox_predictor.layers.{k}", "box_head/layer_{k}"),
)
"""DetrForObjectDetection."""

_DEFORMABLE: tuple[Row, ...] = (
    *RESNET_BACKBONE,
    *TIMM_BACKBONE,
    *layer("model.input_proj.{l}.0", "input_proj_{l}", "conv"),
    *scaled("model.input_proj.{l}.1", "input_norm_{l}"),
    Row("model.level_embed", "level_embed"),
    Row("model.query_position_embeddings.weight", "query_embed"),
    *layer("model.reference_points", "reference_points"),
    *transformer(deformable_attention, deformable_attention),
    *layer("model.enc_output", "proposal_proj"),
    *scaled("model.enc_output_norm", "proposal_norm"),
    *layer("model.pos_trans", "query_proj"),
    *scaled("model.pos_trans_norm", "query_norm"),
)

DEFORMABLE: tuple[Row, ...] = (
    *_DEFORMABLE,
    *layer("class_embed.{n}", "class_head_{n}"),
    *layer("bbox_embed.{n}.layers.{k}", "box_head_{n}/layer_{k}"),
    # Listed again where the decoder uses them: boxes always, classes with two stages.
    *layer("model.decoder.class_embed.{n}", "class_head_{n}"),
    *layer("model.decoder.bbox_embed.{n}.layers.{k}", "box_head_{n}/layer_{k}"),
)
"""DeformableDetrForObjectDetection with box refinement: every layer has its own heads."""

DEFORMABLE_SHARED: tuple[Row, ...] = (
    *_DEFORMABLE,
    *layer("class_embed.{n}", "class_head"),
    *layer("bbox_embed.{n}.layers.{k}", "box_head/layer_{k}"),
)
"""The same without refinement: one head for all layers, which may be listed once a layer."""
