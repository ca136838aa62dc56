"""A deployed network as a folder of its real size, and back.

What is written is all that inference needs and nothing else: codes of a few bits, scales, int32
biases, steps, norms and embeddings; no auxiliary queries, no teacher, no head that only training
reads, no float copy of a quantized weight. What is read is the same network, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqdetr_jax.checkpoint.model_folder import InputRule
from aqdetr_jax.config_types import from_dataclass, to_dataclass
from aqdetr_jax.deploy.archive import WEIGHTS, Arrays, PackedModelError, read_archive, write_archive
from aqdetr_jax.deploy.bits import Codes
from aqdetr_jax.deploy.detector import DeployedBundle, detect
from aqdetr_jax.deploy.jax_operations import JaxOperations
from aqdetr_jax.deploy.network import Network
from aqdetr_jax.deploy.parts import Grid, Layer, Norm
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.paths import as_path
from aqdetr_jax.quant.config import QuantConfig, saved_quant
from aqdetr_jax.quant.spec import SUPPORTED_BITS

_FIELDS = ("kernel", "scale", "bias", "shift", "spread")


def write_packed(folder: str | Path, bundle: DeployedBundle) -> None:
    """Writes a packed model; the folder appears whole or not at all.

    Args:
      folder: an earlier packed model of that name is replaced, nothing else is.
      bundle: a deployed model.
    """
    arrays, parts = _arrays(bundle.network)
    facts = {
        "model": from_dataclass(bundle.config),
        "quant": from_dataclass(bundle.quant),
        "input": from_dataclass(bundle.input),
        "class_names": list(bundle.class_names),
        "category_ids": list(bundle.category_ids),
        "info": bundle.info,
        "parts": parts,
    }
    write_archive(folder, arrays, facts)


def read_packed(folder: str | Path) -> DeployedBundle:
    """Reads what ``write_packed`` wrote; all of it is checked first.

    Raises:
      FileNotFoundError: there is no packed model.
      PackedModelError: it cannot be used; the message names the file and the reason.
    """
    arrays, facts = read_archive(folder)
    where = str(as_path(folder) / WEIGHTS)
    try:
        config = to_dataclass(DetrConfig, facts["model"], f"{folder}: model")
        bundle = DeployedBundle(
            config,
            to_dataclass(QuantConfig, saved_quant(facts["quant"]), f"{folder}: quant"),
            to_dataclass(InputRule, facts["input"], f"{folder}: input"),
            tuple(facts["class_names"]),
            tuple(facts["category_ids"]),
            _network(arrays, facts["parts"], config, where),
            facts["info"],
        )
    except KeyError as error:
        raise PackedModelError(f"{folder}: its manifest lacks {error}") from None
    except (TypeError, AttributeError) as error:
        raise PackedModelError(
            f"{folder}: its manifest is not of a packed model: {error}"
        ) from None
    _check(bundle, where)
    return bundle


def used(network: Network, bucket: tuple[int, int]) -> Network:
    """The network without the parts that inference never reads (heads of training alone)."""
    reads = _Reads(network)
    jax.eval_shape(
        lambda images, sizes: detect(JaxOperations(), reads.network, images, sizes),
        jax.ShapeDtypeStruct((1, *bucket, 3), jnp.uint8),
        jax.ShapeDtypeStruct((1, 2), jnp.int32),
    )
    kept: dict[str, Any] = {
        name: {key: value for key, value in getattr(network, name).items() if key in keys}
        for name, keys in reads.keys.items()
    }
    return dataclasses.replace(network, **kept)


class _Reads:
    """A network that remembers which of its parts were looked up."""

    def __init__(self, network: Network):
        self.keys: dict[str, set[str]] = {}
        watched: dict[str, Any] = {
            name: _Watched(getattr(network, name), self.keys.setdefault(name, set()))
            for name in ("layers", "norms", "grids", "arrays")
        }
        self.network = dataclasses.replace(network, **watched)


class _Watched(dict):
    def __init__(self, content: Mapping[str, Any], seen: set[str]):
        super().__init__(content)
        self._seen = seen

    def __getitem__(self, key):
        self._seen.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        if key in self:
            self._seen.add(key)
        return super().get(key, default)


# --- parts as arrays, and back --------------------------------------------------------------------


def _arrays(network: Network) -> tuple[Arrays, dict[str, Any]]:
    """(arrays by name, what they are: plain JSON values)."""
    arrays: Arrays = {}

    def grid_facts(grid: Grid) -> dict[str, Any]:
        arrays[f"{grid.site}_step"] = np.asarray(grid.step, np.float32)
        lower = list(grid.lower) if isinstance(grid.lower, tuple) else grid.lower
        return {"site": grid.site, "lower": lower, "bits": grid.bits}

    layers = {}
    for path, layer in network.layers.items():
        for name in _FIELDS:
            value = getattr(layer, name)
            if value is not None:
                arrays[f"{path}/{name}"] = value if isinstance(value, Codes) else np.asarray(value)
        layers[path] = None if layer.grid is None else grid_facts(layer.grid)
    for path, norm in network.norms.items():
        arrays[f"{path}/scale"], arrays[f"{path}/bias"] = norm.scale, norm.bias
    for name, array in network.arrays.items():
        arrays[name] = array
    facts = {
        "layers": layers,
        "norms": sorted(network.norms),
        "grids": [grid_facts(grid) for grid in network.grids.values()],
        "arrays": sorted(network.arrays),
        "renormalize": network.renormalize,
    }
    return arrays, facts


def _network(arrays: Arrays, facts: Mapping[str, Any], config: DetrConfig, where: str) -> Network:
    """The network of arrays; every one of them is used."""
    left = dict(arrays)

    def take(name: str, dtype: str = "float32", optional: bool = False) -> Any:
        value = left.pop(name, None)
        if value is None and optional:
            return None
        if not isinstance(value, np.ndarray) or value.dtype != dtype:
            kind = "nothing" if value is None else getattr(value, "dtype", "codes")
            raise PackedModelError(f"{where}: {name} should be {dtype} and is {kind}")
        return value

    def grid(described: Mapping[str, Any]) -> Grid:
        site, lower, bits = described["site"], described["lower"], described["bits"]
        step = take(f"{site}_step")
        lowers = lower if isinstance(lower, list) else [lower]
        whole = all(type(n) is int and -(1 << 8) < n <= 0 for n in lowers)
        if bits not in SUPPORTED_BITS or not whole or np.shape(lower) != step.shape:
            raise PackedModelError(f"{where}: the grid {site} has no bits and codes of a grid")
        return Grid(site, step, tuple(lower) if isinstance(lower, list) else lower, bits)

    layers = {}
    for path, described in facts["layers"].items():
        kernel = left.pop(f"{path}/kernel", None)
        coded = isinstance(kernel, Codes)
        if isinstance(kernel, Codes):
            usable = kernel.signed
        else:
            usable = kernel is not None and kernel.dtype == np.float32
        if kernel is None or not usable:
            raise PackedModelError(f"{where}: {path}/kernel should be signed codes or float32")
        on_grid = None if described is None else grid(described)
        bias = take(f"{path}/bias", "int32" if coded and on_grid is not None else "float32")
        scale = take(f"{path}/scale") if coded else None
        shift, spread = (take(f"{path}/{name}", optional=True) for name in ("shift", "spread"))
        layer = Layer(path, kernel, scale, bias, on_grid, shift, spread)
        _check_layer(layer, where)
        if layer.integer:
            layer = dataclasses.replace(layer, reach=layer.largest_sum())
            if layer.reach >= 2**31:
                raise PackedModelError(f"{where}: sums of {path} leave int32")
        layers[path] = layer
    norms = {p: Norm(p, take(f"{p}/scale"), take(f"{p}/bias")) for p in facts["norms"]}
    grids = {g.site: g for g in map(grid, facts["grids"])}
    embeddings = {name: take(name) for name in facts["arrays"]}
    if left:
        raise PackedModelError(f"{where}: {min(left)} belongs to nothing")
    return Network(config, layers, norms, grids, embeddings, bool(facts["renormalize"]))


def _check_layer(layer: Layer, where: str) -> None:
    """That a layer's arrays fit together."""
    shape = (layer.kernel.values if isinstance(layer.kernel, Codes) else layer.kernel).shape
    if len(shape) not in (2, 4):
        raise PackedModelError(f"{where}: {layer.name}/kernel has the shape {list(shape)}")
    wanted = {"scale": shape[-1:], "bias": shape[-1:], "shift": shape[:1], "spread": shape[:1]}
    for name, size in wanted.items():
        value = getattr(layer, name)
        if value is not None and value.shape != size:
            raise PackedModelError(
                f"{where}: {layer.name}/{name} has the shape {list(value.shape)}, and its kernel "
                f"{list(shape)}"
            )
    if (layer.shift is None) != (layer.spread is None) or (
        layer.spread is not None and not np.all(layer.spread)
    ):
        raise PackedModelError(f"{where}: {layer.name} lacks a shift or a spread of its input")


def _check(bundle: DeployedBundle, where: str) -> None:
    """That the network computes: all parts are there and their shapes fit."""
    try:
        jax.eval_shape(
            lambda images, sizes: detect(JaxOperations(), bundle.network, images, sizes),
            jax.ShapeDtypeStruct((1, *bundle.input.buckets[0], 3), jnp.uint8),
            jax.ShapeDtypeStruct((1, 2), jnp.int32),
        )
    except KeyError as error:
        raise PackedModelError(f"{where} lacks the part {error} of its model") from None
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PackedModelError(f"{where}: its parts do not fit its model: {reason}") from None
