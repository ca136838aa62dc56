"""Sizes that follow from the training set and from the devices.

Of the set: buckets, resizes, boxes, queries, classes, steps. Of the devices: the batch, the
learning rates that go with it, and the dtype that carries activations. A configuration leaves them
open (``data.fit``, images a chip, "auto", and 0 or -1 for the others); here they are filled in,
once the data are known, and the result is what the run keeps as its configuration.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import jax
import numpy as np

from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.data.fit import fitted, small_share
from aqdetr_jax.parallel.hosts import say_once
from aqdetr_jax.parallel.mesh import Device, mesh_shape
from aqdetr_jax.paths import as_path
from aqdetr_jax.training.config import ExperimentConfig, OptimizerConfig, TrainConfig
from aqdetr_jax.training.effects import idle

BY_PLATFORM = "auto"
"""Of ``model.dtype``: bfloat16 where the chip computes in it, float32 elsewhere."""

BY_DATA = -1
"""Of ``model.num_auxiliary``: twice as many as object queries, and room for all repeats [ours]."""

COCO_CLASSES = 91
"""Outputs of the official heads: COCO's category ids reach to 90."""

_MOST_QUERIES = 300
_FEW_PIXELS = 0.75  # of the stride, below which the sides of boxes are worth a word


def with_batch(config: ExperimentConfig, chips: int | None = None) -> ExperimentConfig:
    """Fills in what depends on the number of devices; what is pinned stays.

    ``train.batch_per_chip`` becomes ``train.batch_size`` (the same of the evaluation's), and
    learning rates with an ``optimizer.reference_batch`` those of that batch.

    Args:
      config: the experiment.
      chips: devices along the batch; None = of this machine, as ``config.mesh`` says.

    Raises:
      ValueError: devices and micro-batches cannot share the batch evenly, or there are other
        devices than ``config.mesh`` wants.
    """
    train, micro = config.train, config.train.accumulate
    if chips is None:
        even = None if train.batch_per_chip else max(train.batch_size // micro, 1)
        chips = devices_along_data(config, even)
    batch = train.batch_per_chip * chips * micro or train.batch_size
    if batch % (chips * micro):
        shares = f"{chips} device{'s' * (chips > 1)} along 'data'"
        if micro > 1:
            shares += f" with config.train.accumulate={micro}"
        few = "are too few for" if batch < chips * micro else "cannot be shared evenly by"
        raise ValueError(
            f"config.train.batch_size={batch} images {few} {shares}: use a multiple of "
            f"{chips * micro} (config.train.batch_per_chip=1 is the smallest)"
        )
    evaluated = train.eval_batch_per_chip * chips or train.eval_batch_size
    train = dataclasses.replace(
        train,
        batch_size=batch,
        batch_per_chip=0,
        eval_batch_size=evaluated,
        eval_batch_per_chip=0,
    )
    return dataclasses.replace(config, train=train, optimizer=_rates(config, batch))


def devices_along_data(
    config: ExperimentConfig,
    batch_size: int | None = None,
    devices: Sequence[Device] | None = None,
) -> int:
    """Devices that share a batch; arguments and errors are ``make_mesh``'s."""
    mesh = config.mesh
    data = None if mesh.data < 0 else mesh.data
    return mesh_shape(data, mesh.model, batch_size=batch_size, devices=devices)[0]


def eval_batch_size(config: ExperimentConfig) -> int:
    """Images a batch in evaluation."""
    train = config.train
    if not train.eval_batch_per_chip:
        return train.eval_batch_size
    return train.eval_batch_per_chip * devices_along_data(config)


def _rates(config: ExperimentConfig, batch: int) -> OptimizerConfig:
    """The optimizer with rates for a batch, which stand as they are from then on."""
    optimizer = config.optimizer
    if not optimizer.reference_batch:
        return optimizer
    factor = batch / optimizer.reference_batch
    if optimizer.batch_rule == "sqrt":
        factor = math.sqrt(factor)
    unused = [pattern for pattern, _ in idle(config)]
    rates = {
        name: getattr(optimizer, name) * factor
        for name in ("lr", "lr_backbone", "lr_steps")
        if not any(fnmatchcase(f"optimizer.{name}", pattern) for pattern in unused)
    }
    return dataclasses.replace(optimizer, **rates, reference_batch=0, batch_rule="sqrt")


def describe_batch(given: ExperimentConfig, resolved: ExperimentConfig) -> str:
    """One sentence on the batch and the rates that follow from it; "" where none does.

    Args:
      given: the configuration before :func:`with_batch`.
      resolved: after it.
    """
    train, optimizer = given.train, given.optimizer
    batch = resolved.train.batch_size
    parts = []
    if train.batch_per_chip or train.accumulate > 1:
        text = f"{batch} images a step"
        if train.batch_per_chip:
            chips = batch // train.batch_per_chip // train.accumulate
            text += f", {train.batch_per_chip} on each of {chips} device{'s' * (chips > 1)}"
        if train.accumulate > 1:
            text += f", in {train.accumulate} micro-batches"
        parts.append(text)
    if optimizer.reference_batch:
        ratio = f"{batch}/{optimizer.reference_batch}"
        factor = f"sqrt({ratio})" if optimizer.batch_rule == "sqrt" else ratio
        parts.append(f"learning rate {resolved.optimizer.lr:.3g} = {optimizer.lr:.3g} x {factor}")
    return "; ".join(parts)


def with_data(
    config: ExperimentConfig,
    dataset: DetectionDataset,
    *,
    chips: int | None = None,
    device: Device | None = None,
) -> ExperimentConfig:
    """Fills in what depends on the training set and on the devices; what is pinned stays.

    First :func:`with_batch`. ``data.fit`` becomes buckets, resizes and scales;
    ``data.max_boxes=0``, ``model.num_queries=0``, ``model.num_auxiliary=-1`` and
    ``model.num_classes=0`` their numbers; ``train.epochs`` steps; ``model.dtype="auto"`` what suits
    the devices.

    Args:
      config: the experiment.
      dataset: its training set.
      chips: see :func:`with_batch`.
      device: see :func:`with_devices`; None = of this machine.

    Raises:
      ValueError: the data have more classes than a pinned number, neither steps nor epochs are
        given, or see :func:`with_batch`.
    """
    config = with_batch(config, chips)
    data, model, train = config.data, config.model, config.train
    if data.fit:
        data = fitted(data, dataset, model.backbone.output_stride)
    most = dataset.max_boxes_per_image()
    if data.max_boxes == 0:
        data = dataclasses.replace(data, max_boxes=max(most, 1))
    if model.num_queries == 0:
        # Room for twice the boxes, never less than for all of them.
        wanted = min(10 * math.ceil(max(2 * most, 20) / 10), max(_MOST_QUERIES, most))
        model = dataclasses.replace(model, num_queries=wanted)
    if model.num_auxiliary == BY_DATA:
        wanted = max(2 * model.num_queries, config.auxiliary.repeats * most)
        model = dataclasses.replace(model, num_auxiliary=wanted)
    if model.num_classes == 0:
        model = dataclasses.replace(model, num_classes=dataset.num_classes)
    elif dataset.num_classes > model.num_classes:
        raise ValueError(
            f"{dataset.name} has {dataset.num_classes} classes, but config.model.num_classes is "
            f"{model.num_classes}; set it to 0 to take the data's"
        )
    train = with_steps(train, len(dataset))
    config = dataclasses.replace(config, data=data, model=model, train=train)
    return with_devices(config, jax.devices()[0] if device is None else device)


def has_data(data: DataConfig) -> bool:
    """Whether there is a data set to ask: a root that does not exist here is none."""
    if data.kind == "shapes":
        return True
    return (bool(data.root) and as_path(data.root).exists()) or bool(data.train_annotations)


def with_data_alone(
    config: ExperimentConfig, dataset: DetectionDataset, device: Device
) -> ExperimentConfig:
    """What of data and model follows from the training set; batch, rates and steps stay as given.

    Args:
      config: the experiment.
      dataset: its training set.
      device: see :func:`with_devices`.

    Raises:
      ValueError: see :func:`with_data`.
    """
    any_batch = dataclasses.replace(config, train=TrainConfig(steps=1, batch_per_chip=1))
    filled = with_data(any_batch, dataset, chips=1, device=device)
    return dataclasses.replace(config, data=filled.data, model=filled.model)


def with_steps(train: TrainConfig, images: int) -> TrainConfig:
    """Fills in ``steps`` from ``epochs``.

    Args:
      train: the loop.
      images: of the training set.

    Raises:
      ValueError: both are 0.
    """
    if train.epochs:
        steps = max(1, math.ceil(train.epochs * images / train.batch_size))
        train = dataclasses.replace(train, steps=min(steps, train.steps) if train.steps else steps)
    if not train.steps:
        raise ValueError("config.train.steps and config.train.epochs are both 0: set one of them")
    return train


def with_devices(config: ExperimentConfig, device: Device) -> ExperimentConfig:
    """Fills in what depends on the kind of device; what is pinned stays.

    ``model.dtype="auto"`` becomes bfloat16 on a TPU, and on a GPU of compute capability 8 or more;
    float32 elsewhere: CPUs compute bfloat16 by way of float32.

    Args:
      config: any.
      device: one of those that train, which need not be here (a topology's).
    """
    if config.model.dtype != BY_PLATFORM:
        return config
    capability = getattr(device, "compute_capability", "0")
    native = device.platform == "tpu" or (device.platform == "gpu" and float(capability) >= 8)
    model = dataclasses.replace(config.model, dtype="bfloat16" if native else "float32")
    return dataclasses.replace(config, model=model)


def say_sizes(
    given: ExperimentConfig, resolved: ExperimentConfig, dataset: DetectionDataset
) -> None:
    """Says what a set is, and which sizes, dtype and rates came of what was left open.

    Args:
      given: the configuration before :func:`with_data`.
      resolved: after it.
      dataset: the training set.
    """
    if given.data.fit or not given.data.max_boxes or not given.model.num_queries:
        say_once(describe(resolved, dataset))
    if given.model.dtype == BY_PLATFORM:
        say_once(
            f"Activations are {resolved.model.dtype} on this {jax.devices()[0].platform} "
            "(config.model.dtype)"
        )
    batch = describe_batch(given, resolved)
    if batch:
        say_once(f"{resolved.name}: {batch}")


def describe(config: ExperimentConfig, dataset: DetectionDataset) -> str:
    """One paragraph on a set and on the sizes that a resolved configuration has for it."""
    sizes = np.array([dataset.image_size(i) for i in range(len(dataset))])
    height, width = (int(x) for x in np.median(sizes, axis=0))
    names = ", ".join(dataset.class_names[:8]) + (", ..." if dataset.num_classes > 8 else "")
    buckets = ", ".join(f"{w}x{h}" for h, w in config.data.buckets)
    text = (
        f"{dataset.name}: {len(dataset)} images (median {width}x{height}), up to "
        f"{dataset.max_boxes_per_image()} boxes an image, {dataset.num_classes} "
        f"class{'es' * (dataset.num_classes != 1)} ({names}). Padded to {buckets} (width x "
        f"height), {config.data.max_boxes} boxes; {config.model.num_queries} object queries"
    )
    # What the boxes are left with, where more pixels would help them.
    stride, small = config.model.backbone.output_stride, small_share(dataset)
    side = small * math.sqrt(max(math.prod(bucket) for bucket in config.data.buckets))
    if side < _FEW_PIXELS * stride:
        needed = 32 * math.ceil(stride / small / 32) if small else 0
        remedy = f": config.data.fit={needed} would give them {stride}" if needed else ""
        text += f". A quarter of the boxes have sides under {side:.0f} pixels there{remedy}"
    return text
