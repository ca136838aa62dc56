"""timm's EfficientNet-Lite, and what it makes of an image (needs timm and torch).

A small one, all of its parameters and statistics random: Lite0 at a quarter of its widths and 0.4
of its depths. One image has an odd side and an even one, so that "SAME" padding is of both kinds.
"""

from __future__ import annotations

import numpy as np
import torch
from timm.models import efficientnet

from experiments.parity.cases import generator
from experiments.parity.lite_cases import IMAGE, SIZES
from experiments.parity.models import randomize
from experiments.parity.store import Groups
from experiments.parity.theirs import gradients


def build(width: float, depth: float) -> torch.nn.Module:
    """A feature extractor of timm's, random, for evaluation."""
    model = efficientnet._gen_efficientnet_lite(
        "tf_efficientnet_lite0",
        width,
        depth,
        features_only=True,
        # What the functions by the official names add.
        bn_eps=efficientnet.BN_EPS_TF_DEFAULT,
        pad_type="same",
    )
    randomize(model)
    with torch.no_grad():  # So large that ReLU6 has something to cut off.
        for name, value in model.named_parameters():
            if name.endswith("bn1.weight"):
                value.copy_((2.5 * value).half())
    return model.eval()


def compute() -> Groups:
    """State, stages, their weighted sum and its gradients, in double precision."""
    model = build(*SIZES).double()
    sixes: list[int] = []
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU6):
            module.inplace = False
            module.register_forward_hook(lambda m, x, y: sixes.append(int((y == 6).sum())))
    image = generator("image").normal(size=IMAGE)
    stages = model(torch.from_numpy(image.transpose(0, 3, 1, 2).copy()))
    stages = {f"stage_{i + 1}": x.permute(0, 2, 3, 1) for i, x in enumerate(stages)}
    total = sum(
        torch.sum(x * torch.from_numpy(generator(name).normal(size=tuple(x.shape))))
        for name, x in stages.items()
    )
    total.backward()
    return {
        "state": {
            name: value.detach().numpy()
            for name, value in model.state_dict().items()
            if value.is_floating_point()
        },
        "output": {name: x.detach().numpy().astype(np.float32) for name, x in stages.items()},
        "loss": {"total": total.detach().numpy(), "sixes": np.float64(sum(sixes))},
        "gradient": gradients(model),
    }
