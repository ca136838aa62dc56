"""The deployed network in JAX: the reference of the integer arithmetic, and what TPUs run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from aqdetr_jax.deploy.bits import Codes
from aqdetr_jax.deploy.carriers import Range, integer_product, local_tpu
from aqdetr_jax.deploy.operations import Operations, Shapes
from aqdetr_jax.deploy.parts import Grid, Layer, Norm
from aqdetr_jax.models.layers import NORM_EPS
from aqdetr_jax.ops import deformable
from aqdetr_jax.ops.activations import SIX, softmax
from aqdetr_jax.ops.pooling import max_pool
from aqdetr_jax.quant.contractions import Contraction, Conv, Dense, Mix, MixSamples, Scores


@dataclasses.dataclass(frozen=True)
class Coded:
    """Codes on a grid.

    Attributes:
      values: whole numbers in float32; a map's are [B, H, W, C].
      grid: theirs.
    """

    values: Array
    grid: Grid


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums of a product of codes, bias included.

    Attributes:
      values: int32.
      layer: whose unit they have.
      rectified: a ReLU follows.
      ceiling: where it ends, for a ReLU6.
    """

    values: Array
    layer: Layer
    rectified: bool = False
    ceiling: float | None = None


@dataclasses.dataclass(frozen=True)
class CodedSum:
    """The sum of two coded maps, on no grid yet."""

    a: Coded
    b: Coded
    rectified: bool = False


