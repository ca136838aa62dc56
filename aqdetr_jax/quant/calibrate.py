"""Step sizes from data: what each site saw over N batches, and from that its first step.

A calibration pass runs the float model (``arithmetic="observe"``) on a few training batches; every
quantization site leaves a fixed sample of its values. The step sizes then start from those, and the
weights' from the weights; nothing is decided inside the training graph [LSQ section 2.1; ours].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from aqdetr_jax.quant.record import OpRecord
from aqdetr_jax.quant.spec import ALIGNMENT, QuantSpec, default_step, weight_size

Method = Literal["mse", "lsq", "percentile", "minmax"]

RANGE = "_range"
"""Ending of the name under which a site's smallest and largest value stand beside its sample."""

CANDIDATES = 80
PERCENTILE = 99.9
TINY = 1e-8

ROUNDING = 1e-6
"""Of a value that should be constant, in parts of it."""

CONSTANT = 0.01
"""mean|v| by which an input that never moved gets a step, in parts of what it is."""


def site_specs(rows: Sequence[OpRecord]) -> dict[str, QuantSpec]:
    """The grid of every activation site, ``path/site`` -> spec, from a recorded forward pass."""
    specs: dict[str, QuantSpec | None] = {}
    for row in rows:
        if row.kind in ("dense", "conv"):
            specs[f"{row.path}/input"] = row.activation
        elif row.kind == "scores":
            specs[f"{row.path}/q"], specs[f"{row.path}/k"] = row.activation, row.other
        elif row.kind == "mix":
            specs[f"{row.path}/probs"], specs[f"{row.path}/v"] = row.activation, row.other
        elif row.kind == "mix_samples":
            specs[f"{row.path}/probs"], specs[f"{row.path}/samples"] = row.activation, row.other
        elif row.kind == "add":
            block = row.path.rpartition("/")[0]
            specs[f"{block}/branch"], specs[f"{block}/identity"] = row.activation, row.other
    return {path: spec for path, spec in specs.items() if spec is not None}


def weight_specs(rows: Sequence[OpRecord]) -> dict[str, QuantSpec]:
    """The grid of every quantized weight, ``path/kernel`` -> spec."""
    return {f"{row.path}/kernel": row.weight for row in rows if row.weight is not None}


