"""What the original repositories' own code computes: facebookresearch/detr and Deformable-DETR.

Needs checkouts of facebookresearch/detr and fundamentalvision/Deformable-DETR. The compiled
operator of the latter is replaced by the formula that its authors test it with.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from experiments.parity.models import randomize
from experiments.parity.store import Groups
from experiments.parity.theirs import gradients, normalized, targets_of, total_loss

COMMON = {
    "lr_backbone": 1e-5,
    "masks": False,
    "position_embedding": "sine",
    "hidden_dim": 256,
    "nheads": 8,
    "enc_layers": 6,
    "dec_layers": 6,
    "dropout": 0.1,
    "aux_loss": True,
    "dataset_file": "coco",
    "set_cost_bbox": 5,
    "set_cost_giou": 2,
    "bbox_loss_coef": 5,
    "giou_loss_coef": 2,
    "backbone": "resnet50",
    "dilation": False,
}
DETR = {
    **COMMON,
    "dim_feedforward": 2048,
    "num_queries": 100,
    "pre_norm": False,
    "set_cost_class": 1,
    "eos_coef": 0.1,
}
DEFORMABLE = {
    **COMMON,
    "dim_feedforward": 1024,
    "num_queries": 300,
    "num_feature_levels": 4,
    "enc_n_points": 4,
    "dec_n_points": 4,
    "with_box_refine": False,
    "two_stage": False,
    "set_cost_class": 2,
    "cls_loss_coef": 2,
    "focal_alpha": 0.25,
}
"""The official options, as far as a model depends on them."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "detr_r50": ("detr", DETR),
    "detr_r50_dc5": ("detr", {**DETR, "dilation": True}),
    "detr_r101": ("detr", {**DETR, "backbone": "resnet101"}),
    "deformable_full": ("deformable", DEFORMABLE),
    "deformable_full_single_scale": ("deformable", {**DEFORMABLE, "num_feature_levels": 1}),
    "deformable_full_dc5": (
        "deformable",
        {**DEFORMABLE, "num_feature_levels": 1, "dilation": True},
    ),
    "deformable_full_refine": ("deformable", {**DEFORMABLE, "with_box_refine": True}),
    "deformable_full_two_stage": (
        "deformable",
        {**DEFORMABLE, "with_box_refine": True, "two_stage": True},
    ),
}


def build(name: str, checkout: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Model and criterion of a checkout, on torch's default device.

    Both repositories call their packages alike, so that those of another checkout are forgotten.
    """
    for module in [n for n in sys.modules if n.split(".")[0] in ("models", "util", "datasets")]:
        del sys.modules[module]
    sys.modules.setdefault(
        "MultiScaleDeformableAttention", types.ModuleType("MultiScaleDeformableAttention")
    )
    torchvision.__version__ = "1.0"  # they take "0.29" for 0.2
    sys.path.insert(0, str(checkout))
    try:
        models = importlib.import_module("models")
        # Else it downloads ImageNet's weights.
        importlib.import_module("models.backbone").is_main_process = lambda: False
        options = argparse.Namespace(**MODELS[name][1], device=torch.get_default_device())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old arguments to torchvision
            model, criterion, _ = models.build_model(options)
        if MODELS[name][0] == "deformable":
            _use_formula()
    finally:
        sys.path.remove(str(checkout))
    return model, criterion


def _use_formula() -> None:
    """The operator in plain torch, as the authors' own test has it."""
    formula = importlib.import_module(
        "models.ops.functions.ms_deform_attn_func"
    ).ms_deform_attn_core_pytorch

    class Operator:
        @staticmethod
        def apply(value, shapes, _starts, locations, weights, _step):
            return formula(value, shapes, locations, weights)

    importlib.import_module("models.ops.modules.ms_deform_attn").MSDeformAttnFunction = Operator


def compute(
    name: str, checkout: Path, given: dict[str, np.ndarray], dtype: torch.dtype = torch.float64
) -> Groups:
    """State, outputs, losses and gradients of one of ``MODELS``, with random parameters."""
    model, criterion = build(name, checkout)
    randomize(model)
    state = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    model.to(dtype).eval().requires_grad_()
    nested = importlib.import_module("util.misc").NestedTensor
    pixels = torch.from_numpy(normalized(given)).to(dtype)
    output = model(nested(pixels, torch.from_numpy(~given["mask"])))
    layers = [*output["aux_outputs"], output]
    stages = {
        "logits": torch.stack([x["pred_logits"] for x in layers]),
        "boxes": torch.stack([x["pred_boxes"] for x in layers]),
    }
    if "enc_outputs" in output:
        stages["proposal_logits"] = output["enc_outputs"]["pred_logits"]
        stages["proposal_boxes"] = output["enc_outputs"]["pred_boxes"]
    targets = [{"boxes": t["boxes"], "labels": t["class_labels"]} for t in targets_of(given, dtype)]
    losses = criterion.to(dtype)(output, targets)
    terms, total = total_loss(losses, criterion.weight_dict)
    total.backward()
    return {
        "state": state,
        "output": {k: v.detach().numpy().astype(np.float32) for k, v in stages.items()},
        "loss": {k: v.detach().numpy() for k, v in {**terms, "total": total}.items()},
        "gradient": gradients(model),
    }
