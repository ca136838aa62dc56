"""A key that is given and has no effect is an error, with the reason.

The rules are one table. A configuration file is judged as it stands; what the command line gives
is judged with the whole configuration, so that an override may make a key of the file idle, but
never be idle itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from aqdetr_jax.config_types import ConfigError, from_dataclass
from aqdetr_jax.training.config import ExperimentConfig

_GENERATED = ("num_train", "num_eval", "image_size", "set_seed", "cache_dir")
_FILES = ("train_images", "train_annotations", "eval_images", "eval_annotations")
_FITTED = (
    "buckets",
    "eval_buckets",
    "eval_short_side",
    "eval_max_size",
    "augment.scales",
    "augment.max_size",
    "augment.crop_resize",
    "augment.crop_size",
)
PRETRAIN_IDLE = (
    "quant.*",
    "auxiliary.*",
    "distill.*",
    "loss.*",
    "train.eval_*",
    "train.pictures",
    "train.phases",
    "model.num_queries",
    "model.num_auxiliary",
    "model.auxiliary_groups",
    "model.decoder_layers",
    "model.query_start",
    "model.deformable.box_refine",
    "model.deformable.two_stage",
)
"""Patterns of the keys that a dense pretraining has no use for."""

Rule = tuple[str, str]
"""A pattern (``fnmatch``) of dotted keys, and why they have no effect."""


def check_effects(config: ExperimentConfig, given: Iterable[str], where: str) -> None:
    """Refuses given keys that change nothing.

    Args:
      config: the whole configuration.
      given: dotted keys.
      where: who gives them, for the message.

    Raises:
      ConfigError: one of them is idle; the message says why.
    """
    rules = list(idle(config))
    for key in given:
        for pattern, reason in rules:
            if fnmatchcase(key, pattern):
                raise ConfigError(f"{where}: config.{key} has no effect: {reason}")


def without_idle(config: ExperimentConfig) -> dict[str, Any]:
    """The configuration as a file that holds no key without an effect.

    Overrides may have made keys of its own file idle, which a new file must not give.
    """
    patterns = [pattern for pattern, _ in idle(config)]

    def kept(node: Any, path: str) -> Any:
        if not isinstance(node, dict):
            return node
        inner = {key: f"{path}.{key}" if path else key for key in node}
        return {
            key: kept(node[key], name)
            for key, name in inner.items()
            if not any(fnmatchcase(name, pattern) for pattern in patterns)
        }

    return kept(from_dataclass(config), "")


_UNJUDGED = (
    "data.augment.*",
    "data.max_boxes",
    "data.allow_truncation",
    "data.workers",
    "data.train_images",
    "data.train_annotations",
    "data.num_train",
)
"""Patterns of the keys of ``data`` that an evaluation does not read."""


def check_evaluation_keys(overrides: Iterable[str]) -> None:
    """Refuses what an evaluation cannot change: the model is as it was saved.

    Args:
      overrides: ``a.b=value`` texts.

    Raises:
      ConfigError: one is neither of the evaluated data nor of how they are read.
    """
    for text in overrides:
        key = text.partition("=")[0]
        read = key.startswith("data.") and not any(fnmatchcase(key, p) for p in _UNJUDGED)
        if not read and key not in ("train.eval_batch_size", "train.eval_batch_per_chip"):
            raise ConfigError(
                f"command line: config.{key} has no effect: a saved model is judged as it is"
            )


_TRAINED = (
    "train.*",
    "optimizer.*",
    "auxiliary.*",
    "distill.*",
    "loss.*",
    "model.num_auxiliary",
    "model.auxiliary_groups",
    "model.remat",
)
"""Patterns of the keys that only training reads, but for the batch of its evaluations."""


def check_calibration_keys(overrides: Iterable[str]) -> None:
    """Refuses what changes nothing where a model is calibrated and judged, and not trained.

    Args:
      overrides: ``a.b=value`` texts.

    Raises:
      ConfigError: one is of training alone.
    """
    for text in overrides:
        key = text.partition("=")[0]
        batch = key in ("train.eval_batch_size", "train.eval_batch_per_chip")
        if not batch and any(fnmatchcase(key, pattern) for pattern in _TRAINED):
            raise ConfigError(f"command line: config.{key} has no effect: nothing is trained")


def idle(config: ExperimentConfig) -> Iterator[Rule]:
    """The keys that a configuration makes idle."""
    yield from _data(config)
    yield from _model(config)
    yield from _quant(config)
    if config.task == "pretrain":
        yield from _pretrain()
    else:
        yield from _auxiliary(config)
        yield from _distill(config)
        yield from _loss(config)
    yield from _schedule(config)


def _data(config: ExperimentConfig) -> Iterator[Rule]:
    data = config.data
    if data.kind == "shapes":
        yield "data.max_pixels", "data.kind is 'shapes': generated images are not read from files"
        for key in ("root", *_FILES):
            yield f"data.{key}", "data.kind is 'shapes', the generated set: set data.kind=auto"
        yield "data.on_error", "data.kind is 'shapes', whose images can always be read"
    else:
        for key in _GENERATED:
            yield f"data.{key}", f"it is of the generated set, and data.kind is {data.kind!r}"
    if data.kind in ("shapes", "tfds"):
        yield "data.follow_links", f"data.kind is {data.kind!r}, which has no image files"
    if data.kind not in ("shapes", "coco", "auto"):
        for key in _FILES:
            yield f"data.{key}", f"it is of COCO files, and data.kind is {data.kind!r}"
    if data.fit:
        for key in _FITTED:
            yield f"data.{key}", f"it follows from data.fit={data.fit}; set data.fit=0 to give it"
    elif data.eval_short_side is None:
        yield "data.eval_max_size", "it limits a resize, and data.eval_short_side is None"
    if not data.max_boxes:
        yield "data.allow_truncation", "data.max_boxes is 0, and takes them all"
    if not data.num_threads:
        yield "data.prefetch", "data.num_threads is 0: nothing is read ahead"
    augment = data.augment
    if not augment.crop_probability:
        for key in ("crop_resize", "crop_size"):
            yield f"data.augment.{key}", "data.augment.crop_probability is 0"
    if not augment.scales and not data.fit:
        yield "data.augment.max_size", "it limits a resize, and data.augment.scales is ()"


def _model(config: ExperimentConfig) -> Iterator[Rule]:
    model = config.model
    if model.family == "detr":
        yield "model.deformable.*", "model.family is 'detr'"
    elif model.deformable.levels == 1:
        yield "model.deformable.stages", "with one level it is the last stage's"
    if model.family == "deformable":
        yield "model.query_start", "model.family is 'deformable': it is of DETR's queries"


def _quant(config: ExperimentConfig) -> Iterator[Rule]:
    quant = config.quant
    if not quant.quantized:
        for key in (
            "residual",
            "attention_granularity",
            "grid",
            "renormalize",
            "align_queries",
            "equalize",
            "calibration_*",
        ):
            yield f"quant.{key}", "nothing is quantized: quant.policy is 'float'"
        for key in ("optimizer.lr_steps", "train.quantizers_every"):
            yield key, "there are no step sizes: quant.policy is 'float'"
        return
    if quant.grid != "centred":
        yield "quant.equalize", f"it scales centred inputs, and quant.grid is {quant.grid!r}"
    if quant.policy == "float":
        yield "quant.residual", "quant.policy is 'float': quant.rules say all there is"


def _pretrain() -> Iterator[Rule]:
    for pattern in PRETRAIN_IDLE:
        yield pattern, "a dense pretraining trains a float backbone and encoder"


def _auxiliary(config: ExperimentConfig) -> Iterator[Rule]:
    if not config.model.num_auxiliary:
        yield "auxiliary.*", "there are no auxiliary queries: model.num_auxiliary is 0"
        yield "model.auxiliary_groups", "there are no auxiliary queries: model.num_auxiliary is 0"
    elif not config.init_from and config.auxiliary.start == "object":
        for key in ("start", "noise"):
            yield f"auxiliary.{key}", "there are no queries to start from: init_from is ''"
    elif config.auxiliary.start == "random":
        yield "auxiliary.noise", "auxiliary queries start at random: auxiliary.start"


def _distill(config: ExperimentConfig) -> Iterator[Rule]:
    weights = config.distill.weights
    if not weights.active:
        for key in ("source", "teacher", "weights.kind", "weights.locations", "weights.tau"):
            yield f"distill.{key}", "no distillation weight is positive: distill.weights"
        return
    if config.distill.source == "float_path":
        yield "distill.teacher", "distill.source is 'float_path', which is no other network"
    if not weights.foreground:
        yield "distill.weights.tau", "it is of distill.weights.foreground, which is 0"
    if not weights.maps:
        for key in ("kind", "locations"):
            yield f"distill.weights.{key}", "no weight of attention maps is positive"
    elif config.model.family == "detr":
        yield "distill.weights.locations", "only deformable attention has sampling locations"
    elif weights.kind not in ("kl", "mse"):
        yield "distill.weights.locations", f"distill.weights.kind is {weights.kind!r}"


def _loss(config: ExperimentConfig) -> Iterator[Rule]:
    if config.loss.kind == "focal":
        yield "loss.eos", "a focal loss has no class 'no object'"
    else:
        yield "loss.focal_*", "the class loss is a softmax"


def _schedule(config: ExperimentConfig) -> Iterator[Rule]:
    optimizer, train = config.optimizer, config.train
    if train.batch_per_chip:
        yield "train.batch_size", f"it follows from train.batch_per_chip={train.batch_per_chip}"
    if train.eval_batch_per_chip:
        each = train.eval_batch_per_chip
        yield "train.eval_batch_size", f"it follows from train.eval_batch_per_chip={each}"
    if not optimizer.reference_batch:
        yield "optimizer.batch_rule", "rates stand as they are: optimizer.reference_batch is 0"
    if optimizer.schedule != "step":
        yield "optimizer.drop_at", f"optimizer.schedule is {optimizer.schedule!r}"
    if optimizer.schedule != "cosine":
        yield "optimizer.final", f"optimizer.schedule is {optimizer.schedule!r}"
    if {pattern.strip("^/") for pattern in optimizer.frozen} & {"backbone"}:
        yield "optimizer.lr_backbone", "optimizer.frozen holds the backbone"
    if not optimizer.slow:
        yield "optimizer.slow_factor", "no parameters are slow: optimizer.slow is ()"
