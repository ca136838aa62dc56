"""EfficientNet-Lite names: timm's, and those of efficientnet-lite-pytorch.

timm counts layers and their blocks, from 0; the other one counts blocks through the network, so
that its numbers are those of Lite0.
"""

from __future__ import annotations

from aqdetr_jax.interop.names import Row, norm
from aqdetr_jax.models.efficientnet_lite import EfficientNetLiteConfig


def convolution(conv: str, bn: str, path: str) -> tuple[Row, ...]:
    """Rows of a convolution without bias and of its norm."""
    return (Row(f"{conv}.weight", f"{path}/kernel", "conv"), *norm(bn, f"{path}_norm"))


_FIRST, _OUR_FIRST = "blocks.0.{b}", "backbone/layer1_{b}"
_BLOCK, _OUR_BLOCK = "blocks.{s}.{b}", "backbone/layer{s+1}_{b}"

TIMM: tuple[Row, ...] = (
    *convolution("conv_stem", "bn1", "backbone/stem"),
    # The first layer has no expanding convolution, and other names for the two that are left.
    *convolution(f"{_FIRST}.conv_dw", f"{_FIRST}.bn1", f"{_OUR_FIRST}/depthwise"),
    *convolution(f"{_FIRST}.conv_pw", f"{_FIRST}.bn2", f"{_OUR_FIRST}/project"),
    *convolution(f"{_BLOCK}.conv_pw", f"{_BLOCK}.bn1", f"{_OUR_BLOCK}/expand"),
    *convolution(f"{_BLOCK}.conv_dw", f"{_BLOCK}.bn2", f"{_OUR_BLOCK}/depthwise"),
    *convolution(f"{_BLOCK}.conv_pwl", f"{_BLOCK}.bn3", f"{_OUR_BLOCK}/project"),
    Row("conv_head.weight", ""),
    *(row._replace(path="") for row in norm("bn2", "")),
    Row("classifier.weight", ""),
    Row("classifier.bias", ""),
)
"""tf_efficientnet_lite0 to 4."""


def _blocks() -> tuple[Row, ...]:
    layers = EfficientNetLiteConfig("efficientnet_lite").layers
    places = [(i + 1, j) for i, layer in enumerate(layers) for j in range(layer.depth)]
    rows: list[Row] = []
    for number, (layer, block) in enumerate(places):
        theirs, ours = f"_blocks.{number}", f"backbone/layer{layer}_{block}"
        if layer > 1:
            rows += convolution(f"{theirs}._expand_conv", f"{theirs}._bn0", f"{ours}/expand")
        rows += convolution(f"{theirs}._depthwise_conv", f"{theirs}._bn1", f"{ours}/depthwise")
        rows += convolution(f"{theirs}._project_conv", f"{theirs}._bn2", f"{ours}/project")
    return tuple(rows)


PYTORCH: tuple[Row, ...] = (
    *convolution("_conv_stem", "_bn0", "backbone/stem"),
    *_blocks(),
    Row("_conv_head.weight", ""),
    *(row._replace(path="") for row in norm("_bn1", "")),
    Row("_fc.weight", ""),
    Row("_fc.bias", ""),
)
"""efficientnet-lite0 of efficientnet-lite-pytorch."""
