"""A deployed network: its sizes and its parts by name, and the words that both families share."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from aqdetr_jax.deploy.bits import Codes
from aqdetr_jax.deploy.operations import Operations, Tensor
from aqdetr_jax.deploy.parts import Grid, Layer, Norm
from aqdetr_jax.models.attention import MASKED
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.ops.convolution import Window
from aqdetr_jax.quant.spec import ALIGNMENT


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers", "norms", "grids", "arrays"],
    meta_fields=["config", "renormalize"],
)
@dataclasses.dataclass(frozen=True)
class Network:
    """A detector's parameters for inference.

    Attributes:
      config: sizes, without auxiliary queries.
      layers: dense layers and convolutions by module path, batch norms folded in; convolutions
        without their windows, which follow from ``config``.
      norms: layer and group norms by module path, without their groups.
      grids: those that belong to no layer's input, by site.
      arrays: embeddings, float32, by name.
      renormalize: divide attention outputs by the sum of their quantized probabilities.
    """

    config: DetrConfig
    layers: Mapping[str, Layer]
    norms: Mapping[str, Norm]
    grids: Mapping[str, Grid]
    arrays: Mapping[str, np.ndarray]
    renormalize: bool = False

    @property
    def weight_bits(self) -> int:
        """Bits of most of the weights, 32 of a float network."""
        counts: Counter[int] = Counter()
        for layer in self.layers.values():
            if isinstance(layer.kernel, Codes):
                counts[layer.kernel.bits] += layer.kernel.values.size
        return counts.most_common(1)[0][0] if counts else 32

    def convolution(self, path: str, size: int, stride: int = 1, dilation: int = 1) -> Layer:
        """A convolution with its window, padded as torch's layers are."""
        pad = dilation * (size - 1) // 2
        window = Window((stride, stride), ((pad, pad), (pad, pad)), (dilation, dilation))
        return dataclasses.replace(self.layers[path], window=window)

    def group_norm(self, path: str, groups: int) -> Norm:
        """A norm over groups of channels and all positions."""
        return dataclasses.replace(self.norms[path], groups=groups)


# --- attention and the transformer's layers -------------------------------------------------------


