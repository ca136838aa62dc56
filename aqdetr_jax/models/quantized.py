"""Quantized layers: dense, convolution and the step sizes they own.

Each layer asks the policy for its bits by its own module path, declares its step sizes as
parameters beside its weights (``kernel_step``, ``input_step``, ...), and hands arrays to
``quant.product``. A float policy declares no step sizes, so a float model's parameters are a subset
of the quantized model's, path by path.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from aqdetr_jax.models import grid_use
from aqdetr_jax.ops.activations import relu
from aqdetr_jax.ops.convolution import same_padding
from aqdetr_jax.quant import lsq
from aqdetr_jax.quant.calibrate import RANGE
from aqdetr_jax.quant.contractions import Conv, Dense
from aqdetr_jax.quant.policy import Policy
from aqdetr_jax.quant.product import quantized_product
from aqdetr_jax.quant.quantizer import Quantizer, SumSteps
from aqdetr_jax.quant.record import OpRecord, record
from aqdetr_jax.quant.spec import QuantSpec, default_step, weight_size

OBSERVED = "observed"
"""Variable collection that holds what calibration saw; see ``quant.calibrate``."""

CODES = "codes"
"""Variable collection of the codes of every site, see ``activation_quantizer``."""

LIMITS = "limits"
"""Variable collection that replaces the smallest and the largest code of sites, where it has them:
[2] under the site's name ("kernel" of weights). So one program serves every number of bits; see
``deploy.switchboard``."""

SAMPLES_PER_SITE = 8192
SAMPLES_PER_CHANNEL = 256


def module_path(module: nn.Module) -> str:
    """The module's path as in the parameter tree, ``a/b/c``."""
    return "/".join(module.path)


def observing(module: nn.Module) -> bool:
    """Whether calibration watches this call."""
    return module.is_mutable_collection(OBSERVED) and not module.is_initializing()


def capturing(module: nn.Module) -> bool:
    """Whether somebody wants to see the codes of this call."""
    return module.is_mutable_collection(CODES) and not module.is_initializing()


def channel_affine(
    module: nn.Module, x: Array, kernel: Array, bias: Array
) -> tuple[Array, Array, Array]:
    """The same dense layer on centred inputs, ``x W + b = ((x - m) / e) (e W) + (m W + b)`` [ours].

    A normalised activation has channels of unequal mean and spread, and one step for all of them
    is too coarse for the narrow ones; at 4 bits half of the grid can go to constants. Shift m and
    scale e ([K], ``input_shift`` and ``input_scale``) are set by calibration. Deployed, they are
    one multiply-add before the rounding, part of the weights, and part of the bias.

    Returns:
      (centred x in its own dtype, scaled kernel, bias).
    """
    width = x.shape[-1:]
    shift = module.param("input_shift", nn.initializers.zeros, width, jnp.float32)
    scale = module.param("input_scale", nn.initializers.ones, width, jnp.float32)
    return ((x - shift) / scale).astype(x.dtype), *moved_layer(kernel, bias, shift, scale)


def moved_layer(kernel: Array, bias: Array, shift: Array, scale: Array) -> tuple[Array, Array]:
    """Kernel and bias of a centred layer, ``W c`` and ``m W + b``.

    Args:
      kernel: float32 [K, N].
      bias: float32 [N].
      shift: float32 [K].
      scale: float32 [K].
    """
    # In float32 on TPUs and GPUs too: the bias is rounded to a whole number of steps.
    moved = jnp.dot(shift, kernel, precision=lax.Precision.HIGHEST)
    return kernel * scale[:, None], bias + moved


def bits_of(spec: QuantSpec | None) -> int | None:
    """Bits of a grid, None of a float."""
    return None if spec is None else spec.bits


