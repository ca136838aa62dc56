"""The other side of a case: python -m outside.theirs CASE.

transformers' own models with random parameters made from a configuration (nothing is downloaded).
Needs torch and transformers, for inference onnxruntime too: what ``make test-parity`` installs.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

import torch
import transformers
from torch import nn

from outside.cases import BOXES, CASES, CLASSES, TINY_CLASSES, Case
from outside.worker import serve

THREADS = len(os.sched_getaffinity(0))


def full_size(family: str) -> nn.Module:
    """(Deformable) DETR with a ResNet-50, its stem and first stage frozen as in ours."""
    kind = {"detr": "Detr", "deformable": "DeformableDetr"}[family]
    stages = ["stage4"] if family == "detr" else ["stage2", "stage3", "stage4"]
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=transformers.ResNetConfig(out_features=stages),
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        num_labels=CLASSES,
        auxiliary_loss=True,
    )
    model = getattr(transformers, f"{kind}ForObjectDetection")(config)
    for name, parameter in model.named_parameters():
        if "backbone" in name:
            frozen = "embedder" in name or "stages.0." in name or "normalization" in name
            parameter.requires_grad_(not frozen)
    return model


def tiny() -> nn.Module:
    """DETR of the embedded set's sizes (``configs/shapes_base.py``); everything is trained."""
    backbone = transformers.ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 96],
        depths=[1, 2, 1],
        layer_type="basic",
        out_features=["stage3"],
    )
    config = transformers.DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        num_labels=TINY_CLASSES,
        auxiliary_loss=True,
        num_queries=25,
        d_model=144,
        encoder_layers=1,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        dropout=0.0,
    )
    model = transformers.DetrForObjectDetection(config)
    # Our stem (5x5, stride 4, no pooling) and our strides, which a configuration cannot ask for.
    [embedder] = [m for m in model.modules() if type(m).__name__ == "ResNetEmbeddings"]
    embedder.embedder.convolution = nn.Conv2d(3, 32, 5, stride=4, padding=2, bias=False)
    embedder.pooler = nn.Identity()
    [encoder] = [m for m in model.modules() if type(m).__name__ == "ResNetEncoder"]
    block = encoder.stages[2].layers[0]
    block.layer[0].convolution.stride = block.shortcut.convolution.stride = (1, 1)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def model_of(name: str) -> nn.Module:
    """The case's model."""
    torch.manual_seed(0)
    return tiny() if name == "tiny_step" else full_size(name.partition("_")[0])


def build_step(name: str, case: Case) -> Callable[[], object]:
    """Forward pass, loss, backward pass, clipping, AdamW."""
    model = model_of(name).train()
    classes = model.config.num_labels
    rows = []
    for _ in range(case.batch):
        boxes = torch.cat([0.2 + 0.6 * torch.rand(BOXES, 2), 0.05 + 0.35 * torch.rand(BOXES, 2)], 1)
        rows.append({"class_labels": torch.randint(classes, (BOXES,)), "boxes": boxes})
    pixels = torch.randn(case.batch, 3, case.height, case.width)
    mask = torch.ones(case.batch, case.height, case.width, dtype=torch.int64)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4, fused=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(pixel_values=pixels, pixel_mask=mask, labels=rows).loss.backward()
        nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()

    return run


class _Outputs(nn.Module):
    """Logits and boxes alone, for the export."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels, mask):
        """[B, 3, H, W] and [B, H, W] to logits and boxes."""
        output = self.model(pixel_values=pixels, pixel_mask=mask)
        return output.logits, output.pred_boxes


def build_inference(name: str, case: Case) -> Callable[[], object]:
    """The forward pass under ONNX Runtime, exported at the case's size."""
    import onnxruntime

    pixels = torch.randn(case.batch, 3, case.height, case.width)
    mask = torch.ones(case.batch, case.height, case.width, dtype=torch.int64)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
    # As for torch: a thread that waits by spinning takes the other side's core.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(
            _Outputs(model_of(name).eval()),
            (pixels, mask),
            path,
            dynamo=False,
            input_names=["pixels", "mask"],
        )
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {"pixels": pixels.numpy(), "mask": mask.numpy()}
    feed = {i.name: given[i.name] for i in session.get_inputs()}
    return lambda: session.run(None, feed)


def main() -> None:
    """Serves one case."""
    name = sys.argv[1]
    torch.set_num_threads(THREADS)
    build = build_step if name.endswith("_step") else build_inference
    packages = ("torch", "transformers", *(() if name.endswith("_step") else ("onnxruntime",)))
    versions = {"python": platform.python_version()}
    serve(
        lambda: build(name, CASES[name]),
        versions | {package: importlib.metadata.version(package) for package in packages},
    )


if __name__ == "__main__":
    main()