class JaxOperations(Operations):
    """Computes with JAX arrays; maps are [B, H, W, C].

    Args:
      given: codes by site: where there are some, they go on instead of those that are computed, so
        that one different code does not make others different (``codes`` has the computed ones).
      tpu: the kind of TPU that the carriers of the codes are chosen for, if it is compiled for one;
        None = this process's.

    Attributes:
      codes: what every grid was given, by site; whole numbers in float32.
    """

    def __init__(self, given: Mapping[str, Array] | None = None, tpu: str | None = None):
        self._given = given or {}
        self._tpu = tpu or local_tpu()
        self.codes: dict[str, Array] = {}

    # --- images and maps --------------------------------------------------------------------------

    def image_map(self, images, sizes, mean, std):
        """See the class."""
        x = images.astype(jnp.float32) / 255.0
        x = (x - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
        rows = jnp.arange(images.shape[1])[None, :, None] < sizes[:, :1, None]
        columns = jnp.arange(images.shape[2])[None, None] < sizes[:, 1:, None]
        return jnp.where((rows & columns)[..., None], x, 0.0)

    def convolve(self, x, layer):
        """See the class."""
        window = layer.window
        contraction = Conv(
            jnp.float32, window.strides, window.padding, window.dilation, window.depthwise
        )
        return self._product(contraction, x, layer)

    def max_pool(self, x):
        """See the class."""
        return max_pool(self.floats(x))

    def add_maps(self, a, b):
        """See the class."""
        if isinstance(a, Coded) and isinstance(b, Coded):
            return CodedSum(a, b)
        return self.floats(a) + self.floats(b)

    def map_shape(self, x):
        """See the class."""
        array = x.a.values if isinstance(x, CodedSum) else getattr(x, "values", x)
        return array.shape[1], array.shape[2]

    def tokens(self, x):
        """See the class."""
        x = self.floats(x)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def to_map(self, x, shape):
        """See the class."""
        return self.floats(x).reshape(x.shape[0], *shape, x.shape[-1])

    # --- grids ------------------------------------------------------------------------------------

    def quantize(self, x, grid):
        """See the class."""
        step, lower = (jnp.asarray(v, jnp.float32) for v in (grid.step, grid.lowest))
        heads = step.ndim
        rectified = getattr(x, "rectified", False)
        if isinstance(x, Sums):
            if heads:  # the step of every channel
                repeats = x.values.shape[-1] // step.shape[0]
                step, lower = jnp.repeat(step, repeats), jnp.repeat(lower, repeats)
            ratio = x.values.astype(jnp.float32) * (_constant(x.layer.unit) / step)
        elif isinstance(x, CodedSum):
            ratio = x.a.values * (_constant(x.a.grid.step) / step)
            ratio = ratio + x.b.values * (_constant(x.b.grid.step) / step)
        else:
            x = self.floats(x)
            if heads:
                shape = (-1, *(1,) * (x.ndim - 2))
                step, lower = step.reshape(shape), lower.reshape(shape)
            ratio = x / step
        upper = lower + ((1 << grid.bits) - 1)
        lower = jnp.maximum(lower, 0.0) if rectified else lower
        if getattr(x, "ceiling", None) is not None:
            # Rounding keeps the order, so that the end may be rounded before the comparison.
            upper = jnp.minimum(upper, jnp.round(x.ceiling / step))
        codes = jnp.clip(jnp.round(ratio), lower, upper)
        self.codes[grid.site] = codes
        if grid.site in self._given:
            codes = aligned(self._given[grid.site], codes.shape).astype(jnp.float32)
        return Coded(codes, grid)

    def dequantize(self, x):
        """See the class."""
        step = _constant(x.grid.step)
        if x.grid.step.ndim:
            step = step.reshape(-1, *(1,) * (x.values.ndim - 2))
        return x.values * step

    # --- products ---------------------------------------------------------------------------------

    def dense(self, x, layer):
        """See the class."""
        return self._product(Dense(jnp.float32), x, layer)

    def _product(self, contraction: Contraction, x: Any, layer: Layer) -> Any:
        if layer.grid is not None and not isinstance(x, Coded):
            if layer.shift is not None:
                x = (self.floats(x) - _constant(layer.shift)) / _constant(layer.spread)
            x = self.quantize(x, layer.grid)
        if layer.integer:
            return Sums(self._sums(contraction, x.values, layer), layer)
        x = self.dequantize(x) if isinstance(x, Coded) else self.floats(x)
        if isinstance(layer.kernel, Codes):
            total = contraction.floats(x, _constant(layer.kernel.values))
            return total * _constant(layer.scale) + _constant(layer.bias)
        return contraction.floats(x, _constant(layer.kernel)) + _constant(layer.bias)

    def _sums(self, contraction: Contraction, codes: Array, layer: Layer) -> Array:
        """Sums of an integer layer and its bias."""
        assert isinstance(layer.kernel, Codes)
        assert layer.grid is not None
        half = 1 << layer.kernel.bits - 1
        total = integer_product(
            contraction,
            codes,
            layer.kernel.values,
            _range(layer.grid),
            (-half, half - 1),
            self._tpu,
            layer.reach,
        )
        return total + jnp.asarray(layer.bias, jnp.int32)

    def scores(self, q, k, factor):
        """See the class."""
        return self._mixed(Scores(jnp.float32), q, k, factor)

    def mix(self, weights, values):
        """See the class."""
        return self._mixed(Mix(jnp.float32), weights, values)

    def mix_samples(self, weights, samples):
        """See the class."""
        flat = (*samples.values.shape[:3], -1) if isinstance(samples, Coded) else None
        if flat is None:
            samples = samples.reshape(*samples.shape[:3], -1)
        else:
            samples = Coded(samples.values.reshape(flat), samples.grid)
        return self._mixed(MixSamples(jnp.float32), weights, samples)

    def _mixed(self, contraction: Contraction, a: Any, b: Any, factor: float = 1.0) -> Array:
        if not (isinstance(a, Coded) and isinstance(b, Coded)):
            a, b = (self.dequantize(x) if isinstance(x, Coded) else x for x in (a, b))
            product = contraction.floats(a, b)
            return product * np.float32(factor) if factor != 1 else product
        total = integer_product(
            contraction, a.values, b.values, _range(a.grid), _range(b.grid), self._tpu
        ).astype(jnp.float32)
        unit = _constant(a.grid.step) * _constant(b.grid.step) * np.float32(factor)
        return total * (unit.reshape(-1, 1, 1) if unit.ndim else unit)

    def sample(self, values, locations, shapes: Shapes):
        """See the class."""
        heads, width = values.shape[2:]
        found = deformable.sample_values(values, locations, shapes)
        return found.reshape(values.shape[0], heads, locations.shape[1], -1, width)

    # --- floats -----------------------------------------------------------------------------------

    def normalize(self, x, norm: Norm):
        """See the class."""
        x = self.floats(x)
        shape = x.shape
        axes: tuple[int, ...] = (-1,)
        if norm.groups:
            x = x.reshape(*shape[:-1], norm.groups, shape[-1] // norm.groups)
            axes = (*range(1, x.ndim - 2), -1)
        centred = x - jnp.mean(x, axes, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axes, keepdims=True)
        normal = (centred * lax.rsqrt(variance + NORM_EPS)).reshape(shape)
        return normal * _constant(norm.scale) + _constant(norm.bias)

    def relu(self, x):
        """See the class."""
        if isinstance(x, Sums | CodedSum):
            return dataclasses.replace(x, rectified=True)
        return jnp.maximum(x, 0.0)

    def relu6(self, x):
        """See the class."""
        if isinstance(x, Sums):
            return dataclasses.replace(x, rectified=True, ceiling=SIX)
        return jnp.clip(self.floats(x), 0.0, SIX)

    def softmax(self, x):
        """See the class."""
        return softmax(x)

    def sigmoid(self, x):
        """See the class."""
        return jax.nn.sigmoid(self.floats(x))

    def log(self, x):
        """See the class."""
        return jnp.log(x)

    def sin(self, x):
        """See the class."""
        return jnp.sin(x)

    def cos(self, x):
        """See the class."""
        return jnp.cos(x)

    def add(self, a, b):
        """See the class."""
        return self.floats(a) + self.floats(b)

    def subtract(self, a, b):
        """See the class."""
        return self.floats(a) - self.floats(b)

    def multiply(self, a, b):
        """See the class."""
        return self.floats(a) * self.floats(b)

    def divide(self, a, b):
        """See the class."""
        return self.floats(a) / self.floats(b)

    def clip(self, x, low, high):
        """See the class."""
        return jnp.clip(x, low, high)

    def less(self, a, b):
        """See the class."""
        return jnp.asarray(a) < jnp.asarray(b)

    def both(self, a, b):
        """See the class."""
        return a & b

    def where(self, condition, a, b):
        """See the class."""
        return jnp.where(condition, self.floats(a), self.floats(b))

    def floats(self, x):
        """See the class."""
        if isinstance(x, Sums):
            value = x.values.astype(jnp.float32) * _constant(x.layer.unit)
            value = jnp.maximum(value, 0.0) if x.rectified else value
            return value if x.ceiling is None else jnp.minimum(value, x.ceiling)
        if isinstance(x, CodedSum):
            value = self.dequantize(x.a) + self.dequantize(x.b)
            return jnp.maximum(value, 0.0) if x.rectified else value
        if isinstance(x, Coded):
            return self.dequantize(x)
        return jnp.asarray(x, jnp.float32)

    def total(self, x, axis, *, keep=False):
        """See the class."""
        return jnp.sum(x, axis, keepdims=keep)

    def running_total(self, x, axis):
        """See the class."""
        return jnp.cumsum(x, axis)

    def best(self, x, count):
        """See the class."""
        return lax.top_k(x, count)[1]

    def rows(self, x, indices):
        """See the class."""
        return jnp.take_along_axis(x, indices[..., None], axis=1)

    def greatest(self, x):
        """See the class."""
        return jnp.max(x, -1), jnp.argmax(x, -1)

    def divided(self, x, n):
        """See the class."""
        return x // n, x % n

    # --- shapes -----------------------------------------------------------------------------------

    def shape(self, x):
        """See the class."""
        return getattr(x, "values", x).shape

    def _shaped(self, change, x):
        if isinstance(x, Coded):
            return Coded(change(x.values), x.grid)
        return change(self.floats(x) if isinstance(x, Sums) else x)

    def reshape(self, x, shape: Sequence[Any]):
        """See the class."""
        return self._shaped(lambda v: v.reshape(tuple(shape)), x)

    def transpose(self, x, axes):
        """See the class."""
        return self._shaped(lambda v: v.transpose(tuple(axes)), x)

    def concatenate(self, xs, axis):
        """See the class."""
        return jnp.concatenate([self.floats(x) for x in xs], axis)

    def part(self, x, axis, start, stop):
        """See the class."""
        return self._shaped(lambda v: lax.slice_in_dim(v, start, stop, axis=axis), x)

    def repeat_batch(self, x, like):
        """See the class."""
        return jnp.broadcast_to(_constant(x), (like.shape[0], *x.shape))


def aligned(codes: Array, shape: tuple[int, ...]) -> Array:
    """Codes of one site as another back end has them.

    The same numbers may be [B, H, S, D] or [B, S, H * D], maps or tokens [B, H * W, C], with points
    and channels apart or not; and of all decoder layers, where only the last is deployed.
    """
    if codes.shape == shape:
        return codes
    if codes.ndim == len(shape) + 1 and codes.shape[1:] == shape:
        return codes[-1]
    if codes.ndim == 4 and len(shape) == 3 and codes.shape[2] == shape[1]:
        return codes.transpose(0, 2, 1, 3).reshape(shape)
    if codes.ndim == 3 and len(shape) == 4 and codes.shape[1] == shape[2]:
        return codes.reshape(shape[0], shape[2], shape[1], shape[3]).transpose(0, 2, 1, 3)
    return codes.reshape(shape)


def _range(grid: Grid) -> Range:
    """Smallest and largest code, of each head where heads have their own."""
    low, high = grid.lowest, grid.highest
    return (low.reshape(-1, 1, 1), high.reshape(-1, 1, 1)) if low.ndim else (int(low), int(high))


def _constant(x: Any) -> Array:
    return jnp.asarray(x, jnp.float32)
