"""One training step of transformers' own DETR on the device at hand: a row of steps.json.

python experiments/accelerator_theirs.py --family=detr --mode=compiled --out=FILE [--batch=8]
    [--dtype=bfloat16] [--lock=FILE] [--deadline=SECONDS] [--toy]

``DetrForObjectDetection`` or ``DeformableDetrForObjectDetection`` with a ResNet-50, random
parameters made from a configuration (nothing is downloaded), on random pixels that lie on the
device, seven boxes an image, all decoder layers in the loss: forward and backward under autocast,
gradient clipping, fused AdamW, TF32 allowed. Modes: "eager", or "compiled" (backbone and
transformer, by ``torch.compile``; if that fails, the row says why).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerator_rows import Device, add_row, timed_rounds, timing
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
)

LABELS = {i: str(i) for i in range(91)}


def model_of(family: str, toy: bool) -> torch.nn.Module:
    """The model with the official sizes, or a toy of it."""
    stages = ["stage4"] if family == "detr" else ["stage2", "stage3", "stage4"]
    depths = [1, 1, 1, 1] if toy else [3, 4, 6, 3]
    sizes = {"encoder_layers": 1, "decoder_layers": 2} if toy else {}
    kind, model = {
        "detr": (DetrConfig, DetrForObjectDetection),
        "deformable": (DeformableDetrConfig, DeformableDetrForObjectDetection),
    }[family]
    config = kind(
        backbone_config=ResNetConfig(depths=depths, out_features=stages),
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        auxiliary_loss=True,
        id2label=LABELS,
        label2id={name: i for i, name in LABELS.items()},
        **sizes,
    )
    torch.manual_seed(0)
    made = model(config)
    # transformers means to freeze the stem and the first stage as the original does, but looks for
    # timm's names, and so freezes the whole of its own ResNet.
    for name, parameter in made.named_parameters():
        if "backbone" in name and any(f"stages.{i}." in name for i in (1, 2, 3)):
            parameter.requires_grad_(True)
    return made


def inputs(batch: int, height: int, width: int, device: str) -> dict[str, Any]:
    """Random normalised pixels and targets."""
    make = torch.Generator().manual_seed(0)

    def target() -> dict[str, torch.Tensor]:
        centre, size = torch.rand(7, 2, generator=make), torch.rand(7, 2, generator=make)
        boxes = torch.cat([0.2 + 0.6 * centre, 0.05 + 0.35 * size], -1)
        return {
            "class_labels": torch.randint(91, (7,), generator=make).to(device),
            "boxes": boxes.to(device),
        }

    return {
        "pixel_values": torch.randn(batch, 3, height, width, generator=make).to(device),
        "pixel_mask": torch.ones(batch, height, width, dtype=torch.int64, device=device),
        "labels": [target() for _ in range(batch)],
    }


def training_step(
    model: torch.nn.Module, given: dict[str, Any], device: str, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """One step: loss, gradient, clipping, AdamW; returns the loss, on the device."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4, fused=device == "cuda")

    def step() -> torch.Tensor:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**given).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def main() -> None:
    """Compiles, waits for the device, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=("detr", "deformable"), required=True)
    parser.add_argument("--mode", choices=("eager", "compiled"), required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--label", default="", help="added to the row's name")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", required=True)
    parser.add_argument("--lock", default="runs/accelerator/device.lock")
    parser.add_argument("--deadline", type=float, default=600.0, help="seconds for compiling")
    parser.add_argument("--toy", action="store_true", help="a tiny model and image")
    options = parser.parse_args()
    name = f"{options.family}/theirs {options.mode}{options.label}"
    where = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    (height, width), batch = ((64, 96), 2) if options.toy else ((800, 1344), options.batch)
    row: dict[str, Any] = {
        "dtype": options.dtype,
        "batch": batch,
        "image": [height, width],
        "targets": 7,
        "mode": options.mode,
        "device": torch.cuda.get_device_name() if where == "cuda" else platform.machine(),
        "versions": {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in ("torch", "transformers")},
        },
    }

    def late() -> None:
        add_row(options.out, name, {**row, "failed": f"not compiled in {options.deadline:.0f} s"})

    def finish(loss: torch.Tensor) -> None:
        if where == "cuda":
            torch.cuda.synchronize()
        losses.append(loss)

    losses: list[torch.Tensor] = []
    device = Device(options.lock, options.deadline)
    try:
        with device.compiling(late):
            model = model_of(options.family, options.toy).to(where).train()
            row["trained_parameters"] = sum(
                p.numel() for p in model.parameters() if p.requires_grad
            )
            row["attention"] = model.config._attn_implementation
            given = inputs(batch, height, width, where)
            compiled = options.mode == "compiled"
            if compiled:
                # Backbone and transformer. The loss calls SciPy: compiled too, it breaks into
                # pieces that are compiled again and again.
                model.model.compile(dynamic=False)
            step = training_step(model, given, where, getattr(torch, options.dtype))
            start = time.perf_counter()
            if compiled:
                for _ in range(3):
                    finish(step())
            row["compile_seconds"] = round(time.perf_counter() - start, 1)
            if where == "cuda":
                torch.cuda.empty_cache()
        with device.alone():
            if where == "cuda":
                torch.cuda.reset_peak_memory_stats()
            row |= timing(timed_rounds(step, finish), batch)
            if where == "cuda":
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
    except Exception as error:  # whatever the compiler raises, the other rows go on
        row["failed"] = f"{type(error).__name__}: {str(error)[-600:]}"
        add_row(options.out, name, row)
        raise
    row["losses"] = [str(round(float(loss), 4)) for loss in losses]
    add_row(options.out, name, row)
    print(f"{name}: {row['median_seconds'] * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