def _heads(ops: Operations, x: Tensor, heads: int, grid: Grid | None, layer: Layer) -> Tensor:
    """A projection [B, S, H * D] as [B, H, S, D], on its grid if there is one."""
    early = layer.integer  # the sums go to the grid as they are
    if grid is not None and early:
        x = ops.quantize(x, grid)
    batch, length, width = ops.shape(x)
    x = ops.transpose(ops.reshape(x, (batch, length, heads, width // heads)), (0, 2, 1, 3))
    return ops.quantize(x, grid) if grid is not None and not early else x


def _merged(ops: Operations, x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H * D]."""
    batch, heads, length, width = ops.shape(x)
    return ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (batch, length, heads * width))


def renormalized(
    ops: Operations, network: Network, mixed: Tensor, weights: Tensor, grid: Grid | None
) -> Tensor:
    """The mixed values over the sum of the quantized weights, if the network wants it."""
    if not network.renormalize or grid is None:
        return mixed
    axis = len(ops.shape(weights)) - 1
    total = ops.total(ops.dequantize(weights), axis, keep=True)
    step = grid.step.reshape(-1, 1, 1)
    return ops.divide(mixed, ops.where(ops.less(0.0, total), total, step))


def attend(
    ops: Operations,
    network: Network,
    path: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
) -> Tensor:
    """Multi-head attention (``models.attention``), [B, Q, d], [B, K, d] x 2 -> [B, Q, d].

    Args:
      ops: what computes.
      network: whose parts are used.
      path: of the attention.
      query: [B, Q, d].
      key: [B, K, d].
      value: [B, K, d].
      valid: truth values [B, K], or None.
    """
    heads, grids = network.config.heads, network.grids
    projected = []
    alignment = network.norms.get(f"{path}/{ALIGNMENT}")
    for name, x in (("q", query), ("k", key), ("v", value)):
        layer = network.layers[f"{path}/{name}_proj"]
        grid = grids.get(f"{path}/core/{name}")
        x = ops.dense(x, layer)
        if name == "q" and alignment is not None:
            x = ops.normalize(_heads(ops, x, heads, None, layer), alignment)
            projected.append(x if grid is None else ops.quantize(x, grid))
        else:
            projected.append(_heads(ops, x, heads, grid, layer))
    q, k, v = projected
    scores = ops.scores(q, k, 1 / math.sqrt(network.config.dim // heads))
    if valid is not None:
        batch, length = ops.shape(valid)
        scores = ops.where(ops.reshape(valid, (batch, 1, 1, length)), scores, MASKED)
    weights = ops.softmax(scores)
    grid = grids.get(f"{path}/core/probs")
    if grid is not None:
        weights = ops.quantize(weights, grid)
    mixed = renormalized(ops, network, ops.mix(weights, v), weights, grid)
    return ops.dense(_merged(ops, mixed), network.layers[f"{path}/out_proj"])


def feed_forward(ops: Operations, network: Network, path: str, x: Tensor) -> Tensor:
    """``W2 relu(W1 x + b1) + b2``."""
    hidden = ops.relu(ops.dense(x, network.layers[f"{path}/feed_forward/linear1"]))
    return ops.dense(hidden, network.layers[f"{path}/feed_forward/linear2"])


def residual(ops: Operations, network: Network, x: Tensor, sublayer: Any, norm: str) -> Tensor:
    """Post-norm ``norm(x + f(x))`` or pre-norm ``x + f(norm(x))``."""
    if network.config.pre_norm:
        return ops.add(x, sublayer(ops.normalize(x, network.norms[norm])))
    return ops.normalize(ops.add(x, sublayer(x)), network.norms[norm])


# --- heads ----------------------------------------------------------------------------------------


def box_head(ops: Operations, network: Network, path: str, x: Tensor) -> Tensor:
    """Three dense layers, [B, Q, d] -> [B, Q, 4]; no sigmoid."""
    x = ops.relu(ops.dense(x, network.layers[f"{path}/layer_0"]))
    x = ops.relu(ops.dense(x, network.layers[f"{path}/layer_1"]))
    return ops.dense(x, network.layers[f"{path}/layer_2"])


# --- positions ------------------------------------------------------------------------------------


def valid_cells(
    ops: Operations, sizes: Tensor, image: tuple[int, int], level: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Which rows and columns of a map lie on the real image: truth values [B, h, 1] and [B, 1, w].

    Cell i has the pixel ``floor(i * side / cells)`` (``ops.position.downsample_mask``).
    """
    found = []
    for axis in range(2):
        pixel = (np.arange(level[axis]) * image[axis] // level[axis]).astype(np.int32)
        side = ops.part(sizes, 1, axis, axis + 1)
        found.append(ops.less(pixel[None], side))
    batch = ops.shape(sizes)[0]
    rows, columns = found
    return (
        ops.reshape(rows, (batch, level[0], 1)),
        ops.reshape(columns, (batch, 1, level[1])),
    )


def encode(ops: Operations, coordinates: Tensor, width: int) -> Tensor:
    """Sine encoding of every coordinate (``ops.position.encode_coordinates``).

    Returns:
      [..., n * width] of [..., n].
    """
    lead = tuple(ops.shape(coordinates))
    frequency = (10000.0 ** (2 * (np.arange(0, width, 2) // 2) / width)).astype(np.float32)
    angle = ops.divide(ops.reshape(coordinates, (*lead, 1)), frequency)
    parts = [ops.reshape(f(angle), (*lead, width // 2, 1)) for f in (ops.sin, ops.cos)]
    pair = ops.concatenate(parts, axis=len(lead) + 1)
    return ops.reshape(pair, (*lead[:-1], lead[-1] * width))


def positions(
    ops: Operations, rows: Tensor, columns: Tensor, dim: int, offset: float = 0.0
) -> Tensor:
    """Sine position encodings [B, h * w, d] of a padded map (``ops.position``).

    Args:
      ops: what computes.
      rows: truth values [B, h, 1].
      columns: truth values [B, 1, w].
      dim: d.
      offset: added to the counts before they are normalised.
    """
    rows, columns = ops.floats(rows), ops.floats(columns)
    batch, height, _ = ops.shape(rows)
    width = ops.shape(columns)[2]
    coordinates = []
    for along, across, axis, count in ((rows, columns, 1, height), (columns, rows, 2, width)):
        counted = ops.running_total(along, axis)
        last = ops.part(counted, axis, count - 1, count)
        # In the rows (columns) beyond the image nothing is counted, as in the mask's own sums.
        counted, last = ops.multiply(counted, across), ops.multiply(last, across)
        scaled = ops.divide(ops.add(counted, offset), ops.add(last, 1e-6))
        scaled = ops.multiply(scaled, 2 * math.pi)
        coordinates.append(ops.reshape(scaled, (batch, height * width, 1)))
    return encode(ops, ops.concatenate(coordinates, axis=2), dim // 2)


def joined(ops: Operations, tensors: Sequence[Tensor], axis: int) -> Tensor:
    """Concatenated, if there is more than one."""
    return tensors[0] if len(tensors) == 1 else ops.concatenate(tensors, axis)
