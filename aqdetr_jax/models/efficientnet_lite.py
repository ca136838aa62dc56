"""EfficientNet-Lite backbones (Google, 2020): ReLU6, no squeeze-excite, made for quantization.

EfficientNet (Tan and Le, 2019) without what integers are bad at: no squeeze-excite, ReLU6 for
swish, and stem and head that do not grow with the network. Its blocks are inverted residuals
(MobileNetV2): 1x1 to six times the width, a depthwise convolution, 1x1 back, and what comes out is
not rectified: maps have a sign.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from typing import ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from aqdetr_jax.models.layers import BatchNorm
from aqdetr_jax.models.quantized import QConv
from aqdetr_jax.models.residual import residual_sum
from aqdetr_jax.ops.activations import relu6
from aqdetr_jax.quant.policy import Policy

STEM_WIDTH, STEM_STRIDE = 32, 2


@dataclasses.dataclass(frozen=True)
class Layer:
    """Blocks of one width.

    Attributes:
      expansion: width inside a block over that of its input; 1 = no expanding convolution.
      kernel: size of the depthwise convolution.
      stride: of the first block.
      depth: blocks.
      width: channels of the output.
    """

    expansion: int
    kernel: int
    stride: int
    depth: int
    width: int


class Block(NamedTuple):
    """One block of a network.

    Attributes:
      name: of its module.
      layer: to which it belongs.
      stride: of its depthwise convolution.
      signed: its input can be negative.
      residual: its input is added to its output.
      ends_stage: its output is the last map of its resolution.
    """

    name: str
    layer: Layer
    stride: int
    signed: bool
    residual: bool
    ends_stage: bool


_LITE0 = (
    Layer(1, 3, 1, 1, 16),
    Layer(6, 3, 2, 2, 24),
    Layer(6, 5, 2, 2, 40),
    Layer(6, 3, 2, 3, 80),
    Layer(6, 5, 1, 3, 112),
    Layer(6, 5, 2, 4, 192),
    Layer(6, 3, 1, 1, 320),
)

VARIANTS: dict[str, tuple[float, float]] = {
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
    "efficientnet_lite3": (1.2, 1.4),
    "efficientnet_lite4": (1.4, 1.8),
}
"""(width, depth) of the official ones."""

NORM_EPS = 1e-3
"""What the official ones add to variances. Ours add another number, see ``interop.convert``."""

PIXEL_MEAN, PIXEL_STD = (127 / 255,) * 3, (128 / 255,) * 3
"""Of images in [0, 1], as the official ones were trained: ``(x - 127) / 128`` of bytes."""


@dataclasses.dataclass(frozen=True)
class EfficientNetLiteConfig:
    """An EfficientNet-Lite by its sizes.

    Attributes:
      kind: tells it from a ResNet.
      width: factor on the widths of Lite0.
      depth: factor on its depths; the first and the last layer have one block in all of them.
      stages: maps it has, of strides 2 to 2^stages; the layers after the last one are left out.
      norm: "frozen" (imported or pretrained) or "batch" (learning).
    """

    kind: Literal["efficientnet_lite"]
    width: float = 1.0
    depth: float = 1.0
    stages: int = 5
    norm: Literal["frozen", "batch"] = "frozen"

    signed: ClassVar[bool] = True
    """Whether its maps have a sign."""

    def __post_init__(self):
        if min(self.width, self.depth) <= 0:
            raise ValueError(
                f"backbone width and depth must be positive, got {self.width} and {self.depth}"
            )
        if not 1 <= self.stages <= 5:
            raise ValueError(f"backbone stages must be 1 to 5, got {self.stages}")

    @property
    def variant(self) -> str:
        """The official name, or one with the sizes."""
        for name, sizes in VARIANTS.items():
            if sizes == (self.width, self.depth):
                return name
        return f"efficientnet_lite_w{self.width:g}_d{self.depth:g}"

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Its layers, seven in five stages."""
        last, stage, found = len(_LITE0) - 1, 1, []
        for i, layer in enumerate(_LITE0):
            stage += layer.stride > 1
            if stage <= self.stages:
                depth = layer.depth if i in (0, last) else math.ceil(layer.depth * self.depth)
                width = _rounded(layer.width * self.width)
                found.append(dataclasses.replace(layer, width=width, depth=depth))
        return tuple(found)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Its blocks, in order."""
        found: list[Block] = []
        layers, width = self.layers, STEM_WIDTH
        for i, layer in enumerate(layers):
            shrinks_next = i + 1 == len(layers) or layers[i + 1].stride > 1
            for j in range(layer.depth):
                stride = layer.stride if j == 0 else 1
                residual = stride == 1 and width == layer.width
                ends = shrinks_next and j + 1 == layer.depth
                name = f"layer{i + 1}_{j}"
                found.append(Block(name, layer, stride, bool(found), residual, ends))
                width = layer.width
        return tuple(found)

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Input pixels per cell of each stage's map: 2, 4, 8, ..."""
        strides = itertools.accumulate((b.stride for b in self.blocks), operator.mul)
        pairs = zip(self.blocks, strides, strict=True)
        return tuple(STEM_STRIDE * stride for block, stride in pairs if block.ends_stage)

    @property
    def output_stride(self) -> int:
        """Input pixels per cell of the last feature map."""
        return self.stage_strides[-1]

    @property
    def output_channels(self) -> int:
        """Channels of the last feature map."""
        return self.layers[-1].width