def activation_quantizer(
    module: nn.Module,
    name: str,
    x: Array | jax.ShapeDtypeStruct,
    spec: QuantSpec | None,
    head_axis: int | None = None,
    seen: Mapping[str, Array] | None = None,
) -> Quantizer | None:
    """Declares ``<name>_step`` (``<name>_zero``, ``<name>_offset``) on ``module`` for ``x``.

    While the collection ``observed`` is mutable, what ``watched`` says of ``x`` is left there for
    calibration; while ``codes`` is, all its codes, int16 and of ``x``'s shape, under the site's
    name, of the last call if there are several.

    Args:
      module: the layer that owns the site.
      name: site name, e.g. "input", "q", "probs".
      x: the operand, batch first; its shape suffices where nothing is observed or captured.
      spec: its grid, None = float.
      head_axis: the axis of attention heads (1 for [B, H, ., .]) for per-head steps.
      seen: what calibration shall see instead, see ``watched``.

    Returns:
      The quantizer with a step of shape () or [H, 1, 1], or None.
    """
    if spec is None:
        return None
    shape: tuple[int, ...] = ()
    if spec.granularity == "head":
        if head_axis is None:
            raise ValueError(f"{module_path(module)}: {name} has no head axis for per-head steps")
        shape = (x.shape[head_axis], *(1,) * (x.ndim - head_axis - 1))
    if observing(module):
        found = watched(cast(Array, x), head_axis if shape else None) if seen is None else seen
        for ending, value in found.items():
            module.variable(OBSERVED, name + ending, lambda value=value: value).value = value
    start = nn.initializers.constant(default_step(spec))
    step = module.param(f"{name}_step", start, shape, jnp.float32)
    lower, upper = _limits(module, name, spec)
    if spec.zero_point:
        zero = module.param(f"{name}_zero", nn.initializers.zeros, shape, jnp.float32)
        lower, upper = lower - zero, upper - zero
    offset = None
    if spec.offset:
        offset = module.param(f"{name}_offset", nn.initializers.zeros, shape, jnp.float32)
        offset = lsq.whole_offset(offset, -upper, -lower)
    count = math.prod(x.shape[1:]) // max(math.prod(shape), 1)
    factor = jnp.float32(lsq.gradient_scale(count, spec.upper))
    quantizer = Quantizer(step, lower, upper, factor, offset)
    if capturing(module):
        codes = quantizer.codes(cast(Array, x)).astype(jnp.int16)
        module.variable(CODES, name, lambda: codes).value = codes
    if grid_use.watched(module):
        some = watched(cast(Array, x), head_axis if shape else None, grid_use.SAMPLES)[""]
        channels = None if seen is None else seen[""]
        grid_use.note_activation(module, name, some, spec, (step, *quantizer.ends), channels)
    return quantizer


def _limits(module: nn.Module, name: str, spec: QuantSpec) -> tuple[Array, Array]:
    """The smallest and the largest code of a site, float32 []."""
    if module.has_variable(LIMITS, name):
        ends: Array = module.get_variable(LIMITS, name)
        return ends[0], ends[1]
    return jnp.float32(spec.lower), jnp.float32(spec.upper)


def watched(x: Array, axis: int | None, limit: int = SAMPLES_PER_SITE) -> dict[str, Array]:
    """What calibration sees of an operand, by the ending that its name gets.

    Args:
      x: any shape.
      axis: of H heads or channels that are seen each for itself; None = all together.
      limit: elements of the sample.

    Returns:
      "": a fixed pseudo-random sample of the elements, [n] or [H, n]; ``RANGE``: the smallest and
      the largest of all, [2] or [H, 2].
    """
    if axis is None:
        flat = x.reshape(1, -1)
    else:
        flat = jnp.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    ends = jnp.stack([jnp.min(flat, 1), jnp.max(flat, 1)], 1)
    size = flat.shape[1]
    if size > limit:
        # An unbiased sample: adding the extremes would weigh them thousands of times too much.
        index = np.random.default_rng(size).integers(0, size, limit)
        flat = flat[:, np.sort(index)]
    return {"": flat[0], RANGE: ends[0]} if axis is None else {"": flat, RANGE: ends}


