"""The deployed ResNet: every convolution's sums go to the next grid, with no float between."""

from __future__ import annotations

from aqdetr_jax.deploy.network import Network
from aqdetr_jax.deploy.operations import Operations, Tensor


def stages(ops: Operations, network: Network, x: Tensor) -> list[Tensor]:
    """The maps of every stage (``models.resnet.ResNet``), from the image's map."""
    c = network.config.backbone
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
            )
        dilation = c.dilations[i]
        found.append(x)
    return found


def _block(
    ops: Operations, network: Network, path: str, x: Tensor, stride: int, dilation: int
) -> Tensor:
    def convolve(y: Tensor, name: str, size: int, stride: int = 1, dilation: int = 1) -> Tensor:
        return ops.convolve(y, network.convolution(f"{path}/{name}", size, stride, dilation))

    if network.config.backbone.block == "bottleneck":
        y = ops.relu(convolve(x, "conv1", 1))
        y = ops.relu(convolve(y, "conv2", 3, stride, dilation))
        y = convolve(y, "conv3", 1)
    else:
        y = ops.relu(convolve(x, "conv1", 3, stride, dilation))
        y = convolve(y, "conv2", 3, 1, dilation)
    if f"{path}/shortcut" in network.layers:
        x = convolve(x, "shortcut", 1, stride)
    branch, identity = (network.grids.get(f"{path}/{name}") for name in ("branch", "identity"))
    if branch is not None:
        y = ops.quantize(y, branch)
    if identity is not None:
        x = ops.quantize(x, identity)
    return ops.relu(ops.add_maps(y, x))
