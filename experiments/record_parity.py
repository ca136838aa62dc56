"""Records what Hugging Face transformers computes, for tests that must not need torch.

python experiments/record_parity.py [--out=tests/fixtures] [--only=deformable_plain,...]

Needs the extra "parity" (torch and transformers, gigabytes). Every fixture is a tiny random model,
all of its parameters and running statistics randomised, with one batch of two images of unequal
size: foreign state dict, inputs, and in double precision the outputs of every stage, loss terms,
and of every gradient its norm and its product with a fixed random direction. Loss weights are the
official ones.
"""

from __future__ import annotations

import argparse
import copy
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig
from transformers.loss.loss_deformable_detr import (
    DeformableDetrHungarianMatcher,
    DeformableDetrImageLoss,
)

BUCKET = (96, 128)
SIZES = ((96, 128), (60, 90))
CLASSES, QUERIES = 5, 7
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "deformable_plain": {},
    "deformable_single_scale": {"num_feature_levels": 1},
    "deformable_refine": {"with_box_refine": True},
    "deformable_two_stage": {
        "with_box_refine": True,
        "two_stage": True,
        "two_stage_num_proposals": QUERIES,
    },
}


def deformable(**changes: Any) -> DeformableDetrForObjectDetection:
    """A tiny Deformable DETR."""
    levels = changes.get("num_feature_levels", 4)
    stages = ["stage2", "stage3", "stage4"] if levels > 1 else ["stage4"]
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 2, 1], out_features=stages
    )
    config = DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        num_queries=QUERIES,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        encoder_n_points=2,
        decoder_n_points=2,
        num_labels=CLASSES,
        auxiliary_loss=True,
        attn_implementation="eager",  # the others return no maps
        class_cost=int(WEIGHTS["loss_ce"]),
        bbox_cost=int(WEIGHTS["loss_bbox"]),
        giou_cost=int(WEIGHTS["loss_giou"]),
        **changes,
    )
    model = DeformableDetrForObjectDetection(config).eval().requires_grad_()
    if config.with_box_refine:
        # The original has a class head of its own for every layer here; transformers 5 ties them.
        heads = torch.nn.ModuleList(copy.deepcopy(head) for head in model.class_embed)
        model.class_embed = heads
        if config.two_stage:
            model.model.decoder.class_embed = heads
    return model


