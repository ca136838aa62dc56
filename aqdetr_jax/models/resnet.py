"""ResNet backbones (He et al., 2016; torchvision's v1.5 layout) with quantized convolutions."""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from aqdetr_jax.models.layers import FLOAT, BatchNorm
from aqdetr_jax.models.quantized import QConv, activation_quantizer, module_path
from aqdetr_jax.ops.activations import relu
from aqdetr_jax.ops.pooling import max_pool
from aqdetr_jax.quant import lsq
from aqdetr_jax.quant.policy import Policy
from aqdetr_jax.quant.record import OpRecord, record
from aqdetr_jax.quant.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """A ResNet by its sizes.

    Attributes:
      block: "basic" (ResNet-18/34) or "bottleneck" (50/101).
      depths: blocks of each stage.
      widths: width of each stage's 3x3 convolutions (a bottleneck stage outputs 4x).
      strides: stride of each stage's first block.
      dilations: dilation of each stage; as in torchvision, the first block of a stage keeps the
        previous stage's dilation (DC5 is built this way: stride 1, dilation 2 in the last stage).
      stem_width: channels of the stem.
      stem_kernel: kernel size of the stem convolution.
      stem_stride: its stride.
      stem_pool: 3x3 stride-2 max pooling after the stem.
      norm: "frozen" as in DETR (imported or pretrained backbones) or "batch" (learning; for
        training from scratch).
    """

    block: Literal["basic", "bottleneck"] = "bottleneck"
    depths: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    dilations: tuple[int, ...] = (1, 1, 1, 1)
    stem_width: int = 64
    stem_kernel: int = 7
    stem_stride: int = 2
    stem_pool: bool = True
    norm: Literal["frozen", "batch"] = "frozen"

    def __post_init__(self):
        lengths = {len(x) for x in (self.depths, self.widths, self.strides, self.dilations)}
        if len(lengths) != 1:
            raise ValueError(
                "backbone depths, widths, strides and dilations must have one entry per stage, got "
                f"{self.depths}, {self.widths}, {self.strides}, {self.dilations}"
            )

    @property
    def output_stride(self) -> int:
        """Input pixels per cell of the last feature map."""
        stride = self.stem_stride * (2 if self.stem_pool else 1)
        for s in self.strides:
            stride *= s
        return stride

    @property
    def output_channels(self) -> int:
        """Channels of the last feature map."""
        return self.widths[-1] * (4 if self.block == "bottleneck" else 1)


Block = Literal["basic", "bottleneck"]

_DEPTHS: dict[str, tuple[Block, tuple[int, ...]]] = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
}


def resnet_config(
    name: str, *, output_stride: int = 32, dc5: bool = False, **changes
) -> BackboneConfig:
    """A standard ResNet by name.

    Args:
      name: "resnet18", "resnet34", "resnet50" or "resnet101".
      output_stride: 32, 16 or 8: the last stages keep their resolution and dilate instead.
      dc5: DETR's DC5, the same as ``output_stride=16``.
      **changes: other fields of ``BackboneConfig``.

    Raises:
      ValueError: unknown name or stride.
    """
    if name not in _DEPTHS:
        raise ValueError(f"unknown backbone {name!r}; one of {sorted(_DEPTHS)}")
    output_stride = 16 if dc5 else output_stride
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
    block, depths = _DEPTHS[name]
    strides = (1, 2, 2 if output_stride > 8 else 1, 2 if output_stride > 16 else 1)
    dilations = (
        1,
        1,
        1 if output_stride > 8 else 2,
        {32: 1, 16: 2, 8: 4}[output_stride],
    )
    return BackboneConfig(block, depths, strides=strides, dilations=dilations, **changes)


