"""The sizes that a step on a slice has: of the configuration, of the data, or COCO's, as stated."""

from __future__ import annotations

import dataclasses

from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.planning.chips import Slice
from aqdetr_jax.training import sizing
from aqdetr_jax.training.config import ExperimentConfig

COCO_TRAIN, COCO_EVAL = 118_287, 5_000
"""Images of train2017 and val2017."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A configuration with nothing left open.

    Attributes:
      config: ``train.batch_size`` and ``train.eval_batch_size`` are the rows of a step over the
        slice, ``train.steps`` those of the run.
      rows: images a replica at a time (a replica is one chip, unless ``mesh.model`` or the kind of
        chip says otherwise); a step takes ``train.accumulate`` times as many.
      replicas: devices along "data".
      images: of the training set.
      eval_images: of the evaluation set.
      notes: what was assumed, a sentence each.
    """

    config: ExperimentConfig
    rows: int
    replicas: int
    images: int
    eval_images: int
    notes: tuple[str, ...]


def replicas_on(config: ExperimentConfig, place: Slice) -> int:
    """Devices along "data" of the mesh that a run makes on a slice; errors are ``make_mesh``'s."""
    return sizing.devices_along_data(config, devices=[place] * place.devices)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the data say, or what is assumed in their place.

    Attributes:
      config: with every size of data and model; what depends on the slice is as it was given.
      images: of the training set.
      eval_images: of the evaluation set.
      notes: what was assumed, a sentence each.
    """

    config: ExperimentConfig
    images: int
    eval_images: int
    notes: tuple[str, ...]


def read_facts(config: ExperimentConfig, place: Slice, images: int | None = None) -> Facts:
    """Reads the data set if there is one.

    Args:
      config: as given.
      place: the slice, for what follows from its kind.
      images: of the training set, in place of the data's.

    Raises:
      ValueError: a size follows from data which are not there; the message says what to give.
    """
    config = sizing.with_devices(config, place)
    given = config.train
    notes: list[str] = []
    if sizing.has_data(config.data):
        train_set = open_dataset(config.data, train=True)
        # The batch, which --per_chip may replace, follows in ``resolve``.
        config = sizing.with_data_alone(config, train_set, place)
        found, eval_images = len(train_set), len(open_dataset(config.data, train=False))
    else:
        config = _without_data(config, notes)
        found, eval_images = COCO_TRAIN, COCO_EVAL
        if images is None and config.data.kind == "coco":
            notes.append(
                f"{COCO_TRAIN:,} training and {COCO_EVAL:,} validation images: COCO's (no data "
                "are read; --images=N for others)"
            )
        elif images is None and given.epochs:
            raise ValueError(
                f"config.train.epochs={given.epochs:g} of how many images? There are none at "
                f"config.data.root={config.data.root!r}: give --images=N, or set data.root"
            )
    found = found if images is None else images
    return Facts(config, found, eval_images, tuple(notes))


def resolve(facts: Facts, place: Slice, per_chip: int | None = None) -> Sizes:
    """Fills in what depends on the slice: batches and steps.

    Args:
      facts: of the configuration.
      place: the slice.
      per_chip: images a replica, in place of the configuration's batch sizes.

    Raises:
      ValueError: a batch that the slice cannot share; the message says what to give.
    """
    config = with_batch(facts.config, place, per_chip)
    train = sizing.with_steps(config.train, facts.images)
    replicas = replicas_on(config, place)
    return Sizes(
        dataclasses.replace(config, train=train),
        train.batch_size // replicas // train.accumulate,
        replicas,
        facts.images,
        facts.eval_images,
        facts.notes,
    )


def with_batch(
    config: ExperimentConfig, place: Slice, per_chip: int | None = None
) -> ExperimentConfig:
    """The rows of a training step and of an evaluation step, over the slice.

    Raises:
      ValueError: the slice cannot share a batch evenly, or is none for ``config.mesh``.
    """
    replicas = replicas_on(config, place)
    train = config.train
    if per_chip is not None:
        if per_chip < 1:
            raise ValueError(f"--per_chip={per_chip} must be at least 1")
        train = dataclasses.replace(train, batch_per_chip=per_chip, eval_batch_per_chip=per_chip)
    config = sizing.with_batch(dataclasses.replace(config, train=train), replicas)
    # As the evaluator does: its last batch is filled up anyway.
    evaluated = -(-config.train.eval_batch_size // replicas) * replicas
    train = dataclasses.replace(config.train, eval_batch_size=evaluated)
    return dataclasses.replace(config, train=train)


def _without_data(config: ExperimentConfig, notes: list[str]) -> ExperimentConfig:
    """What the data would say; COCO's number of classes where it is open."""
    data, model = config.data, config.model
    remedies = []
    if data.fit:
        remedies.append("data.fit=0 with data.buckets")
    if not data.max_boxes:
        remedies.append("data.max_boxes")
    if not model.num_queries:
        remedies.append("model.num_queries")
    if model.num_auxiliary == sizing.BY_DATA:
        remedies.append("model.num_auxiliary")
    if remedies:
        raise ValueError(
            "sizes of this configuration follow from its data, and there are none at "
            f"config.data.root={data.root!r}: set data.root, or {', '.join(remedies)}"
        )
    if not model.num_classes:
        notes.append(
            f"model.num_classes={sizing.COCO_CLASSES}: COCO's official head (no data are read; "
            "model.num_classes=N for others)"
        )
        model = dataclasses.replace(model, num_classes=sizing.COCO_CLASSES)
    return dataclasses.replace(config, model=model)
