"""From a trained model to the network that is deployed: codes, integer biases, norms folded in.

What each operation is, and on which grids, is what the model itself says while it is traced
(``quant.record``); nothing here knows a family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from aqdetr_jax.checkpoint.model_folder import ModelBundle, without_auxiliary
from aqdetr_jax.deploy.bits import Codes
from aqdetr_jax.deploy.network import Network
from aqdetr_jax.deploy.parts import Grid, Layer, Norm
from aqdetr_jax.models.detector import record_ops
from aqdetr_jax.models.fold import convolution_of
from aqdetr_jax.models.layers import norm_affine
from aqdetr_jax.models.quantized import moved_layer
from aqdetr_jax.quant import lsq
from aqdetr_jax.quant.calibrate import site_specs
from aqdetr_jax.quant.record import OpRecord
from aqdetr_jax.quant.spec import QuantSpec

INT32 = 2**31 - 1


def freeze(bundle: ModelBundle) -> Network:
    """The deployed network of a trained model, float ones included.

    Args:
      bundle: of either family.

    Raises:
      ValueError: it is no detector, or a bias is so large in units of its layer that no int32
        holds it; the message names the layer.
    """
    module = bundle.module()
    variables = {
        "params": without_auxiliary(bundle.variables["params"]),
        "batch_stats": bundle.variables.get("batch_stats", {}),
    }
    return _Freezer(bundle, variables, record_ops(module, variables, bundle.input.buckets[0])).all()


class _Freezer:
    def __init__(self, bundle: ModelBundle, variables: Mapping[str, Any], rows: list[OpRecord]):
        self._bundle, self._rows = bundle, rows
        self._params = _flat(variables["params"])
        self._stats = _flat(variables["batch_stats"])
        self._sites = site_specs(rows)
        means = [path.removesuffix("/mean") for path in self._stats if path.endswith("/mean")]
        self._norm_after = {convolution_of(norm): norm for norm in means}

    def all(self) -> Network:
        layers, norms, arrays = {}, {}, {}
        batch_norms = set(self._norm_after.values())
        for row in self._rows:
            if row.kind in ("dense", "conv"):
                layers[row.path] = self._layer(row)
            elif row.kind == "norm" and row.path not in batch_norms:
                scale, bias = (self._params[f"{row.path}/{name}"] for name in ("scale", "bias"))
                norms[row.path] = Norm(row.path, scale, bias)
            elif row.kind == "embedding":
                arrays[row.path] = self._params[row.path]
        inputs = {f"{path}/input" for path in layers}
        grids = {
            site: self._grid(site, spec) for site, spec in self._sites.items() if site not in inputs
        }
        renormalize = self._bundle.quant.build().renormalize
        return Network(self._bundle.config, layers, norms, grids, arrays, renormalize)

    def _grid(self, site: str, spec: QuantSpec) -> Grid:
        step = np.asarray(self._params[f"{site}_step"], np.float32)
        step = step.reshape(-1) if step.ndim else step  # [H, 1, 1] of heads
        lower = np.full(step.shape, spec.lower)
        if spec.zero_point:
            lower = lower - np.rint(self._params[f"{site}_zero"]).reshape(step.shape).astype(int)
        if spec.offset:
            moved = lsq.whole_offset(self._params[f"{site}_offset"], -spec.upper, -spec.lower)
            lower = lower + np.asarray(moved).reshape(step.shape).astype(int)
        return Grid(site, step, _plain(lower), spec.bits)

    def _layer(self, row: OpRecord) -> Layer:
        path = row.path
        kernel = self._params[f"{path}/kernel"]
        bias = self._params.get(f"{path}/bias", np.zeros(kernel.shape[-1], np.float32))
        site = f"{path}/input"
        grid = self._grid(site, self._sites[site]) if site in self._sites else None
        shift, spread = (self._params.get(f"{site}_{name}") for name in ("shift", "scale"))
        if shift is not None:
            assert spread is not None
            moved = jax.jit(moved_layer)(kernel, bias, shift, spread)
            kernel, bias = (np.asarray(x) for x in moved)
        factor = np.ones(kernel.shape[-1], np.float32)
        if path in self._norm_after:
            factor, bias = self._affine(self._norm_after[path], bias)
        scale: np.ndarray | None = None
        deployed: np.ndarray | Codes = kernel * factor
        if row.weight is not None:
            step = self._params[f"{path}/kernel_step"]
            codes = _codes(kernel, step, np.float32(row.weight.lower), np.float32(row.weight.upper))
            deployed = Codes(np.asarray(codes).astype(np.int8), row.weight.bits)
            scale = (step * factor).astype(np.float32)
        layer = Layer(path, deployed, scale, bias.astype(np.float32), grid, shift, spread)
        return _with_whole_bias(layer) if layer.integer else layer

    def _affine(self, norm: str, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Factor and bias of a batch norm, and of a bias before it."""
        values = [self._params[f"{norm}/scale"], self._params[f"{norm}/bias"]]
        values += [self._stats[f"{norm}/mean"], self._stats[f"{norm}/var"]]
        factor, added = (np.asarray(x, np.float32) for x in jax.jit(norm_affine)(*values))
        return factor, added + factor * bias


def _plain(x: np.ndarray) -> int | tuple[int, ...]:
    return tuple(int(n) for n in x) if x.ndim else int(x)


def _with_whole_bias(layer: Layer) -> Layer:
    """An integer layer's bias in its units, and the reach of its sums."""
    unit = layer.unit
    # A channel that its norm multiplies by 0 is its bias alone, in any unit.
    dead = unit == 0
    if dead.any():
        assert layer.scale is not None
        assert layer.grid is not None
        assert isinstance(layer.kernel, Codes)
        values = np.where(dead, 0, layer.kernel.values).astype(np.int8)
        fine = np.maximum(np.abs(layer.bias) / 2**20, 1e-12) / layer.grid.step
        layer = dataclasses.replace(
            layer,
            kernel=Codes(values, layer.kernel.bits),
            scale=np.where(dead, fine, layer.scale).astype(np.float32),
        )
        unit = layer.unit
    whole = np.asarray(lsq.bias_codes(jnp.asarray(layer.bias), jnp.asarray(unit)), np.float64)
    if not np.abs(whole).max(initial=0) < lsq.LARGEST_BIAS:  # what would be larger is that
        channel = int(np.abs(whole).argmax())
        raise ValueError(
            f"{layer.name}: the bias of channel {channel}, {layer.bias[channel]:.3g}, is no int32 "
            f"in units of {unit[channel]:.3g}: its steps are far too small, calibrate and train it "
            "again"
        )
    layer = dataclasses.replace(layer, bias=whole.astype(np.int32))
    reach = layer.largest_sum()
    if reach > INT32:
        raise ValueError(f"{layer.name}: its sums can reach {reach}, which no int32 holds")
    return dataclasses.replace(layer, reach=reach)


@jax.jit
def _codes(kernel, step, lower, upper):
    # Compiled and broadcast as in training, see ``quant.dequantize``.
    return lsq.codes(kernel, step.reshape((1,) * (kernel.ndim - 1) + (-1,)), lower, upper)


def _flat(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    flat = traverse_util.flatten_dict(tree, sep="/")
    return {path: np.asarray(value, np.float32) for path, value in flat.items()}