def _rounded(width: float) -> int:
    """The multiple of 8 next to a width, but not a tenth less."""
    near = max(8, int(width + 4) // 8 * 8)
    return near + 8 if near < 0.9 * width else near


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite feature extractor.

    Attributes:
      config: sizes.
      policy: bits by module path.
      dtype: carrier dtype of the convolutions.
    """

    config: EfficientNetLiteConfig
    policy: Policy = Policy()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> tuple[Array, ...]:
        """Feature maps of strides 2, 4, 8, 16 and 32, as many as the configuration says.

        Args:
          images: normalised, [B, H, W, 3] float32; data, to which no gradient flows.
          train: a learning norm uses and updates batch statistics.

        Returns:
          One [B, H_i, W_i, C_i] array of the carrier dtype per stage, last one the coarsest.
        """
        c, frozen = self.config, self.config.norm == "frozen"
        x, steps = QConv(
            STEM_WIDTH,
            (3, 3),
            strides=STEM_STRIDE,
            padding="same",
            unsigned=False,
            constant_input=True,
            policy=self.policy,
            dtype=self.dtype,
            name="stem",
        ).with_steps(images)
        x = relu6(BatchNorm(frozen, name="stem_norm")(x, steps, train=train))
        stages = []
        for block in c.blocks:
            x = InvertedResidual(block, frozen, self.policy, self.dtype, name=block.name)(
                x, train=train
            )
            if block.ends_stage:
                stages.append(x)
        return tuple(stages)


class InvertedResidual(nn.Module):
    """1x1 to a larger width, depthwise, 1x1 back; plus the input where the shape is the same.

    Attributes:
      block: sizes.
      frozen: its norms are frozen.
      policy: bits by module path.
      dtype: carrier dtype of the convolutions.
    """

    block: Block
    frozen: bool = True
    policy: Policy = Policy()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """[B, H, W, C] -> [B, ceil(H/s), ceil(W/s), width]."""
        _, layer, strides, signed, residual, _ = self.block
        y = x
        if layer.expansion > 1:
            inner = layer.expansion * x.shape[-1]
            y = relu6(self._conv(y, inner, "expand", train, unsigned=not signed))
            signed = False
        y = self._conv(
            y,
            y.shape[-1],
            "depthwise",
            train,
            unsigned=not signed,
            kernel_size=(layer.kernel, layer.kernel),
            strides=strides,
            padding="same",
            depthwise=True,
            # As many weights make an output as read an input.
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal"),
        )
        y = self._conv(relu6(y), layer.width, "project", train, zero_scale=residual)
        if residual:
            y = residual_sum(self, self.policy, y, x, unsigned=not self.block.signed)
        return y

    def _conv(
        self, x, features, name, train, *, kernel_size=(1, 1), zero_scale=False, **options
    ) -> Array:
        """A convolution and its norm."""
        x, steps = QConv(
            features, kernel_size, self.policy, dtype=self.dtype, name=name, **options
        ).with_steps(x)
        zero_scale = zero_scale and not self.frozen
        norm = BatchNorm(self.frozen, zero_scale=zero_scale, name=f"{name}_norm")
        return norm(x, steps, train=train)