def rectify(module: nn.Module, x: Array, spec: QuantSpec | None, policy: Policy) -> Array:
    """ReLU of a layer's input, unless its grid is one: below 0, codes and gradients are 0.

    So neither the ReLU's output nor its mask is made.
    """
    clips = spec is not None and not spec.signed and not spec.zero_point
    watched = observing(module) or policy.arithmetic == "observe"
    return x if clips and not watched else relu(x)


def weight_quantizer(
    module: nn.Module, kernel: Array, spec: QuantSpec | None, name: str = "kernel"
) -> Quantizer | None:
    """Declares ``<name>_step`` [N] on ``module``, one step per output channel (the last axis)."""
    if spec is None:
        return None
    channels = kernel.shape[-1]
    axes = tuple(range(kernel.ndim - 1))

    def init(_key):
        first = lsq.initial_step(kernel, spec.upper, axes).reshape(channels)
        return jnp.where(first > 0, first, default_step(spec, weight_size(count)))

    count = kernel.size // channels
    step = module.param(f"{name}_step", init)
    limits = _limits(module, name, spec)
    if grid_use.watched(module):
        grid_use.note_weight(module, name, kernel, spec, (step, *limits))
    return Quantizer(
        step.reshape((1,) * (kernel.ndim - 1) + (channels,)),
        *limits,
        jnp.float32(lsq.gradient_scale(count, spec.upper)),
    )


def sum_steps(
    quantizer_x: Quantizer | None, quantizer_w: Quantizer | None, policy: Policy
) -> SumSteps | None:
    """The steps of a layer whose sums are integers, else None."""
    if quantizer_x is None or quantizer_w is None or policy.arithmetic == "observe":
        return None
    # A grid without ends (``LIMITS``) makes no integers: in a unit of 0 a bias stays what it is.
    endless = jnp.isinf(quantizer_x.upper) | jnp.isinf(quantizer_w.upper)
    step = jnp.where(endless, 0.0, quantizer_x.step)
    return SumSteps(step, quantizer_w.step.reshape(-1))


