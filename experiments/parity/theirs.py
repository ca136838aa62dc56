"""What transformers computes: every stage, loss terms and gradients, in either precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.loss.loss_deformable_detr import (
    DeformableDetrHungarianMatcher,
    DeformableDetrImageLoss,
)
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

from aqdetr_jax.models.config import DetrConfig
from experiments.parity import models as parity_models
from experiments.parity.cases import direction
from experiments.parity.store import Groups

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYER = ("loss_ce", "loss_bbox", "loss_giou")
DEFORMABLE_WEIGHTS = dict(zip(LAYER, (2.0, 5.0, 2.0), strict=True))
DETR_WEIGHTS = dict(zip(LAYER, (1.0, 5.0, 2.0), strict=True))


def compute(
    config: DetrConfig, given: dict[str, np.ndarray], dtype: torch.dtype = torch.float64
) -> Groups:
    """State, outputs, losses and gradients of transformers' model of a configuration.

    What stands at padded tokens is zeroed: nothing depends on it. Of every gradient the
    norm and the product with a fixed random direction is kept.

    Args:
      config: sizes.
      given: the batch.
      dtype: in double precision it is the truth, so that only the rounding of what is compared
        with it counts; in single precision it shows what rounding alone makes of a stage.
    """
    model = parity_models.build(config)
    state = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    model.to(dtype)
    seen = _watch(model)
    targets = targets_of(given, dtype)
    output = model(
        pixel_values=torch.from_numpy(normalized(given)).to(dtype),
        pixel_mask=torch.from_numpy(given["mask"].astype(np.int64)),
        labels=targets if config.family == "deformable" else None,
        output_attentions=True,
    )
    family = _detr if config.family == "detr" else _deformable
    stages, terms, total = family(model, output, seen, targets, config)
    total.backward()
    stages = {**seen, **_maps(output, config), **stages}
    return {
        "state": state,
        "output": _without_padding({k: v.detach().numpy() for k, v in stages.items()}),
        "loss": {k: v.detach().numpy() for k, v in {**terms, "total": total}.items()},
        "gradient": gradients(model),
    }


def normalized(given: dict[str, np.ndarray]) -> np.ndarray:
    """Network input [B, 3, H, W] in double precision, ImageNet's statistics, padding 0."""
    pixels = (given["images"] / 255.0 - np.array(MEAN)) / np.array(STD)
    return np.where(given["mask"][..., None], pixels, 0).transpose(0, 3, 1, 2).copy()


