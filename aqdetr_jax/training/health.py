"""Whether the quantizers of a run are alive: how each uses its grid, every so many steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from aqdetr_jax.models.dense import DensePretrainer
from aqdetr_jax.models.detector import Detector
from aqdetr_jax.models.grid_use import USAGE, GridUse
from aqdetr_jax.parallel.compiled import DoesNotFitError, Programs
from aqdetr_jax.parallel.mesh import batch_sharding, bytes_a_device, replicated
from aqdetr_jax.training.assemble import batch_shapes
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.faults import in_words
from aqdetr_jax.training.state import TrainState, variables

logger = logging.getLogger(__name__)

IMAGES = 8
"""Images that are looked at; one a device where there are more devices."""

SATURATED = 0.5
"""Share of clipped values above which a quantizer is said to be saturated [ours]: at its best step
a grid of four codes clips a tenth of normally distributed values."""


class QuantizerHealth:
    """Looks at every quantizer with some images of the step's batch.

    Args:
      config: the experiment.
      module: of the run.
      mesh: devices.
      remedies: what helps if a program does not fit, a sentence.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        module: Detector | DensePretrainer,
        mesh: Mesh,
        remedies: str,
    ):
        self._every = config.train.quantizers_every if config.quant.quantized else 0
        if config.train.steps < self._every:
            self._every = 0
        self._known: dict[str, str] = {}
        devices, split = mesh.shape["data"], batch_sharding(mesh)

        def look(state: Any, images: jax.Array, mask: jax.Array) -> Any:
            # The first ones of each device.
            each = min(-(-IMAGES // devices), images.shape[0] // devices)
            images, mask = (
                x.reshape(devices, -1, *x.shape[1:])[:, :each].reshape(-1, *x.shape[1:])
                for x in (images, mask)
            )
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                _, seen = module.apply(state, images, mask, mutable=[USAGE])
            return seen[USAGE]

        def shapes(bucket: tuple[int, int]) -> tuple[jax.ShapeDtypeStruct, ...]:
            found = batch_shapes(config, bucket, config.train.batch_size)
            return tuple(
                jax.ShapeDtypeStruct(found[k].shape, found[k].dtype, sharding=split)
                for k in ("images", "mask")
            )

        self._programs = Programs(
            jax.jit(look, out_shardings=replicated(mesh)),
            [shapes(bucket) for bucket in config.data.buckets],
            name="look at the quantizers",
            remedies=remedies,
        )

    def due(self, done: int) -> bool:
        """Whether it is time."""
        return self._every > 0 and done % self._every == 0

    def compile(self, state: TrainState) -> None:
        """Compiles for every bucket; what does not fit is told and left out.

        Args:
          state: of the run.
        """
        if not self._every:
            return
        self._programs.reserve(bytes_a_device((state.opt_state, state.ema)))
        try:
            self._programs.compile_all(variables(state.params, state.batch_stats))
        except DoesNotFitError as error:
            logger.warning(
                "quantizers are not looked at (config.train.quantizers_every): %s", error
            )
            self._every = 0

    def look(
        self, done: int, state: TrainState, batch: Mapping[str, jax.Array]
    ) -> dict[str, float]:
        """The use of every grid, as metrics; what has died since the last look is told by name.

        Args:
          done: steps done.
          state: after them.
          batch: of the last step, on the devices.
        """
        held, inputs = variables(state.params, state.batch_stats), (batch["images"], batch["mask"])
        found = jax.device_get(self._programs((held,), inputs)(held, *inputs))
        uses = {"/".join(path): use for path, use in traverse_util.flatten_dict(found).items()}
        told = ailments(uses)
        for kind, text in (
            ("dead", "all values have one code"),
            ("saturated", f"more than {SATURATED:.0%} of the values are clipped"),
        ):
            new = [
                site for site, ill in told.items() if ill == kind and self._known.get(site) != ill
            ]
            if new:
                logger.warning("step %d: %s quantizers (%s): %s", done, kind, text, in_words(new))
        self._known = told
        return metrics_of(uses, told)


def ailments(uses: Mapping[str, GridUse]) -> dict[str, str]:
    """Which quantizers are "dead" or "saturated", by path; of heads with their number."""
    found = {}
    for site, use in uses.items():
        weight = site.endswith("kernel")
        heads = len(use.clipped)
        for head in range(heads):
            name = f"{site} (head {head})" if heads > 1 else site
            share = float(use.constant[head])
            if share >= 1:
                found[name] = "dead"
            elif float(use.clipped[head]) > SATURATED:
                found[name] = "saturated"
            elif weight and share > SATURATED:
                found[f"{site} ({share:.0%} of its channels)"] = "dead"
    return found


def metrics_of(uses: Mapping[str, GridUse], told: Mapping[str, str]) -> dict[str, float]:
    """Metrics of the use of grids: of each site, and of all of them."""
    metrics = {}
    for site, use in uses.items():
        metrics[f"quantizers/{site}/clipped"] = float(np.mean(use.clipped))
        metrics[f"quantizers/{site}/used"] = float(np.mean(use.used))
    for kind in ("dead", "saturated"):
        metrics[f"quantizers/{kind}"] = float(sum(ill == kind for ill in told.values()))
    return metrics
