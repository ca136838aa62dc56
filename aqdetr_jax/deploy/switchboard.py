"""One compiled program that is any quantized version of a detector, by its variables alone.

The module has a quantizer at every site. Two things of a quantizer are numbers and no program: its
step size (a parameter), and the ends of its grid, which the collection ``limits`` replaces. So bits
are chosen by variables. A site that shall stay float gets a grid without ends and a step of 2^-40:

* ``v / s``, ``code * s`` and the product's scale move exponents only, which is exact;
* a float32 of more than 2^-17 is then a whole number already, and rounding it does nothing; what is
  smaller is moved by at most 2^-41.

What is left between this and the module of a policy of its own is the order of float sums.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from aqdetr_jax.checkpoint.model_folder import ModelBundle
from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.models.detector import build_detector, record_ops
from aqdetr_jax.models.quantized import LIMITS
from aqdetr_jax.quant.calibrate import calibrated_parameters, site_specs, weight_specs
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.quant.policy import Rule
from aqdetr_jax.quant.record import OpRecord
from aqdetr_jax.quant.spec import QuantSpec
from aqdetr_jax.training import initial, setup
from aqdetr_jax.training.bundles import inference_config, quantized_bundle
from aqdetr_jax.training.config import ExperimentConfig

FLOAT_STEP = 2.0**-40
"""Of a site that stays float. A product's sums are 2^80 times its values then, far from 2^128."""

_PARAMETERS = {"step": FLOAT_STEP, "zero": 0, "offset": 0, "shift": 0, "scale": 1}
"""A quantizer's parameters by their endings, and what they are at a site that stays float."""

WIDEST = 8
"""Bits of the module's own policy; none of its grids is used."""

Grids = Mapping[str, QuantSpec]
"""The grid of every quantized operand, ``path/site`` -> spec ("kernel" of weights); what is left
out is float."""


class Switchboard:
    """The variables of all quantized versions of a float model, calibrated.

    Args:
      config: of the student: data, calibration and the options of its policy. Its bits do not
        matter here.
      teacher: the float model.
      train_set: what calibration sees.

    Attributes:
      config: with the sizes of the data, and every operation quantized.
      bundle: the model; its variables are no model's before ``variables`` completes them.
      rows: its operations.
    """

    def __init__(self, config: ExperimentConfig, teacher: ModelBundle, train_set: DetectionDataset):
        config = inference_config(config, train_set)
        everything = dataclasses.replace(config.quant, rules=(_everything(WIDEST),))
        self.config = dataclasses.replace(config, quant=everything)
        self.bundle = quantized_bundle(self.config, teacher, None)
        self._train_set = train_set
        self.rows = self.record(everything)
        self._all = grids_of(self.rows)
        self._params = traverse_util.flatten_dict(self.bundle.variables["params"], sep="/")
        self._calibrated = functools.cache(self._calibrate)

    def record(self, quant: QuantConfig) -> list[OpRecord]:
        """The operations of the model under other bits, and its other options.

        (Variables that a policy has no use for are not looked at.)
        """
        module = build_detector(self.bundle.config, quant.build())
        return record_ops(module, self.bundle.variables, self.config.data.buckets[0])

    def uniform(self, bits: int) -> list[OpRecord]:
        """The operations with all of their grids at the same bits, heads and coordinates too."""
        return [_at(row, bits) for row in self.rows]

    def variables(self, grids: Grids) -> dict[str, Any]:
        """The variables with which the program computes what a policy with these grids does.

        Raises:
          ValueError: a grid is of no site of the model.
        """
        unknown = sorted(set(grids) - set(self._all))
        if unknown:
            raise ValueError(f"the model has no quantizer {unknown[0]!r}")
        params, limits = dict(self._params), {}
        for site, widest in self._all.items():
            spec = grids.get(site)
            names = [n for n in _PARAMETERS if f"{site}_{n}" in params]
            if spec is None:
                values = {
                    n: np.full(np.shape(params[f"{site}_{n}"]), _PARAMETERS[n]) for n in names
                }
                # Where nothing can be below zero, the grid may stand for a ReLU.
                lower = -np.inf if widest.signed or widest.zero_point else 0.0
                limits[site] = np.array([lower, np.inf], np.float32)
            else:
                operation, _, operand = site.rpartition("/")
                scaled = operand != "kernel" or f"{operation}/input" in grids
                source = self._calibrated(spec.bits, scaled)
                values = {n: source[f"{site}_{n}"] for n in names}
                limits[site] = np.array([spec.lower, spec.upper], np.float32)
            params |= {f"{site}_{n}": np.asarray(v, np.float32) for n, v in values.items()}
        return {
            **self.bundle.variables,
            "params": traverse_util.unflatten_dict(params, sep="/"),
            LIMITS: traverse_util.unflatten_dict(limits, sep="/"),
        }

    @functools.cached_property
    def _samples(self) -> dict[str, np.ndarray]:
        """What calibration sees at every site."""
        config, module = self.config, self.bundle.module()
        with contextlib.closing(setup.calibration_pipeline(config, self._train_set)) as batches:
            return initial.observe(config, module, self.bundle.variables, batches)

    def _calibrate(self, bits: int, scaled: bool) -> dict[str, np.ndarray]:
        """All steps at some bits; not ``scaled``: of weights whose input stays float, those only.

        (A centred input's channels have scales, which its weights carry.)
        """
        rows = self.uniform(bits)
        params, quant = self._params, self.config.quant
        if not scaled:
            rows = [dataclasses.replace(r, activation=None) for r in rows if r.weight is not None]
            params = {k: v for k, v in params.items() if not k.endswith("/input_scale")}
        return calibrated_parameters(
            params,
            rows,
            self._samples if scaled else {},
            quant.calibration_method,
            quant.equalize,
        )


def grids_of(rows: Sequence[OpRecord]) -> dict[str, QuantSpec]:
    """The grid of every operand that has one."""
    return {**weight_specs(rows), **site_specs(rows)}


def _everything(bits: int) -> Rule:
    return Rule(r".*", bits, bits, bits)


def _at(row: OpRecord, bits: int) -> OpRecord:
    """A row with all of its grids at other bits."""
    specs = {
        name: dataclasses.replace(spec, bits=bits)
        for name in ("weight", "activation", "other")
        if (spec := getattr(row, name)) is not None
    }
    return dataclasses.replace(row, **specs)