class ResNet(nn.Module):
    """ResNet feature extractor.

    Attributes:
      config: sizes.
      policy: bits by module path.
      dtype: carrier dtype of the convolutions.
    """

    config: BackboneConfig
    policy: Policy = Policy()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> tuple[Array, ...]:
        """Feature maps of every stage.

        Args:
          images: normalised, [B, H, W, 3] float32; data, to which no gradient flows.
          train: a learning norm uses and updates batch statistics.

        Returns:
          One [B, H_i, W_i, C_i] array of the carrier dtype per stage, last one the coarsest.
        """
        c = self.config
        x, steps = QConv(
            c.stem_width,
            (c.stem_kernel, c.stem_kernel),
            strides=c.stem_stride,
            unsigned=False,
            constant_input=True,
            policy=self.policy,
            dtype=self.dtype,
            name="stem",
        ).with_steps(images)
        x = BatchNorm(c.norm == "frozen", name="stem_norm")(x, steps, train=train)
        if c.stem_pool:
            x = max_pool(x)
        x = relu(x)  # after the pooling, which it commutes with, a quarter is left
        block = Bottleneck if c.block == "bottleneck" else BasicBlock
        stages, dilation = [], 1
        for i, depth in enumerate(c.depths):
            for j in range(depth):
                x = block(
                    c.widths[i],
                    strides=c.strides[i] if j == 0 else 1,
                    dilation=dilation if j == 0 else c.dilations[i],
                    frozen=c.norm == "frozen",
                    policy=self.policy,
                    dtype=self.dtype,
                    name=f"layer{i + 1}_{j}",
                )(x, train=train)
            dilation = c.dilations[i]
            stages.append(x)
        return tuple(stages)


class _Block(nn.Module):
    width: int
    strides: int = 1
    dilation: int = 1
    frozen: bool = True
    policy: Policy = Policy()
    dtype: DTypeLike = jnp.float32

    def conv(
        self, x, features, size, strides, dilation, name, train, zero_scale=False, rectified=False
    ):
        """Convolution, of the ReLU of ``x`` where ``rectified``, and norm."""
        x, steps = QConv(
            features,
            (size, size),
            self.policy,
            strides,
            dilation,
            rectified=rectified,
            dtype=self.dtype,
            name=f"conv{name}" if name != "shortcut" else name,
        ).with_steps(x)
        norm = BatchNorm(
            self.frozen,
            zero_scale=zero_scale and not self.frozen,
            name=f"norm{name}" if name != "shortcut" else "shortcut_norm",
        )
        return norm(x, steps, train=train)

    def residual(self, y: Array, x: Array, train: bool) -> Array:
        """ReLU of the sum of the branch ``y`` and the block's input ``x``.

        Where the shape changes it is a strided 1x1 convolution of the input, which has a sign. Both
        operands have grids of their own, the sum has none: it goes to those of its readers.
        """
        identity = x.shape[-1] == y.shape[-1] and self.strides == 1
        if not identity:
            x = self.conv(x, y.shape[-1], 1, self.strides, 1, "shortcut", train)
        path = f"{module_path(self)}/residual"
        spec_y = self.policy.residual_spec(path, unsigned=False)
        spec_x = self.policy.residual_spec(path, unsigned=identity)
        rule = self.policy.rule_for(path)
        note = (rule.note if rule else "") or (FLOAT if spec_y is None else "")
        record(OpRecord(path, "add", activation=spec_y, other=spec_x, note=note))
        total = self.on_grid("branch", y, spec_y) + self.on_grid("identity", x, spec_x)
        return relu(total.astype(y.dtype))

    def on_grid(self, name: str, x: Array, spec: QuantSpec | None) -> Array:
        """``x`` as it is added: float32 on its grid, or as it is."""
        quantizer = activation_quantizer(self, name, x, spec)
        if quantizer is None or self.policy.arithmetic == "observe":
            return x
        return lsq.fake_quantize(x, quantizer.step, *quantizer.ends, quantizer.gradient_scale)


class BasicBlock(_Block):
    """Two 3x3 convolutions (ResNet-18/34)."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """[B, H, W, C] -> [B, H/s, W/s, width]."""
        y = self.conv(x, self.width, 3, self.strides, self.dilation, "1", train)
        y = self.conv(y, self.width, 3, 1, self.dilation, "2", train, True, rectified=True)
        return self.residual(y, x, train)


class Bottleneck(_Block):
    """1x1, 3x3 (carries the stride), 1x1 to four times the width (ResNet-50/101)."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """[B, H, W, C] -> [B, H/s, W/s, 4 width]."""
        out = 4 * self.width
        y = self.conv(x, self.width, 1, 1, 1, "1", train)
        y = self.conv(y, self.width, 3, self.strides, self.dilation, "2", train, rectified=True)
        y = self.conv(y, out, 1, 1, 1, "3", train, zero_scale=True, rectified=True)
        return self.residual(y, x, train)
