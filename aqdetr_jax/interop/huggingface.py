"""Our configuration in the words of Hugging Face transformers, and what these have no word for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aqdetr_jax.checkpoint.model_folder import InputRule
from aqdetr_jax.interop.backbones import DEPTHS
from aqdetr_jax.interop.names import Row
from aqdetr_jax.interop.tables import TABLES, huggingface
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.resnet import BackboneConfig

MODEL_TYPES = {
    # family: (model type, model class, image processor)
    "detr": ("detr", "DetrForObjectDetection", "DetrImageProcessor"),
    "deformable": (
        "deformable_detr",
        "DeformableDetrForObjectDetection",
        "DeformableDetrImageProcessor",
    ),
}

NORM_GROUPS = 32
TIMM_WIDTHS = (64, 128, 256, 512)
TIMM_STAGES = 3
"""Stages of timm's backbone that transformers hands to a Deformable DETR of several levels."""


def unsupported(config: DetrConfig) -> list[str]:
    """What transformers cannot express, one text ``key=value (what it has)`` each."""
    backbone = config.backbone
    found = []

    def need(key: str, value: Any, wanted: Any, why: str) -> None:
        if value != wanted:
            found.append(f"model.{key}={value!r} ({why})")

    if not isinstance(backbone, BackboneConfig):
        return [f"model.backbone.kind={backbone.kind!r} (its detectors are built on ResNets here)"]
    need("pre_norm", config.pre_norm, False, "it norms after each sub-layer")
    for key, wanted in (("stem_kernel", 7), ("stem_stride", 2), ("stem_pool", True)):
        need(f"backbone.{key}", getattr(backbone, key), wanted, f"its ResNets have {wanted!r}")
    plain, dilated = _strides(backbone)
    if backbone.strides == dilated[0] and backbone.dilations == dilated[1]:
        if timm_name(backbone) is None:
            known = ", ".join(name for (block, _), name in DEPTHS.items() if block == "bottleneck")
            found.append(
                f"model.backbone.dilations={backbone.dilations!r} (it dilates only timm's "
                f"backbones: {known})"
            )
        elif config.family == "deformable" and config.deformable.levels > 1:
            used = min(config.deformable.stages, config.deformable.levels)
            need("deformable.stages", used, TIMM_STAGES, "of a dilated backbone it uses three")
    else:
        need("backbone.strides", backbone.strides, plain[0], f"its ResNets have {plain[0]!r}")
        need("backbone.dilations", backbone.dilations, plain[1], "only the last stage may dilate")
    if config.family == "deformable":
        groups = config.deformable.norm_groups
        need("deformable.norm_groups", groups, NORM_GROUPS, f"it has {NORM_GROUPS}")
    return found


def _strides(backbone: BackboneConfig) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """(strides, dilations) of an ordinary ResNet, and of one whose last stage is dilated (DC5)."""
    more = len(backbone.strides) - 1
    return ((1,) + (2,) * more, (1,) * (more + 1)), (
        (1,) + (2,) * (more - 1) + (1,),
        (1,) * more + (2,),
    )


def timm_name(backbone: BackboneConfig) -> str | None:
    """The name in timm of a ResNet of bottleneck blocks, None = it has no such one.

    Basic blocks are left out: timm dilates both convolutions of a stage's first block unlike.
    """
    sizes = (backbone.block, backbone.widths, backbone.stem_width)
    if sizes != ("bottleneck", TIMM_WIDTHS, 64):
        return None
    return DEPTHS.get((backbone.block, backbone.depths))


def is_dilated(config: DetrConfig) -> bool:
    """Whether the backbone is DC5's, for which transformers needs timm."""
    return max(_resnet(config).dilations) > 1


def _resnet(config: DetrConfig) -> BackboneConfig:
    assert isinstance(config.backbone, BackboneConfig)  # see ``unsupported``
    return config.backbone


def naming(config: DetrConfig) -> tuple[Row, ...]:
    """The table of the names that are written."""
    table = "huggingface_detr"
    if config.family == "deformable":
        table = "huggingface_deformable" + ("" if config.deformable.box_refine else "_shared")
    rows = TABLES[table]
    return (*huggingface.TIMM_BACKBONE, *rows) if is_dilated(config) else rows