class QDense(nn.Module):
    """Dense layer ``y = x W + b`` with quantized input and weights (Q-FC).

    Where both are, so is the bias: a whole number of their steps' product, as integer sums add it.

    Attributes:
      features: N, output channels.
      policy: bits by module path.
      unsigned: the input cannot be negative (after a ReLU): unsigned grid.
      rectified: takes the ReLU of its input first, which is then unsigned.
      kernel_init: initializer of the [K, N] kernel.
      bias_init: initializer of the [N] bias.
      dtype: carrier dtype of the product, see ``quant.product``.
      out_dtype: dtype of the output; None = ``dtype``.
    """

    features: int
    policy: Policy = Policy()
    unsigned: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: DTypeLike = jnp.float32
    out_dtype: DTypeLike | None = None
    rectified: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., K] to [..., N]."""
        path = module_path(self)
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        weight_spec = self.policy.weight_spec(path)
        unsigned = self.unsigned or self.rectified
        input_spec = self.policy.activation_spec(path, unsigned=unsigned)
        if self.rectified:
            x = rectify(self, x, input_spec, self.policy)
        seen, centred = None, self.policy.center and input_spec is not None and not unsigned
        if centred:
            if observing(self) or grid_use.watched(self):
                seen = watched(x, x.ndim - 1, SAMPLES_PER_CHANNEL)
            x, kernel, bias = channel_affine(self, x, kernel, bias)
        q_x = activation_quantizer(self, "input", x, input_spec, seen=seen)
        q_w = weight_quantizer(self, kernel, weight_spec)
        row = _row(path, "dense", self.policy, weight_spec, input_spec, kernel, bias, x.size)
        record(dataclasses.replace(row, centred=x.shape[-1] if centred else 0))
        contraction = Dense(self.dtype, out_dtype=self.out_dtype, left_bits=bits_of(input_spec))
        y = quantized_product(contraction, x, kernel, q_x, q_w, self.policy.arithmetic)
        steps = sum_steps(q_x, q_w, self.policy)
        if steps is not None:
            bias = lsq.round_bias(bias, steps.unit())
        return (y + bias).astype(y.dtype)


class QConv(nn.Module):
    """2-d convolution without bias, quantized input and weights (Q-CNN); NHWC.

    A bias, if there is one, is rounded as a dense layer's is.

    Attributes:
      features: N, output channels.
      kernel_size: (kh, kw).
      policy: bits by module path.
      strides: step of the output grid.
      dilation: kernel dilation.
      padding: zeros on each side; None = ``dilation * (k - 1) // 2`` as torch layers use, "same" =
        TensorFlow's (of kernels that are not dilated).
      depthwise: every channel has a kernel of its own; ``features`` is the input's.
      use_bias: adds a bias (the input projection of DETR has one).
      unsigned: the input cannot be negative.
      rectified: takes the ReLU of its input first.
      constant_input: the input is data and takes no gradient (the stem's images).
      kernel_init: initializer of the HWIO kernel.
      bias_init: initializer of the bias.
      dtype: carrier dtype of the product.
    """

    features: int
    kernel_size: tuple[int, int]
    policy: Policy = Policy()
    strides: int = 1
    dilation: int = 1
    padding: int | Literal["same"] | None = None
    depthwise: bool = False
    use_bias: bool = False
    unsigned: bool = True
    rectified: bool = False
    constant_input: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.variance_scaling(
        2.0, "fan_out", "truncated_normal"
    )
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: DTypeLike = jnp.float32

    def __call__(self, x: Array) -> Array:
        """Maps [B, H, W, C] to [B, H', W', N] in the carrier dtype."""
        return self.with_steps(x)[0]

    @nn.compact
    def with_steps(self, x: Array) -> tuple[Array, SumSteps | None]:
        """The same, and the steps of its integer sums for a norm that follows (None: no such sums).

        Args: ``x`` [B, H, W, C].
        """
        path = module_path(self)
        inputs = 1 if self.depthwise else x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (*self.kernel_size, inputs, self.features))
        weight_spec = self.policy.weight_spec(path)
        input_spec = self.policy.activation_spec(path, unsigned=self.unsigned)
        if self.rectified:
            x = rectify(self, x, input_spec, self.policy)
        q_x = activation_quantizer(self, "input", x, input_spec)
        q_w = weight_quantizer(self, kernel, weight_spec)
        contraction = Conv(
            self.dtype,
            (self.strides, self.strides),
            self._padding(x.shape[1:3]),
            (self.dilation, self.dilation),
            self.depthwise,
            constant_left=self.constant_input,
            left_bits=bits_of(input_spec),
        )
        y = quantized_product(contraction, x, kernel, q_x, q_w, self.policy.arithmetic)
        steps = sum_steps(q_x, q_w, self.policy)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,))
            added = bias if steps is None else lsq.round_bias(bias, steps.unit())
            y = (y + added).astype(y.dtype)
        positions = y.shape[0] * y.shape[1] * y.shape[2] * kernel.size // self.features
        record(_row(path, "conv", self.policy, weight_spec, input_spec, kernel, bias, positions))
        return y, steps

    def _padding(self, shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
        if self.padding == "same":
            return same_padding(shape, self.kernel_size[0], self.strides)
        pads = [
            self.dilation * (k - 1) // 2 if self.padding is None else self.padding
            for k in self.kernel_size
        ]
        return (pads[0], pads[0]), (pads[1], pads[1])


def _row(path, kind, policy, weight_spec, input_spec, kernel, bias, reads) -> OpRecord:
    """A report row; ``reads`` = output positions x reduction length (macs per output channel)."""
    rule = policy.rule_for(path)
    return OpRecord(
        path,
        kind,
        weight_spec,
        input_spec,
        parameters=kernel.size + (0 if bias is None else bias.size),
        kernel_size=kernel.size,
        channels=kernel.shape[-1],
        macs=reads * kernel.shape[-1],
        note=rule.note if rule else "no rule: float",
    )
