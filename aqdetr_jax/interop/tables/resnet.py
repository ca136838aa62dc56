"""ResNet names of torchvision, which timm has kept, and which detectors prefix."""

from __future__ import annotations

from aqdetr_jax.interop.names import Row, norm


def torch_resnet(prefix: str) -> tuple[Row, ...]:
    """A ResNet whose names begin with ``prefix``; s counts stages, b blocks, c convolutions."""
    block, ours = prefix + "layer{s}.{b}.", "backbone/layer{s}_{b}/"
    return (
        Row(prefix + "conv1.weight", "backbone/stem/kernel", "conv"),
        *norm(prefix + "bn1", "backbone/stem_norm"),
        Row(block + "conv{c}.weight", ours + "conv{c}/kernel", "conv"),
        *norm(block + "bn{c}", ours + "norm{c}"),
        Row(block + "downsample.0.weight", ours + "shortcut/kernel", "conv"),
        *norm(block + "downsample.1", ours + "shortcut_norm"),
    )


CLASSIFIER: tuple[Row, ...] = (Row("fc.weight", ""), Row("fc.bias", ""))
"""ImageNet's classifier, which a detector has no use for."""

TORCHVISION: tuple[Row, ...] = (*torch_resnet(""), *CLASSIFIER)
"""torchvision.models.resnet18, 34, 50, 101 and 152."""

TIMM: tuple[Row, ...] = (*torch_resnet(""), *CLASSIFIER)
"""timm's resnet18, 34, 50, 101 and 152 (their variants with a deep stem are other networks)."""