def with_copies(names: Sequence[str], config: DetrConfig) -> list[str]:
    """The names of a state dict, those included under which heads are listed again.

    transformers ties them when it loads a file without them; with them in the file nothing
    depends on how a version ties, and the names say whether there is box refinement.

    Args:
      names: every parameter's first name.
      config: the model.
    """
    copies = []
    options = config.deformable
    if config.family == "deformable" and options.box_refine:
        again = ("bbox_embed.", *(("class_embed.",) if options.two_stage else ()))
        copies = [f"model.decoder.{name}" for name in names if name.startswith(again)]
    elif config.family == "deformable":
        copies = [
            name.replace(".0.", f".{layer}.", 1)
            for layer in range(1, config.decoder_layers)
            for name in names
            if name.startswith(("bbox_embed.0.", "class_embed.0."))
        ]
    return [*names, *copies]


def config_json(config: DetrConfig, class_names: Sequence[str]) -> dict[str, Any]:
    """The ``config.json`` of transformers.

    Args:
      config: a model without anything ``unsupported``.
      class_names: one name for each of its classes.
    """
    model_type, architecture, _ = MODEL_TYPES[config.family]
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **_backbone(config),
        "num_channels": 3,
        "position_embedding_type": "sine",
        "num_queries": config.num_queries,
        "d_model": config.dim,
        "encoder_layers": config.encoder_layers,
        "encoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.ffn,
        "decoder_layers": config.decoder_layers,
        "decoder_attention_heads": config.heads,
        "decoder_ffn_dim": config.ffn,
        "activation_function": "relu",
        # All three are our one rate, for who trains on.
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
        "activation_dropout": config.dropout,
        # With it transformers' DETR is another function: see docs/parity.md.
        "auxiliary_loss": False,
        **(_deformable(config) if config.family == "deformable" else {}),
        "id2label": {str(number): name for number, name in enumerate(class_names)},
        "label2id": {name: number for number, name in enumerate(class_names)},
    }


def _deformable(config: DetrConfig) -> dict[str, Any]:
    options = config.deformable
    return {
        "num_feature_levels": options.levels,
        "encoder_n_points": options.points,
        "decoder_n_points": options.points,
        "with_box_refine": options.box_refine,
        "two_stage": options.two_stage,
        "two_stage_num_proposals": config.num_queries,
    }


def _backbone(config: DetrConfig) -> dict[str, Any]:
    """The ResNet of transformers itself, which needs no timm; timm's where it must be dilated."""
    backbone, options = _resnet(config), config.deformable
    if is_dilated(config):
        return {
            "use_timm_backbone": True,
            "backbone": timm_name(backbone),
            "backbone_config": None,
            "use_pretrained_backbone": False,
            "dilation": True,
        }
    count = len(backbone.depths)
    used = min(options.stages, options.levels, count) if config.family == "deformable" else 1
    expansion = 4 if backbone.block == "bottleneck" else 1
    return {
        "use_timm_backbone": False,
        "backbone": None,
        "backbone_config": {
            "model_type": "resnet",
            "layer_type": backbone.block,
            "depths": list(backbone.depths),
            "embedding_size": backbone.stem_width,
            "hidden_sizes": [expansion * width for width in backbone.widths],
            "hidden_act": "relu",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": False,
            "num_channels": 3,
            "out_features": [f"stage{number + 1}" for number in range(count - used, count)],
        },
        "use_pretrained_backbone": False,
        "dilation": False,
    }


def preprocessor_json(config: DetrConfig, rule: InputRule) -> tuple[Mapping[str, Any], list[str]]:
    """The ``preprocessor_config.json`` of transformers, and notes on what it does not say."""
    notes = [
        "transformers pads to the largest image of a batch, here images are padded to one of "
        f"{len(rule.buckets)} sizes"
    ]
    longest = rule.max_size or max(side for bucket in rule.buckets for side in bucket)
    content = {
        "image_processor_type": MODEL_TYPES[config.family][2],
        "format": "coco_detection",
        "do_convert_annotations": True,
        "do_resize": rule.short_side is not None,
        "resample": 2,  # Pillow's number of its bilinear filter
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.pixel_mean),
        "image_std": list(config.pixel_std),
        "do_pad": True,
    }
    if rule.short_side is None:
        notes.append("images keep their size; those beyond the padded sizes are shrunk only here")
    else:
        content["size"] = {"shortest_edge": rule.short_side, "longest_edge": longest}
        if rule.max_size is None:
            notes.append(f"the long side is limited to {longest}, the largest padded one")
    return content, notes
