"""What a deployed network is computed with: a vocabulary, spoken by several back ends.

``deploy.detr`` and ``deploy.deformable`` say once what the network computes, in these words; a back
end computes it (``deploy.jax_operations``) or writes it down as a graph (``deploy.onnx``). The
arithmetic of codes is fixed by the rule in ``deploy.parts``; a back end chooses the carriers of the
codes and the order of the sums, which change no bit of it. What stays float (norms, softmax,
positions, sums of the transformer, heads) is the same to rounding.

Tensors are opaque and of three kinds: floats; codes on a grid, ``Coded``; and ``Sums`` of an
integer product, values that nobody has asked for yet, so that a back end can take them to the next
grid directly. Feature maps ("map") have a back end's own layout and are only
passed to operations on maps. Shapes are given with batch first; B and the number of images may be
symbolic in JAX.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

from aqdetr_jax.deploy.parts import Grid, Layer, Norm

Tensor = Any
"""Floats, whole numbers, truth values, codes or sums of a back end."""

Shapes = tuple[tuple[int, int], ...]


class Operations(abc.ABC):
    """The vocabulary. Plain NumPy arrays may stand for constants wherever floats are expected."""

    # --- images and maps --------------------------------------------------------------------------

    @abc.abstractmethod
    def image_map(
        self, images: Tensor, sizes: Tensor, mean: Sequence[float], std: Sequence[float]
    ) -> Tensor:
        """The network's input as a map.

        Args:
          images: uint8 [B, H, W, 3], the real image in the top left corner.
          sizes: int32 [B, 2], (height, width) of the real image.
          mean: of the channels of images in [0, 1].
          std: likewise.

        Returns:
          float map of ``(images / 255 - mean) / std``, 0 beyond the real image.
        """

    @abc.abstractmethod
    def convolve(self, x: Tensor, layer: Layer) -> Tensor:
        """Convolution and bias of a map: sums of an integer layer, else a float map.

        The input of a layer with a grid is quantized first, see ``quantize``.
        """

    @abc.abstractmethod
    def max_pool(self, x: Tensor) -> Tensor:
        """3 x 3 of stride 2 and padding 1 of a map: floats, or sums, which become floats."""

    @abc.abstractmethod
    def add_maps(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum of two maps of one shape: of two coded ones in the rule's step 5, else floats."""

    @abc.abstractmethod
    def map_shape(self, x: Tensor) -> tuple[int, int]:
        """(height, width) of a map."""

    @abc.abstractmethod
    def tokens(self, x: Tensor) -> Tensor:
        """A map's cells in a row, [B, H * W, C]; floats (sums become floats)."""

    @abc.abstractmethod
    def to_map(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """Floats [B, h * w, C] as a map again."""

    # --- grids ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        """``x`` on a grid: floats (rule 4), sums (rule 3) or a sum of two coded maps (rule 5).

        A grid of one step a head needs heads: [B, H, ...] floats, or sums [B, S, H * D] of a dense
        layer, where the grid's step of a channel is that of its head.

        The codes are known by ``grid.site`` to whoever compares back ends.
        """

    @abc.abstractmethod
    def dequantize(self, x: Tensor) -> Tensor:
        """Codes as floats, ``code * step``."""

    # --- products ---------------------------------------------------------------------------------

    @abc.abstractmethod
    def dense(self, x: Tensor, layer: Layer) -> Tensor:
        """[..., K] -> [..., N]: sums of an integer layer, else floats.

        ``x`` is codes on the layer's grid (several layers may share a site's codes only where they
        share its grid), or anything else, which is shifted, divided and quantized first.
        """

    @abc.abstractmethod
    def scores(self, q: Tensor, k: Tensor, factor: float) -> Tensor:
        """``factor * q k^T``, [B, H, Q, D] x [B, H, K, D] -> floats [B, H, Q, K].

        Codes are multiplied as integers, and their sums with ``float32(q step * k step) * factor``;
        one of them may be floats, then both are.
        """

    @abc.abstractmethod
    def mix(self, weights: Tensor, values: Tensor) -> Tensor:
        """``weights . values``, [B, H, Q, K] x [B, H, K, D] -> [B, H, Q, D]; as ``scores``."""

    @abc.abstractmethod
    def mix_samples(self, weights: Tensor, samples: Tensor) -> Tensor:
        """[B, H, Q, P] x [B, H, Q, P, D] -> floats [B, H, Q, D]; as ``scores``."""

    @abc.abstractmethod
    def sample(self, values: Tensor, locations: Tensor, shapes: Shapes) -> Tensor:
        """Bilinear samples between cell centres, zeros outside; see ``ops.deformable``.

        Args:
          values: floats [B, S, H, D], tokens of all levels.
          locations: floats [B, Q, H, L, K, 2], (x, y) in units of the level's grid.
          shapes: (height, width) of the levels.

        Returns:
          floats [B, H, Q, L * K, D].
        """

    # --- floats -----------------------------------------------------------------------------------

    @abc.abstractmethod
    def normalize(self, x: Tensor, norm: Norm) -> Tensor:
        """Layer norm of [..., C], or group norm of [B, S, C]; eps 1e-5, of floats or sums."""

    @abc.abstractmethod
    def relu(self, x: Tensor) -> Tensor:
        """Of floats, of sums (which stay sums), or of the sum of two coded maps."""

    @abc.abstractmethod
    def relu6(self, x: Tensor) -> Tensor:
        """``min(max(x, 0), 6)`` of a float map or of sums, which stay sums."""

    @abc.abstractmethod
    def softmax(self, x: Tensor) -> Tensor:
        """Over the last axis."""

    @abc.abstractmethod
    def sigmoid(self, x: Tensor) -> Tensor:
        """``1 / (1 + exp(-x))``."""

    @abc.abstractmethod
    def log(self, x: Tensor) -> Tensor:
        """Natural logarithm."""

    @abc.abstractmethod
    def sin(self, x: Tensor) -> Tensor:
        """Sine."""

    @abc.abstractmethod
    def cos(self, x: Tensor) -> Tensor:
        """Cosine."""

    @abc.abstractmethod
    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """With broadcasting; sums become floats here and below."""

    @abc.abstractmethod
    def subtract(self, a: Tensor, b: Tensor) -> Tensor:
        """``a - b``."""

    @abc.abstractmethod
    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """``a * b``."""

    @abc.abstractmethod
    def divide(self, a: Tensor, b: Tensor) -> Tensor:
        """``a / b``."""

    @abc.abstractmethod
    def clip(self, x: Tensor, low: float, high: float) -> Tensor:
        """``min(max(x, low), high)``."""

    @abc.abstractmethod
    def less(self, a: Tensor, b: Tensor) -> Tensor:
        """Truth values of ``a < b``."""

    @abc.abstractmethod
    def both(self, a: Tensor, b: Tensor) -> Tensor:
        """Truth values of ``a and b``, with broadcasting."""

    @abc.abstractmethod
    def where(self, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """``a`` where the condition holds, else ``b``; with broadcasting."""

    @abc.abstractmethod
    def floats(self, x: Tensor) -> Tensor:
        """Whole numbers, truth values (0 and 1) or sums as floats."""

    @abc.abstractmethod
    def total(self, x: Tensor, axis: int, *, keep: bool = False) -> Tensor:
        """Sum over an axis of floats."""

    @abc.abstractmethod
    def running_total(self, x: Tensor, axis: int) -> Tensor:
        """Sums of the first 1, 2, ... along an axis."""

    @abc.abstractmethod
    def best(self, x: Tensor, count: int) -> Tensor:
        """Indices [B, count] of the largest of [B, S], largest first, ties by index."""

    @abc.abstractmethod
    def rows(self, x: Tensor, indices: Tensor) -> Tensor:
        """[B, S, C] and [B, N] -> [B, N, C], the rows of those indices."""

    @abc.abstractmethod
    def greatest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(the largest of the last axis, its index, the first one's if there are several)."""

    @abc.abstractmethod
    def divided(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """(whole quotient, remainder) of whole numbers that are not negative."""

    # --- shapes: of floats, truth values, whole numbers, codes (sums become floats) ---------------

    @abc.abstractmethod
    def shape(self, x: Tensor) -> tuple[Any, ...]:
        """Of any tensor that is no map."""

    @abc.abstractmethod
    def reshape(self, x: Tensor, shape: Sequence[Any]) -> Tensor:
        """In C order; dimensions as ``shape`` gives them."""

    @abc.abstractmethod
    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """Axis i of the result is ``axes[i]`` of ``x``."""

    @abc.abstractmethod
    def concatenate(self, xs: Sequence[Tensor], axis: int) -> Tensor:
        """Along an axis; of floats."""

    @abc.abstractmethod
    def part(self, x: Tensor, axis: int, start: int, stop: int) -> Tensor:
        """``x[start:stop]`` along an axis."""

    @abc.abstractmethod
    def repeat_batch(self, x: Any, like: Tensor) -> Tensor:
        """A constant [...] as floats [B, ...], B the first dimension of ``like``."""
