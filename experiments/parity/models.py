"""transformers' detectors built from our configurations, with random parameters (needs torch)."""

from __future__ import annotations

import copy

import numpy as np
import torch
import transformers

from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.resnet import BackboneConfig
from experiments.parity.cases import generator


def build(config: DetrConfig) -> torch.nn.Module:
    """The model that transformers makes of our configuration, for evaluation, all random."""
    c, deformable = config, config.deformable
    torch.manual_seed(0)
    shared = {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "num_queries": c.num_queries,
        "d_model": c.dim,
        "encoder_layers": c.encoder_layers,
        "decoder_layers": c.decoder_layers,
        "encoder_attention_heads": c.heads,
        "decoder_attention_heads": c.heads,
        "encoder_ffn_dim": c.ffn,
        "decoder_ffn_dim": c.ffn,
        "num_labels": c.num_classes,
        "attn_implementation": "eager",  # the others return no maps
    }
    if c.family == "detr":
        # Without its auxiliary losses: with them transformers feeds every decoder layer with the
        # *normed* output of the one before it, which the original does not.
        model = transformers.DetrForObjectDetection(
            transformers.DetrConfig(backbone_config=_resnet(c.backbone, 1), **shared)
        )
    else:
        stages = min(deformable.stages, deformable.levels)
        model = transformers.DeformableDetrForObjectDetection(
            transformers.DeformableDetrConfig(
                backbone_config=_resnet(c.backbone, stages),
                num_feature_levels=deformable.levels,
                encoder_n_points=deformable.points,
                decoder_n_points=deformable.points,
                with_box_refine=deformable.box_refine,
                two_stage=deformable.two_stage,
                two_stage_num_proposals=c.num_queries,
                auxiliary_loss=True,
                class_cost=2,
                bbox_cost=5,
                giou_cost=2,
                **shared,
            )
        )
        if deformable.box_refine:
            # The original has a class head for every layer here; transformers 5 ties them.
            heads = torch.nn.ModuleList(copy.deepcopy(head) for head in model.class_embed)
            model.class_embed = heads
            if deformable.two_stage:
                model.model.decoder.class_embed = heads
    _dilate(model, c.backbone)
    randomize(model)
    return model.eval().requires_grad_()


def _resnet(backbone: BackboneConfig, stages: int) -> transformers.ResNetConfig:
    """A ResNet that hands out its last stages."""
    expansion = 4 if backbone.block == "bottleneck" else 1
    count = len(backbone.depths)
    return transformers.ResNetConfig(
        embedding_size=backbone.stem_width,
        hidden_sizes=[expansion * width for width in backbone.widths],
        depths=list(backbone.depths),
        layer_type=backbone.block,
        out_features=[f"stage{i + 1}" for i in range(count - stages, count)],
    )


def _dilate(model: torch.nn.Module, backbone: BackboneConfig) -> None:
    """DC5 as torchvision's ``replace_stride_with_dilation``, for which transformers needs timm."""
    if backbone.block != "bottleneck":
        return
    before = 1
    for i, stage in enumerate(model.model.backbone.model.encoder.stages):
        stride = backbone.strides[i]
        for j, block in enumerate(stage.layers):
            convolution = block.layer[1].convolution
            dilation = backbone.dilations[i] if j else before
            convolution.dilation = convolution.padding = (dilation, dilation)
            if j == 0:
                convolution.stride = (stride, stride)
                if hasattr(block.shortcut, "convolution"):
                    block.shortcut.convolution.stride = (stride, stride)
        before = backbone.dilations[i]


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Every parameter and running statistic: zeros and ones of an initialiser hide swaps."""
    for name, value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        rng, shape = generator(name), tuple(value.shape)
        if not torch.is_floating_point(value):
            continue
        if "running_var" in name:
            new = rng.uniform(0.5, 2.0, shape)
        elif value.ndim == 1 and name.endswith(".weight"):  # of a norm
            new = 1 + 0.3 * rng.normal(size=shape)
        elif "sampling_offsets.bias" in name:
            new = rng.normal(0, 1.5, shape)  # in cells: between them, and past the edge
        elif "sampling_offsets.weight" in name:
            new = 0.3 * rng.normal(size=shape) / np.sqrt(shape[1])
        elif value.ndim > 1 and "query" not in name:
            new = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        elif value.ndim > 1:  # an embedding of queries
            new = rng.normal(size=shape)
        else:
            new = 0.3 * rng.normal(size=shape)
        # Numbers of half precision: recorded, they take half the place.
        value.copy_(torch.from_numpy(np.asarray(new, np.float16).astype(np.float32)))