def generator(name: str) -> np.random.Generator:
    """Randomness by name, so that nothing depends on an order."""
    return np.random.default_rng(zlib.crc32(name.encode()))


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Every parameter and running statistic: zeros and ones of an initialiser hide swaps."""
    for name, value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        rng, shape = generator(name), tuple(value.shape)
        if not torch.is_floating_point(value):
            continue
        if "running_var" in name:
            new = rng.uniform(0.5, 2.0, shape)
        elif value.ndim == 1 and ("norm" in name or ".1.weight" in name) and "weight" in name:
            new = 1 + 0.3 * rng.normal(size=shape)
        elif "sampling_offsets.bias" in name:
            new = rng.normal(0, 1.5, shape)  # in cells: between them, and past the edge
        elif "sampling_offsets.weight" in name:
            new = 0.3 * rng.normal(size=shape) / np.sqrt(shape[1])
        elif value.ndim > 1 and "embed" not in name.split(".")[-2]:
            new = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        elif value.ndim > 1:
            new = rng.normal(size=shape)
        else:
            new = 0.3 * rng.normal(size=shape)
        value.copy_(torch.from_numpy(np.asarray(new, np.float32)))


def batch() -> dict[str, np.ndarray]:
    """Two images of unequal size in one bucket, with two and three targets."""
    rng = np.random.default_rng(7)
    images = np.zeros((2, *BUCKET, 3), np.uint8)
    mask = np.zeros((2, *BUCKET), bool)
    for i, (height, width) in enumerate(SIZES):
        # Smooth: sampling between unlike neighbours would multiply rounding errors.
        coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        images[i, :height, :width] = np.asarray(image)
        mask[i, :height, :width] = True
    boxes = rng.uniform(0.2, 0.5, (2, 3, 4)).astype(np.float32)
    labels = rng.integers(0, CLASSES, (2, 3)).astype(np.int32)
    valid = np.array([[True, True, False], [True, True, True]])
    return {"images": images, "mask": mask, "boxes": boxes, "labels": labels, "valid": valid}


def record(name: str, changes: dict[str, Any]) -> dict[str, np.ndarray]:
    """All arrays of one fixture."""
    torch.manual_seed(0)
    model = deformable(**changes)
    randomize(model)
    state = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    model.double()  # what is recorded is the truth; only the reader's rounding counts
    given = batch()
    pixels = (given["images"] / 255.0 - np.array(MEAN)) / np.array(STD)
    pixels = np.where(given["mask"][..., None], pixels, 0)
    targets = [
        {
            "boxes": torch.from_numpy(given["boxes"][i][given["valid"][i]].astype("f8")),
            "class_labels": torch.from_numpy(given["labels"][i][given["valid"][i]].astype("i8")),
        }
        for i in range(2)
    ]
    output = model(
        pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
        pixel_mask=torch.from_numpy(given["mask"].astype(np.int64)),
        labels=targets,
        output_attentions=True,
    )
    criterion = DeformableDetrImageLoss(
        DeformableDetrHungarianMatcher(*(WEIGHTS[k] for k in WEIGHTS)),
        CLASSES,
        0.25,
        ["labels", "boxes"],
    )
    terms = {k: v for k, v in output.loss_dict.items() if k.startswith("loss")}
    if output.enc_outputs_class is not None:
        # As the original trains its proposals: every target is of the first class.
        first = [{**t, "class_labels": torch.zeros_like(t["class_labels"])} for t in targets]
        found = {
            "logits": output.enc_outputs_class,
            "pred_boxes": output.enc_outputs_coord_logits.sigmoid(),
        }
        terms |= {f"{k}_enc": v for k, v in criterion(found, first).items()}
    total = sum(WEIGHTS["_".join(k.split("_")[:2])] * v for k, v in terms.items())
    model.zero_grad()
    total.backward()

    auxiliary = output.auxiliary_outputs
    stages = {
        "logits": torch.stack([*(a["logits"] for a in auxiliary), output.logits]),
        "boxes": torch.stack([*(a["pred_boxes"] for a in auxiliary), output.pred_boxes]),
        "memory": output.encoder_last_hidden_state,
        "decoded": output.intermediate_hidden_states.transpose(0, 1),
        **{f"encoder_weights_{i}": a for i, a in enumerate(output.encoder_attentions)},
        **{f"cross_weights_{i}": a for i, a in enumerate(output.cross_attentions)},
        **{f"self_weights_{i}": a for i, a in enumerate(output.decoder_attentions)},
    }
    if output.enc_outputs_class is not None:
        stages["proposal_logits"] = output.enc_outputs_class
        stages["proposal_boxes"] = output.enc_outputs_coord_logits.sigmoid()
    arrays = {f"input/{k}": v for k, v in given.items()}
    arrays |= {f"state/{k}": v for k, v in state.items()}
    arrays |= {f"output/{k}": v.detach().numpy().astype("f4") for k, v in stages.items()}
    arrays |= {f"loss/{k}": v.detach().numpy() for k, v in terms.items()}
    arrays["loss/total"] = total.detach().numpy()
    for key, value in model.named_parameters():
        gradient = value.grad.numpy().astype("f8") if value.grad is not None else None
        if gradient is not None:
            direction = generator(f"direction {key}").normal(size=gradient.shape)
            arrays[f"gradient/{key}"] = np.array(
                [np.linalg.norm(gradient), np.sum(direction * gradient)]
            )
    arrays["about/versions"] = np.array(
        [f"torch {torch.__version__}", f"transformers {transformers.__version__}", name]
    )
    return arrays


def main() -> None:
    """Writes the fixtures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="tests/fixtures")
    parser.add_argument("--only", default=",".join(VARIANTS))
    options = parser.parse_args(sys.argv[1:])
    torch.set_num_threads(1)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.only.split(","):
        arrays = record(name, VARIANTS[name])
        path = folder / f"{name}.npz"
        np.savez_compressed(path, **arrays)
        print(f"{path}: {len(arrays)} arrays, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