def merge_samples(batches: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Joins the samples of several batches along the last axis, ``path/site`` -> values."""
    joined: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for path, values in batch.items():
            joined.setdefault(path, []).append(np.asarray(values, np.float32))
    return {path: np.concatenate(values, axis=-1) for path, values in joined.items()}


def first_step(
    values: np.ndarray, spec: QuantSpec, method: Method = "mse", size: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Step sizes (and zero points) for rows of values.

    Args:
      values: float32 [R, n]; one step for each of the R rows.
      spec: the grid.
      method: "minmax" covers all values; "percentile" maps the 99.9th percentile of |v| to the
        largest code, of a grid that moves the percentiles 0.1 and 99.9 to its ends; "mse" takes
        the step with the least squared error among fractions of the one that covers all; "lsq" is
        ``2 mean|v| / sqrt(Qp)``, and "mse" for a grid that moves, as LSQ+ starts.
      size: a row of zeros gets ``default_step`` of this mean|v|.

    Returns:
      (steps float32 [R], whole numbers float32 [R]: zero points, or the steps that a grid with an
      offset is moved by; else 0).

    Raises:
      ValueError: there is no such method.
    """
    if method not in get_args(Method):
        known = ", ".join(map(repr, get_args(Method)))
        raise ValueError(f"unknown calibration method {method!r}: one of {known}")
    values = np.asarray(values, np.float32)
    if spec.offset:
        unsigned = dataclasses.replace(spec, signed=False, offset=False, zero_point=True)
        steps, zeros = _moved_grid(values, unsigned, method)
        zeros = -spec.lower - zeros
    elif spec.zero_point:
        steps, zeros = _moved_grid(values, spec, method)
    else:
        steps, zeros = _first_step(values, spec, method), np.zeros(len(values), np.float32)
    # Steps move by fractions of themselves: from next to nothing a dead row would never come back.
    steps = np.where(np.any(values, axis=1), steps, default_step(spec, size))
    return steps.astype(np.float32), zeros


def _first_step(values: np.ndarray, spec: QuantSpec, method: Method) -> np.ndarray:
    """Steps [R] of a grid whose codes are fixed."""
    rows = values.shape[0]
    if method == "lsq":
        return np.maximum(2 * np.abs(values).mean(1) / np.sqrt(spec.upper), TINY)
    if method == "percentile":
        top = np.percentile(np.abs(values), PERCENTILE, axis=1).astype(np.float32)
        return np.maximum(top / spec.upper, TINY)
    full = values.max(1).clip(0) / spec.upper
    if spec.lower:
        full = np.maximum(full, -values.min(1) / -spec.lower)
    full = np.maximum(full, TINY).astype(np.float32)
    if method == "minmax":
        return full
    best, best_error = full.copy(), np.full(rows, np.inf)
    # Geometric: heavy-tailed sites (attention probabilities) have their best step far below full.
    for fraction in np.geomspace(1.0, 0.01, CANDIDATES, dtype=np.float32):
        step = full * fraction
        error = _error(values, step, np.float32(spec.lower), np.float32(spec.upper))
        better = error < best_error
        best, best_error = np.where(better, step, best), np.where(better, error, best_error)
    return best.astype(np.float32)


def _moved_grid(
    values: np.ndarray, spec: QuantSpec, method: Method
) -> tuple[np.ndarray, np.ndarray]:
    """Steps and zero points [R]; of "mse" of the best of shrunken ranges [a min, a max].

    A range always contains 0.
    """
    top = spec.upper
    ends = values.min(1), values.max(1)
    if method == "percentile":
        low, high = np.percentile(values, [100 - PERCENTILE, PERCENTILE], axis=1)
        ends = low.astype(np.float32), high.astype(np.float32)
    low, high = ends[0].clip(max=0), ends[1].clip(min=0)
    best, best_zero = np.full(len(values), TINY, np.float32), np.zeros(len(values), np.float32)
    best_error = np.full(len(values), np.inf)
    whole = method in ("minmax", "percentile")
    for fraction in np.geomspace(1.0, 0.02, 1 if whole else CANDIDATES, dtype=np.float32):
        step = np.maximum((high - low) * fraction / top, TINY).astype(np.float32)
        zero = np.clip(np.round(-low * fraction / step), 0, top).astype(np.float32)
        error = _error(values, step, -zero[:, None], top - zero[:, None])
        better = error < best_error
        best, best_zero = np.where(better, step, best), np.where(better, zero, best_zero)
        best_error = np.where(better, error, best_error)
    return best, best_zero


def _error(values, step, lower, upper) -> np.ndarray:
    step = step[:, None]
    grid = np.round(np.clip(values / step, lower, upper)) * step
    return np.square(values - grid).mean(1)


def is_constant(values: np.ndarray) -> np.ndarray:
    """Whether a channel has one value, but for what float32 adds to it: bool [K] of [K, n].

    (The first decoder layer's queries attend to values that are all alike.) A grid for what is left
    of it after its mean would be one for rounding errors.
    """
    largest = np.abs(values).max(axis=1)
    return np.ptp(values, axis=1) <= ROUNDING * largest


def channel_statistics(values: np.ndarray, exponent: float) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale of every channel of a centred input.

    Args:
      values: float32 [K, n], samples of each channel.
      exponent: of the spread: 0 leaves the channels' spreads as they are, 1 makes them equal (and
        moves all of their inequality into the weights).

    Returns:
      (means [K], scales [K] with a geometric mean of 1). A channel that hardly moves is not blown
      up: its spread counts as a tenth of the median one.
    """
    spread = np.where(is_constant(values), 0, values.std(axis=1))
    spread = np.maximum(spread, max(0.1 * float(np.median(spread)), TINY)) ** exponent
    scale = spread / np.exp(np.log(spread).mean())
    return values.mean(axis=1).astype(np.float32), scale.astype(np.float32)


def aligned_parameters(
    rows: Sequence[OpRecord], samples: Mapping[str, np.ndarray], parameters: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Where the alignments of co-attention queries start: close to doing nothing [ours].

    ``(q - μ(q)) / σ(q) · γ + β`` is about q where γ is the mean of σ over queries and β that of μ.

    Args:
      rows: records of a forward pass.
      samples: see ``calibrated_parameters``.
      parameters: for the shapes.

    Returns:
      Their scales γ and biases β by path.
    """
    out = {}
    for path in (row.path for row in rows if row.path.endswith(f"/{ALIGNMENT}")):
        bias, scale = samples[f"{path}/statistics"].mean(axis=1)
        for name, value in (("scale", scale), ("bias", bias)):
            shape = np.shape(parameters[f"{path}/{name}"])
            out[f"{path}/{name}"] = np.full(shape, value, np.float32)
    return out


