"""The first variables of a run: random, imported from another model, step sizes calibrated."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from PIL import Image

from aqdetr_jax.checkpoint.model_folder import ModelBundle
from aqdetr_jax.checkpoint.transfer import LoadReport, merge
from aqdetr_jax.models.dense import DensePretrainer
from aqdetr_jax.models.detector import Detector, example_input, record_ops
from aqdetr_jax.models.quantized import OBSERVED
from aqdetr_jax.quant.calibrate import calibrated_parameters, merge_samples
from aqdetr_jax.quant.spec import GRID_PARAMETERS
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.setup import CALIBRATION_ROWS

logger = logging.getLogger(__name__)

INIT, AUXILIARY_START = 0, 2
"""Purpose numbers of random keys outside the step (see ``step.step_key``)."""


def initial_variables(
    config: ExperimentConfig,
    module: Detector | DensePretrainer,
    source: ModelBundle | None,
    calibration: Iterable[Mapping[str, np.ndarray]] | None,
) -> tuple[dict[str, Any], LoadReport | None]:
    """The first variables of a run: random, imported, calibrated.

    Args:
      config: seed, auxiliary start, calibration.
      module: the model that is trained.
      source: parameters to start from, or None.
      calibration: training batches for the step sizes; read only if any step size is new or
        ``source`` has another quantization policy. None leaves the step sizes without a value.

    Returns:
      (variables as numpy arrays, load report or None).

    Raises:
      ValueError: almost nothing of ``source`` fits the model, or it saw other pixels.
    """
    if source is None and config.optimizer.frozen and config.task == "detect":
        raise ValueError(
            f"config.optimizer.frozen={config.optimizer.frozen} would keep random parameters for "
            "ever: set config.init_from, or config.optimizer.frozen=() to train from scratch"
        )
    shapes = jax.eval_shape(lambda: _drawn(config, module))
    params, stats = shapes["params"], shapes["batch_stats"]
    report = None
    if source is not None:
        _check_pixels(config, source)
        params, report = merge(params, _flat(source, "params"))
        stats, stats_report = merge(stats, _flat(source, "batch_stats"))
        wanted = sum(not path.endswith(GRID_PARAMETERS) for path in params)
        if len(report.loaded) < 0.1 * wanted or stats_report.mismatched:
            raise ValueError(
                f"config.init_from={config.init_from!r} does not fit this model: "
                f"{report.summary()}; first that differ: "
                f"{(report.mismatched + stats_report.mismatched + report.new)[:5]}"
            )
    steps = [path for path in params if path.endswith("_step")]
    # Step sizes of another policy (more bits, say) are as good as none.
    kept = source is not None and source.quant.build() == config.quant.build()
    loaded = set(report.loaded) if report is not None and kept else set()
    calibrated = isinstance(module, Detector) and not loaded.issuperset(steps)
    # A weight's step comes from the weight; its first value would draw that weight for nothing.
    idle = [path for path in steps if path.endswith("kernel_step")] if calibrated else []
    params |= {path: np.full(shapes["params"][path].shape, np.nan, np.float32) for path in idle}
    made = _missing(config, module, {"params": params, "batch_stats": stats})
    params, stats = made["params"], made["batch_stats"]
    path = "auxiliary_queries"
    if report is not None and path in report.new and config.auxiliary.start == "object":
        params[path] = _copied_queries(config, params["query_embed"], params[path])
    variables = _unflatten(params, stats)
    if calibrated and calibration is not None and isinstance(module, Detector):
        variables = calibrate(config, module, variables, calibration)
    return variables, report


def _check_pixels(config: ExperimentConfig, source: ModelBundle) -> None:
    """Refuses parameters that were trained on images normalised otherwise."""
    for name in ("pixel_mean", "pixel_std"):
        mine, theirs = (getattr(model, name) for model in (config.model, source.config))
        if not np.allclose(mine, theirs, rtol=0, atol=1e-4):
            raise ValueError(
                f"config.init_from={config.init_from!r} was trained with {name}={theirs}, this "
                f"model has {mine}: set config.model.{name}={theirs}"
            )


def _drawn(config: ExperimentConfig, module: Detector | DensePretrainer) -> dict[str, Any]:
    """Random variables by the seed, flat by group."""
    images, mask = example_input(config.data.buckets[0])
    key = jax.random.fold_in(jax.random.key(config.seed), INIT)
    variables = module.init(key, images, mask)
    return {
        group: traverse_util.flatten_dict(variables[group], sep="/")
        for group in ("params", "batch_stats")
    }


def _missing(
    config: ExperimentConfig,
    module: Detector | DensePretrainer,
    groups: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, np.ndarray]]:
    """Variables with random values in place of the shapes among them; only those are compiled."""
    missing = [
        (group, path)
        for group, values in groups.items()
        for path, value in values.items()
        if isinstance(value, jax.ShapeDtypeStruct)
    ]

    @jax.jit
    def draw() -> list[jax.Array]:
        drawn = _drawn(config, module)
        return [drawn[group][path] for group, path in missing]

    made = {group: dict(values) for group, values in groups.items()}
    for (group, path), value in zip(missing, draw() if missing else (), strict=True):
        made[group][path] = np.asarray(value)
    return made


def _flat(source: ModelBundle, group: str) -> dict[str, Any]:
    return traverse_util.flatten_dict(source.variables[group], sep="/")


def _unflatten(params: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "params": traverse_util.unflatten_dict(params, sep="/"),
        "batch_stats": traverse_util.unflatten_dict(stats, sep="/"),
    }


def _copied_queries(config: ExperimentConfig, queries, auxiliary) -> np.ndarray:
    """Auxiliary queries as copies of the object queries, in turn, plus noise [ours]."""
    count = auxiliary.shape[0]
    key = jax.random.fold_in(jax.random.key(config.seed), AUXILIARY_START)
    noise = np.asarray(jax.random.normal(key, auxiliary.shape)) * np.std(queries)
    copies = np.asarray(queries)[np.arange(count) % queries.shape[0]]
    return (copies + config.auxiliary.noise * noise).astype(np.float32)


def calibrate(
    config: ExperimentConfig,
    module: Detector,
    variables: Mapping[str, Any],
    batches: Iterable[Mapping[str, np.ndarray]],
) -> dict[str, Any]:
    """Sets every step size from what the float model sees on a few training batches.

    Args:
      config: number of batches and method.
      module: quantized model.
      variables: its variables; float parameters trained or imported, step sizes of any value.
      batches: training batches (images, size).

    Returns:
      New variables.
    """
    params = calibrated_parameters(
        traverse_util.flatten_dict(variables["params"], sep="/"),
        record_ops(module, variables, config.data.buckets[0]),
        observe(config, module, variables, batches),
        config.quant.calibration_method,
        config.quant.equalize,
    )
    return {**variables, "params": traverse_util.unflatten_dict(params, sep="/")}


def observe(
    config: ExperimentConfig,
    module: Detector,
    variables: Mapping[str, Any],
    batches: Iterable[Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """What every activation site sees in the float model, on a few training batches.

    Args: as for :func:`calibrate`.

    Returns:
      ``path/site`` -> samples, as ``calibrated_parameters`` takes them.
    """
    observer = module.clone(policy=dataclasses.replace(module.policy, arithmetic="observe"))

    @jax.jit
    def seen_in(variables, images, mask):
        _, seen = observer.apply(variables, images, mask, mutable=[OBSERVED])
        return seen[OBSERVED]

    samples = []
    for _, batch in zip(range(config.quant.calibration_batches), batches, strict=False):
        images = _without_padding(batch["images"][:CALIBRATION_ROWS], batch["size"])
        seen = seen_in(variables, images, np.ones(images.shape[:3], bool))
        samples.append(traverse_util.flatten_dict(jax.device_get(seen), sep="/"))
    if not samples:
        raise ValueError("calibration needs at least one batch: config.quant.calibration_batches")
    return merge_samples(samples)


def _without_padding(images: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Every image's real area stretched over its bucket: padding must not set step sizes."""
    height, width = images.shape[1:3]
    stretched = []
    for image, (h, w) in zip(images, sizes, strict=False):
        real = Image.fromarray(image[:h, :w])
        stretched.append(np.asarray(real.resize((width, height), Image.Resampling.BILINEAR)))
    return np.stack(stretched)
