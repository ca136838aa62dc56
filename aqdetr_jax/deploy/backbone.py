"""The deployed backbones: every convolution's sums go to the next grid, with no float between."""

from __future__ import annotations

from aqdetr_jax.deploy.network import Network
from aqdetr_jax.deploy.operations import Operations, Tensor
from aqdetr_jax.models.efficientnet_lite import STEM_STRIDE, EfficientNetLiteConfig
from aqdetr_jax.models.resnet import BackboneConfig


def stages(ops: Operations, network: Network, x: Tensor) -> list[Tensor]:
    """The maps of every stage, from the image's map."""
    config = network.config.backbone
    if isinstance(config, EfficientNetLiteConfig):
        return _efficientnet_lite(ops, network, config, x)
    return _resnet(ops, network, config, x)


def _added(
    ops: Operations, network: Network, path: str, branch: Tensor, identity: Tensor
) -> Tensor:
    """The sum of a block, each operand on its grid (``models.residual``)."""
    grids = (network.grids.get(f"{path}/{name}") for name in ("branch", "identity"))
    operands = (
        x if grid is None else ops.quantize(x, grid)
        for x, grid in zip((branch, identity), grids, strict=True)
    )
    return ops.add_maps(*operands)


def _resnet(ops: Operations, network: Network, c: BackboneConfig, x: Tensor) -> list[Tensor]:
    """``models.resnet.ResNet``."""
    x = ops.convolve(x, network.convolution("backbone/stem", c.stem_kernel, c.stem_stride))
    if c.stem_pool:
        x = ops.max_pool(x)
    x = ops.relu(x)
    found, dilation = [], 1
    for i, depth in enumerate(c.depths):
        for j in range(depth):
            x = _block(
                ops,
                network,
                f"backbone/layer{i + 1}_{j}",
                x,
                c.strides[i] if j == 0 else 1,
                dilation if j == 0 else c.dilations[i],
                bottleneck=c.block == "bottleneck",
            )
        dilation = c.dilations[i]
        found.append(x)
    return found


def _block(
    ops: Operations,
    network: Network,
    path: str,
    x: Tensor,
    stride: int,
    dilation: int,
    *,
    bottleneck: bool,
) -> Tensor:
    def convolve(y: Tensor, name: str, size: int, stride: int = 1, dilation: int = 1) -> Tensor:
        return ops.convolve(y, network.convolution(f"{path}/{name}", size, stride, dilation))

    if bottleneck:
        y = ops.relu(convolve(x, "conv1", 1))
        y = ops.relu(convolve(y, "conv2", 3, stride, dilation))
        y = convolve(y, "conv3", 1)
    else:
        y = ops.relu(convolve(x, "conv1", 3, stride, dilation))
        y = convolve(y, "conv2", 3, 1, dilation)
    if f"{path}/shortcut" in network.layers:
        x = convolve(x, "shortcut", 1, stride)
    return ops.relu(_added(ops, network, path, y, x))


def _efficientnet_lite(
    ops: Operations, network: Network, c: EfficientNetLiteConfig, x: Tensor
) -> list[Tensor]:
    """``models.efficientnet_lite.EfficientNetLite``."""

    def convolve(
        y: Tensor, path: str, size: int, stride: int, *, depthwise: bool = False
    ) -> Tensor:
        shape = ops.map_shape(y)
        return ops.convolve(y, network.same(path, shape, size, stride, depthwise=depthwise))

    x = ops.relu6(convolve(x, "backbone/stem", 3, STEM_STRIDE))
    found = []
    for block in c.blocks:
        path, y = f"backbone/{block.name}", x
        if block.layer.expansion > 1:
            y = ops.relu6(convolve(y, f"{path}/expand", 1, 1))
        size, stride = block.layer.kernel, block.stride
        y = ops.relu6(convolve(y, f"{path}/depthwise", size, stride, depthwise=True))
        y = convolve(y, f"{path}/project", 1, 1)
        x = _added(ops, network, path, y, x) if block.residual else y
        if block.ends_stage:
            found.append(x)
    return found