def calibrated_parameters(
    parameters: Mapping[str, Any],
    rows: Sequence[OpRecord],
    samples: Mapping[str, np.ndarray],
    method: Method = "mse",
    equalize: float = 0.0,
) -> dict[str, np.ndarray]:
    """Parameters with every step size, zero point, offset and alignment set from data.

    Args:
      parameters: flat, ``path`` -> array; step sizes present with their shapes.
      rows: records of a forward pass of the quantized model.
      samples: what each activation site saw, ``path/site`` -> [n] or [H, n]; [K, n] per channel
        where the input is centred; for "minmax" the same with the ending ``RANGE``. Of an
        alignment, ``path/statistics`` -> [2, n] means and deviations of single queries.
      method: see ``first_step``.
      equalize: exponent of the channel scales, see ``channel_statistics``.

    Returns:
      A new flat dict.

    Raises:
      ValueError: a site was never observed, or saw non-finite values; the message names it.
    """
    out = {path: np.asarray(value) for path, value in parameters.items()}
    out |= aligned_parameters(rows, samples, out)
    # Activations first: the weights of a centred layer carry its channels' scales.
    for path, spec in site_specs(rows).items():
        if path not in samples:
            raise ValueError(f"calibration never reached the quantization site {path}")
        values = np.atleast_2d(samples[path])
        ends = np.atleast_2d(samples[path + RANGE]) if method == "minmax" else values
        size = 1.0
        if not np.isfinite(values).all():
            raise ValueError(f"calibration saw non-finite values at the quantization site {path}")
        if f"{path}_shift" in out:
            shift, scale = channel_statistics(values, equalize)
            out[f"{path}_shift"], out[f"{path}_scale"] = shift, scale
            moved = np.where(is_constant(values)[:, None], 0, ends - shift[:, None])
            ends = (moved / scale[:, None]).reshape(1, -1)
            # Of an input that never moves the bias is all there is, in units of its step.
            size = max(CONSTANT * float(np.mean(np.abs(shift / scale))), TINY)
        step, moved = first_step(ends, spec, method, size)
        shape = np.shape(out[f"{path}_step"])
        out[f"{path}_step"] = step.reshape(shape).astype(np.float32)
        for name, present in (("zero", spec.zero_point), ("offset", spec.offset)):
            if present:
                out[f"{path}_{name}"] = moved.reshape(shape).astype(np.float32)
    for path, spec in weight_specs(rows).items():
        kernel = out[path].reshape(-1, out[path].shape[-1])
        scales = f"{path.removesuffix('kernel')}input_scale"
        if scales in out:
            kernel = kernel * out[scales][:, None]
        size = weight_size(kernel.shape[0])
        out[f"{path}_step"] = first_step(kernel.T, spec, method, size)[0].astype(np.float32)
    return out
