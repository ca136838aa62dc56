"""A foreign checkpoint becomes a model folder: recognised, checked against our model, reported."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from aqdetr_jax.checkpoint.model_folder import InputRule, ModelBundle, save_model
from aqdetr_jax.checkpoint.params import check_target
from aqdetr_jax.checkpoint.transfer import LoadReport, merge
from aqdetr_jax.interop import labels, names, recognise, variant
from aqdetr_jax.interop.backbones import backbone_config, backbone_name, with_our_eps
from aqdetr_jax.interop.checkpoints import Checkpoint, read_checkpoint
from aqdetr_jax.interop.preprocessing import (
    LONG_SIDE,
    SHORT_SIDE,
    ImageRule,
    buckets,
    image_rule,
)
from aqdetr_jax.interop.tables import TABLES
from aqdetr_jax.interop.weight_sets import unwrap
from aqdetr_jax.models.backbone import build_backbone
from aqdetr_jax.models.config import DeformableConfig, DetrConfig
from aqdetr_jax.models.detector import build_detector, example_input
from aqdetr_jax.quant.config import QuantConfig

Flat = dict[str, Any]

REPORT = "load_report.json"
"""File of a converted model's folder that says what became of every parameter."""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Attributes:
      bundle: the model.
      title: what the source was recognised as.
      report: what became of the parameters; what is dropped has the source's names.
      shapes: of each mismatched parameter, (the source's shape, ours).
      notes: what was assumed where nothing told.
    """

    bundle: ModelBundle
    title: str
    report: LoadReport
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    notes: list[str]

    def summary(self) -> str:
        """One line for people."""
        counters = "batch norms' counters"
        dropped = (
            counters if name.endswith("num_batches_tracked") else name
            for name in self.report.dropped
        )
        line = self.report._replace(dropped=[]).summary()
        if self.report.dropped:
            line += f", {len(self.report.dropped)} dropped ({_first(sorted(set(dropped)))})"
        return line

    def to_dict(self) -> dict[str, Any]:
        """The load report for a JSON file."""
        lists = self.report._asdict()
        mismatched = [
            {"parameter": path, "source": list(theirs), "model": list(ours)}
            for path, (theirs, ours) in self.shapes.items()
        ]
        return {
            "recognised": self.title,
            "source": self.bundle.info["source"],
            "notes": self.notes,
            **lists,
            "mismatched": mismatched,
        }


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    num_classes: int | None = None,
    classes: str | None = None,
    weights: str | None = None,
    name: str | None = None,
    dilation: bool | None = None,
) -> Conversion:
    """Writes a model folder from a foreign checkpoint; it appears whole or not at all.

    Args:
      source: file or folder, see ``interop.checkpoints``.
      folder: the model folder; an earlier model of that name is replaced, nothing else is.
      num_classes: classes of a new, random class head; None, or the source's number, keeps its.
      classes: names of the classes, see ``labels.given``; None = the source's, or placeholders.
      weights: which set of weights of a file that has several, see ``weight_sets.choose``.
      name: name in results; by default made from what the model is.
      dilation: whether the backbone is dilated (DC5), where the source does not say.

    Raises:
      FileNotFoundError, FileExistsError: source or folder.
      ValueError: the source is damaged, of no known kind, contradicts itself, or lacks anything
        but a class head that is made anew; the message says which.
    """
    check_target(folder)
    checkpoint = read_checkpoint(source, weights)
    made = import_checkpoint(
        checkpoint, num_classes=num_classes, classes=classes, name=name, dilation=dilation
    )
    save_model(folder, made.bundle, {REPORT: made.to_dict()})
    return made


def import_checkpoint(
    checkpoint: Checkpoint,
    *,
    num_classes: int | None = None,
    classes: str | None = None,
    name: str | None = None,
    dilation: bool | None = None,
) -> Conversion:
    """The model of a checkpoint; see ``convert``."""
    source = checkpoint.name
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"--num-classes must be at least 1, got {num_classes}")

    # --- what it is -------------------------------------------------------------------------
    unwrapped = unwrap(checkpoint.state, recognise.is_known)
    state = unwrapped.state
    table, kind = recognise.recognise(state, source)
    try:
        params, stats = names.translate(state, TABLES[table])
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    stats = with_our_eps(stats, kind.norm_eps)
    shapes = {path: np.shape(value) for path, value in params.items()}
    where = checkpoint.settings_from
    facts, notes = variant.agreed_facts(
        variant.seen_facts(shapes, kind.family, source),
        variant.declared_facts(checkpoint.settings, where, kind.family, source),
        where,
        kind.family,
        dilation,
        source,
    )

    # --- our model of it --------------------------------------------------------------------
    class_names, category_ids, more = _classes(
        checkpoint, kind.family, facts.get("classes"), num_classes, classes
    )
    images = image_rule(checkpoint.preprocessing, source)
    images = images._replace(mean=images.mean or kind.mean, std=images.std or kind.std)
    rule, pixels = _input_rule(images)
    notes = [*checkpoint.notes, *unwrapped.notes, *notes, *more]
    config = dataclasses.replace(model_config(facts, kind.family, source), **pixels)
    config = dataclasses.replace(config, num_classes=len(class_names))
    if config.deformable.box_refine and table.startswith("huggingface"):
        layers = config.decoder_layers + config.deformable.two_stage
        params = recognise.tied_heads(params, layers)

    # --- its parameters ---------------------------------------------------------------------
    dropped = [unwrapped.given[name] for name in recognise.dropped_names(state, table)]
    dropped += unwrapped.outside
    variables, report, unlike = _fitted(
        config, kind, params, stats, dropped, num_classes is not None, source
    )
    info = {
        "name": name or default_name(config, kind.family),
        "source": {"files": checkpoint.hashes, "naming": table},
    }
    bundle = ModelBundle(config, QuantConfig(), rule, class_names, category_ids, variables, info)
    title = f"{kind.title}: {_describe(config, kind.family)}"
    return Conversion(bundle, title, report, unlike, notes)


# --- the model ----------------------------------------------------------------------------------


def model_config(facts: Mapping[str, Any], family: variant.Family, source: str) -> DetrConfig:
    """Our configuration from the facts, classes left at 0."""
    backbone = backbone_config(facts)
    if family == "backbone":
        return DetrConfig(backbone=backbone, num_classes=0)
    if facts["dim"] % facts["heads"]:
        raise ValueError(
            f"{source}: a width of {facts['dim']} does not split into {facts['heads']} heads"
        )
    deformable = DeformableConfig()
    if family == "deformable":
        levels = facts["levels"]
        deformable = DeformableConfig(
            levels=levels,
            # With one level the number of stages says nothing: it is the last one.
            stages=facts["stages"] if levels > 1 else deformable.stages,
            points=facts["points"],
            box_refine=facts["box_refine"],
            two_stage=facts["two_stage"],
        )
    return DetrConfig(
        backbone=backbone,
        num_classes=0,
        num_queries=facts["num_queries"],
        dim=facts["dim"],
        heads=facts["heads"],
        encoder_layers=facts["encoder_layers"],
        decoder_layers=facts["decoder_layers"],
        ffn=facts["ffn"],
        pre_norm=facts["pre_norm"],
        family=family,
        deformable=deformable,
    )


def _classes(
    checkpoint: Checkpoint,
    family: variant.Family,
    count: int | None,
    wanted: int | None,
    given: str | None,
) -> tuple[tuple[str, ...], tuple[int, ...], list[str]]:
    """Names and category ids of the model's classes, and notes."""
    options = {"--num-classes": wanted, "--classes": given}
    if family == "backbone":
        for option, value in options.items():
            if value is not None:
                raise ValueError(f"{checkpoint.name}: is a backbone, without a head for {option}")
        return (), (), []
    if count is None and wanted is None:
        raise ValueError(f"{checkpoint.name}: has no class head; --num-classes makes a new one")
    new = wanted is not None and wanted != count
    outputs = wanted if new else count
    assert outputs is not None
    notes = [f"the class head is new, for {outputs} classes"] if new else []
    if wanted is not None and not new:
        notes.append(f"the source has {count} classes: its class head is kept")
    ids = tuple(range(outputs))
    if given is not None:
        names, ids = labels.given(given, outputs)
        return names, ids, notes
    if new:
        notes[-1] += ": names come with the data it is trained on"
        return labels.placeholders(outputs), ids, notes
    if checkpoint.settings_from == "config.json":
        found = labels.class_names(checkpoint.settings, outputs, checkpoint.name)
        if found is not None:
            return found, ids, notes
    names, note = labels.placeholders(outputs), f"the names of its {outputs} classes are not known"
    if outputs == labels.COCO_OUTPUTS:
        names = labels.coco_outputs()
        note = f"{outputs} classes without names: taken as COCO's ids 0 to {outputs - 1}"
    return names, ids, [*notes, f"{note} (--classes gives others)"]


def _input_rule(rule: ImageRule) -> tuple[InputRule, dict[str, Any]]:
    """Buckets for the rule, and what it says of the pixels."""
    pixels = {"pixel_mean": rule.mean, "pixel_std": rule.std}
    given = {key: values for key, values in pixels.items() if values is not None}
    return InputRule(buckets(rule), rule.short_side, rule.long_side), given


def default_name(config: DetrConfig, family: variant.Family) -> str:
    """A name like ``deformable_resnet50_two_stage``."""
    options = config.deformable
    parts: list[str] = [] if family == "backbone" else [family]
    parts.append(backbone_name(config.backbone).replace("-", "_"))
    if family == "deformable":
        parts += ["single_scale"] if options.levels == 1 else []
        parts += ["two_stage"] if options.two_stage else ["refine"] if options.box_refine else []
    return "_".join(parts)


def _describe(config: DetrConfig, family: variant.Family) -> str:
    """The variant in words."""
    parts = [backbone_name(config.backbone)]
    if family == "deformable":
        options = config.deformable
        parts.append(f"{options.levels} level{'s' * (options.levels > 1)}")
        parts += ["box refinement"] if options.box_refine else []
        parts += ["two stages"] if options.two_stage else []
    if family != "backbone":
        parts.append(f"{config.encoder_layers}+{config.decoder_layers} layers")
        parts.append(f"width {config.dim}")
        parts.append(f"{config.num_queries} queries")
        parts.append(f"{config.num_classes} classes")
    return ", ".join(parts)


# --- the parameters -----------------------------------------------------------------------------


def _fitted(
    config: DetrConfig,
    kind: recognise.Kind,
    params: Flat,
    stats: Flat,
    dropped: list[str],
    new_head: bool,
    source: str,
) -> tuple[dict[str, Any], LoadReport, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    """The model's variables, the report, and the shapes of what is mismatched.

    Raises:
      ValueError: anything but a class head that is made anew does not fit.
    """
    init = first_variables(config, kind.family)
    try:
        own, own_stats = jax.eval_shape(init)
    except ValueError as error:  # more proposals than there are places
        raise ValueError(f"{source}: {error}") from error
    merged, report = merge(own, params)
    merged_stats, stats_report = merge(own_stats, stats)
    heads = set(_class_heads(own)) if new_head else set()
    missing = [p for p in report.new + stats_report.new if p not in heads]
    unlike = [p for p in report.mismatched + stats_report.mismatched if p not in heads]
    surplus = report.dropped + stats_report.dropped
    if missing or unlike or surplus:
        theirs, ours = {**stats, **params}, {**own_stats, **own}
        reasons = [
            *([f"{len(missing)} missing ({_first(missing)})"] if missing else []),
            *(
                f"{p} has shape {list(np.shape(theirs[p]))}, not {list(ours[p].shape)}"
                for p in unlike[:3]
            ),
            *([f"{len(surplus)} too many ({_first(surplus)})"] if surplus else []),
        ]
        raise ValueError(
            f"{source}: looks like a {kind.title} ({_describe(config, kind.family)}), but its "
            f"parameters do not fit one, by our names: {'; '.join(reasons)}"
        )
    fresh = [path for path in own if path in heads and path not in report.loaded]
    if fresh:
        start = jax.jit(lambda: {path: init()[0][path] for path in fresh})()
        merged.update(jax.device_get(start))
    shapes = {p: (np.shape(params[p]), own[p].shape) for p in report.mismatched}
    variables = {
        "params": traverse_util.unflatten_dict(merged, sep="/"),
        "batch_stats": traverse_util.unflatten_dict(merged_stats, sep="/"),
    }
    loaded = report.loaded + [f"batch_stats/{path}" for path in stats_report.loaded]
    return variables, LoadReport(loaded, report.new, dropped, report.mismatched), shapes


def first_variables(config: DetrConfig, family: variant.Family) -> Callable[[], tuple[Flat, Flat]]:
    """A function of nothing that gives the float model's first parameters and statistics, flat."""
    bucket = SHORT_SIDE, LONG_SIDE  # a two-stage model needs as many tokens as proposals
    images, mask = example_input(bucket)

    def init() -> tuple[Flat, Flat]:
        key = jax.random.key(0)
        if family == "backbone":
            variables = build_backbone(config.backbone).init(key, images.astype(jnp.float32))
            variables = {group: {"backbone": tree} for group, tree in variables.items()}
        else:
            variables = build_detector(config).init(key, images, mask)
        params, stats = (
            traverse_util.flatten_dict(variables[group], sep="/")
            for group in ("params", "batch_stats")
        )
        return params, stats

    return init


def _class_heads(paths: Iterable[str]) -> list[str]:
    return [path for path in paths if re.match(r"class_head(_\d+)?/", path)]


def _first(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