def targets_of(given: dict[str, np.ndarray], dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """The targets of each image."""
    return [
        {
            "boxes": torch.from_numpy(given["boxes"][i][given["valid"][i]]).to(dtype),
            "class_labels": torch.from_numpy(given["labels"][i][given["valid"][i]].astype("i8")),
        }
        for i in range(len(given["boxes"]))
    ]


def gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Of every gradient the norm and the product with a fixed random direction."""
    found = {}
    for key, value in model.named_parameters():
        if value.grad is not None:
            x = value.grad.numpy().astype(np.float64)
            found[key] = np.array([np.linalg.norm(x), np.sum(direction(key, x.shape) * x)])
    return found


def total_loss(
    losses: dict[str, torch.Tensor], weights: dict[str, float]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Terms under our names (those of all layers but the last are summed) and their weighted sum.

    Args:
      losses: ``loss_ce``, ... of the last layer, ``loss_ce_0``, ... of the others, ``loss_ce_enc``,
        ... of the proposals.
      weights: of ``loss_ce``, ``loss_bbox`` and ``loss_giou``.
    """
    terms = {}
    for key in LAYER:
        terms[key] = losses[key]
        layers = [v for k, v in losses.items() if k.removeprefix(f"{key}_").isdigit()]
        terms[f"aux_layers/{key}"] = torch.stack(layers).sum()
        if f"{key}_enc" in losses:
            terms[f"proposals/{key}"] = losses[f"{key}_enc"]
    return terms, sum(weights[key.rpartition("/")[2]] * value for key, value in terms.items())


def _watch(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A dict that the next forward pass fills with what only hooks can see."""
    seen: dict[str, torch.Tensor] = {}
    inner = model.model

    def keep(name: str, order: tuple[int, ...] | None = None):
        def hook(_module, _given, output):
            value = output[0] if isinstance(output, tuple) else output
            seen[name] = value if order is None else value.permute(order)

        return hook

    def before_encoder(_module, _given, named):
        seen["position"] = named["spatial_position_embeddings"]
        seen["valid"] = named["attention_mask"].bool()

    inner.encoder.register_forward_pre_hook(before_encoder, with_kwargs=True)
    for i, stage in enumerate(inner.backbone.model.encoder.stages):
        stage.register_forward_hook(keep(f"backbone_{i + 1}", (0, 2, 3, 1)))
    for part in ("encoder", "decoder"):
        for i, layer in enumerate(getattr(inner, part).layers):
            layer.register_forward_hook(keep(f"{part}_{i}"))
    return seen


def _detr(model, output, seen, targets, config: DetrConfig):
    """Auxiliary outputs and losses as the original has them: see ``parity_models.build``."""
    layers = torch.stack([seen[f"decoder_{i}"] for i in range(config.decoder_layers)])
    decoded = model.model.decoder.layernorm(layers)
    logits = model.class_labels_classifier(decoded)
    boxes = model.bbox_predictor(decoded).sigmoid()
    torch.testing.assert_close(logits[-1], output.logits)
    torch.testing.assert_close(boxes[-1], output.pred_boxes)
    # The matcher's weights and "no object"'s are the original's, as transformers' defaults are.
    matcher = HungarianMatcher(*DETR_WEIGHTS.values())
    criterion = ImageLoss(matcher, config.num_classes, 0.1, ["labels", "boxes"]).to(logits.dtype)
    layers = [{"logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True)]
    losses = criterion({**layers[-1], "auxiliary_outputs": layers[:-1]}, targets)
    stages = {"decoded": decoded, "logits": logits, "boxes": boxes}
    return stages, *total_loss(losses, DETR_WEIGHTS)


def _deformable(model, output, _seen, targets, config: DetrConfig):
    losses = dict(output.loss_dict)
    auxiliary = output.auxiliary_outputs
    stages = {
        "decoded": output.intermediate_hidden_states.transpose(0, 1),
        "logits": torch.stack([*(a["logits"] for a in auxiliary), output.logits]),
        "boxes": torch.stack([*(a["pred_boxes"] for a in auxiliary), output.pred_boxes]),
    }
    if config.deformable.two_stage:
        stages["proposal_logits"] = output.enc_outputs_class
        stages["proposal_boxes"] = output.enc_outputs_coord_logits.sigmoid()
        # As the original trains its proposals: every target is of the first class.
        first = [{**t, "class_labels": torch.zeros_like(t["class_labels"])} for t in targets]
        found = {"logits": stages["proposal_logits"], "pred_boxes": stages["proposal_boxes"]}
        matcher = DeformableDetrHungarianMatcher(*DEFORMABLE_WEIGHTS.values())
        criterion = DeformableDetrImageLoss(matcher, config.num_classes, 0.25, ["labels", "boxes"])
        losses |= {f"{key}_enc": value for key, value in criterion(found, first).items()}
    return stages, *total_loss(losses, DEFORMABLE_WEIGHTS)


def _maps(output: Any, config: DetrConfig) -> dict[str, torch.Tensor]:
    """Attention probabilities, [B, heads, queries, keys] or [..., levels * points]."""

    def heads_first(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(3).transpose(1, 2) if config.family == "deformable" else x

    maps = {}
    for i, x in enumerate(output.encoder_attentions):
        maps[f"encoder_weights_{i}"] = heads_first(x)
    for i, x in enumerate(output.cross_attentions):
        maps[f"cross_weights_{i}"] = heads_first(x)
    for i, x in enumerate(output.decoder_attentions):
        maps[f"self_weights_{i}"] = x
    return maps


def _without_padding(stages: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    valid = stages.pop("valid")
    for key, value in stages.items():
        if key.startswith("encoder_weights"):
            value = np.where(valid[:, None, :, None], value, 0)
        elif key.startswith("encoder") or key == "position":
            value = np.where(valid[..., None], value, 0)
        stages[key] = value.astype(np.float32)
    return {**stages, "valid": valid}
