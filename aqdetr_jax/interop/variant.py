"""Which variant of its model a source is: what its shapes show, and what it declares.

Facts are a flat dict. Shapes show: ``block``, ``depths``, ``widths``, ``stem_width``,
``stem_kernel``, ``dim``, ``ffn``, ``encoder_layers``, ``decoder_layers``, ``num_queries``,
``classes``, ``pre_norm``, and of a Deformable DETR ``levels``, ``stages``, ``samples`` (heads x
points), ``box_refine``, ``two_stage``. They do not show ``heads``, ``points`` and ``dilation``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

from aqdetr_jax.interop.backbones import DEPTHS, LITE_DEPTHS, GapError, backbone_facts, count
from aqdetr_jax.interop.source import shown

Family = Literal["detr", "deformable", "backbone"]

OFFICIAL_HEADS = 8
OFFICIAL_PROPOSALS = 300

FLAGS = frozenset({"pre_norm", "dilation", "box_refine", "two_stage"})
"""Facts that are true or false; all that are declared besides ``depths`` are whole numbers."""

MAX_DECLARED = 100_000
"""Size of a declared number: proposals are declared, and seen nowhere else."""

# (fact, key): what a source may declare. Two keys of one fact must agree: ours has one number.
CONFIG_JSON = (
    ("dim", "d_model"),
    ("heads", "encoder_attention_heads"),
    ("heads", "decoder_attention_heads"),
    ("ffn", "encoder_ffn_dim"),
    ("ffn", "decoder_ffn_dim"),
    ("encoder_layers", "encoder_layers"),
    ("decoder_layers", "decoder_layers"),
    ("dilation", "dilation"),
    ("levels", "num_feature_levels"),
    ("points", "encoder_n_points"),
    ("points", "decoder_n_points"),
    ("box_refine", "with_box_refine"),
    ("two_stage", "two_stage"),
    ("classes", "num_labels"),
)
ARGS = (
    ("dim", "hidden_dim"),
    ("heads", "nheads"),
    ("ffn", "dim_feedforward"),
    ("encoder_layers", "enc_layers"),
    ("decoder_layers", "dec_layers"),
    ("num_queries", "num_queries"),
    ("pre_norm", "pre_norm"),
    ("dilation", "dilation"),
    ("levels", "num_feature_levels"),
    ("points", "enc_n_points"),
    ("points", "dec_n_points"),
    ("box_refine", "with_box_refine"),
    ("two_stage", "two_stage"),
)
MODEL_TYPES = {"detr": "detr", "deformable_detr": "deformable"}

# (key, what we build): any other value is a model that we have not.
ONLY_CONFIG_JSON = (
    ("position_embedding_type", ("sine",)),
    ("activation_function", ("relu",)),
    ("num_channels", (3,)),
)
ONLY_BACKBONE = (
    ("hidden_act", ("relu",)),
    ("downsample_in_bottleneck", (False,)),
    ("downsample_in_first_stage", (False,)),
)
ONLY_ARGS = (("position_embedding", ("sine", "v2")), ("masks", (False,)))


class Declared(NamedTuple):
    """A declared fact: its value, and the key that declares it, for messages."""

    value: Any
    key: str


def seen_facts(shapes: Mapping[str, tuple[int, ...]], family: Family, name: str) -> dict[str, Any]:
    """What the shapes of our parameters show.

    Args:
      shapes: path -> shape of a source's parameters under our names.
      family: what the source holds.
      name: the source, for messages.

    Raises:
      ValueError: a parameter without which no variant can be told is missing, or of no size;
        names it. Or layers are missing in between.
    """

    def shape(path: str, axes: int = 2) -> tuple[int, ...]:
        if path not in shapes:
            raise ValueError(
                f"{name}: lacks what is our {path!r}: it is cut short, or it is another model"
            )
        found = shapes[path]
        if len(found) != axes or 0 in found:
            raise ValueError(
                f"{name}: what is our {path!r} should have {axes} axes of at least 1, and has the "
                f"shape {list(found)}: it is another model"
            )
        return found

    try:
        facts = backbone_facts(shapes, shape)
        if family == "backbone":
            return facts
        for part in ("encoder", "decoder"):
            facts[f"{part}_layers"] = count(shapes, f"{part}/layer_", "/")
    except GapError as gap:
        raise ValueError(f"{name}: {gap}: it is cut short, or it is another model") from None
    facts["ffn"] = shape("encoder/layer_0/feed_forward/linear1/kernel")[-1]
    facts["pre_norm"] = "encoder/norm/scale" in shapes
    if "query_embed" in shapes:
        facts["num_queries"] = shape("query_embed")[0]
    for head in ("class_head/kernel", "class_head_0/kernel"):
        if head in shapes:  # DETR's last output is "no object"
            facts["classes"] = shape(head)[-1] - (family == "detr")
            if not facts["classes"]:
                raise ValueError(f"{name}: has a class head of no class: it is another model")
    if family == "detr":
        return facts | {"dim": shape("input_proj/kernel", 4)[-1]}
    facts["levels"], facts["dim"] = shape("level_embed")
    projections = (f"input_proj_{level}/kernel" for level in range(facts["levels"]))
    facts["stages"] = sum(shape(path, 4)[0] == 1 for path in projections)
    facts["samples"] = (
        shape("encoder/layer_0/self_attention/attention_weights/kernel")[-1] // facts["levels"]
    )
    facts["box_refine"] = "box_head/layer_0/kernel" not in shapes
    facts["two_stage"] = "proposal_proj/kernel" in shapes
    return facts


def declared_facts(
    settings: Mapping[str, Any], where: str, family: Family, name: str
) -> dict[str, Declared]:
    """What a source says of its model.

    Args:
      settings: its ``config.json`` or run arguments.
      where: "config.json", "args" or "".
      family: what its names say that it holds.
      name: the source, for messages.

    Raises:
      ValueError: it declares another family, two numbers where we have one, or a variant that is
        not read; the message gives key and value.
    """
    if where == "config.json" and family == "backbone":
        return _timm_facts(settings, name)
    if where == "config.json":
        kind = settings.get("model_type")
        if MODEL_TYPES.get(str(kind)) != family:
            known = " and ".join(MODEL_TYPES)
            raise ValueError(
                f"{name}: config.json says model_type={said(kind)}, its parameters are those of a "
                f"{family} model; model types that are read: {known}"
            )
        _only(settings, ONLY_CONFIG_JSON, f"{name}: config.json")
        backbone = settings.get("backbone_config") or {}
        if not isinstance(backbone, Mapping):
            raise ValueError(
                f"{name}: config.json says backbone_config={said(backbone)}, which is no object"
            )
        _only(backbone, ONLY_BACKBONE, f"{name}: backbone_config in config.json")
        facts = _read(settings, CONFIG_JSON, f"{name}: config.json")
        # timm's backbones say it by their stride.
        stride = backbone.get("output_stride")
        if stride not in (None, 16, 32):
            raise ValueError(
                f"{name}: config.json says backbone_config.output_stride={said(stride)}: that "
                "variant is not read"
            )
        if stride is not None:
            dilation = Declared(stride == 16, "backbone_config.output_stride")
            _add(facts, "dilation", dilation, f"{name}: config.json")
        queries = "two_stage_num_proposals" if settings.get("two_stage") else "num_queries"
        facts |= _read(settings, [("num_queries", queries)], f"{name}: config.json")
        depths = backbone.get("depths")
        if depths:
            depths = tuple(depths) if isinstance(depths, list) else depths
            facts["depths"] = Declared(depths, "backbone_config.depths")
        elif isinstance(settings.get("backbone"), str):
            _add_backbone(facts, settings["backbone"])
    elif where == "args":
        _only(settings, ONLY_ARGS, f"{name}: args")
        facts = _read(settings, ARGS, f"{name}: args")
        if isinstance(settings.get("backbone"), str):
            _add_backbone(facts, settings["backbone"])
    else:
        return {}
    if family == "detr":  # Arguments of both repositories, and defaults, name what DETR has not.
        foreign = ("levels", "points", "box_refine", "two_stage")
        facts = {fact: value for fact, value in facts.items() if fact not in foreign}
    return facts


def _read(settings, keys: Iterable[tuple[str, str]], where: str) -> dict[str, Declared]:
    facts: dict[str, Declared] = {}
    for fact, key in keys:
        if settings.get(key) is not None:
            _add(facts, fact, Declared(settings[key], key), where)
    return facts


def said(value: Any) -> str:
    """A declared value for messages."""
    return shown(repr(value), 80)


def _add(facts: dict[str, Declared], fact: str, new: Declared, where: str) -> None:
    if fact in FLAGS:
        fits, wanted = type(new.value) is bool, "true or false"
    else:
        fits = type(new.value) is int and 1 <= new.value <= MAX_DECLARED
        wanted = f"a whole number from 1 to {MAX_DECLARED}"
    if not fits:
        raise ValueError(
            f"{where} says {new.key}={said(new.value)}, which should be {wanted}: correct it there"
        )
    old = facts.setdefault(fact, new)
    if old.value != new.value:
        raise ValueError(
            f"{where} says {old.key}={old.value!r} and {new.key}={new.value!r}: a model of ours "
            f"has one number for both"
        )


def _add_backbone(facts: dict[str, Declared], backbone: str) -> None:
    """Depths by the name of a ResNet; other names are told by their shapes alone."""
    for (_, depths), known in DEPTHS.items():
        if backbone == known:
            facts["depths"] = Declared(depths, f"backbone={known!r}, which has depths")


def _timm_facts(settings: Mapping[str, Any], name: str) -> dict[str, Declared]:
    """What timm's ``config.json`` says of a backbone: others of its names may pool otherwise."""
    depths = {known: depths for (_, depths), known in DEPTHS.items()}
    depths |= {f"tf_{variant}": depths for variant, depths in LITE_DEPTHS.items()}
    architecture = settings.get("architecture")
    if not isinstance(architecture, str) or architecture not in depths:
        raise ValueError(
            f"{name}: its parameters are those of a backbone that is read, but config.json says "
            f"architecture={said(architecture)}; of timm's folders {', '.join(depths)} are read"
        )
    if settings.get("model_args"):
        raise ValueError(
            f"{name}: config.json says model_args={said(settings['model_args'])}: that variant is "
            "not read"
        )
    told = f"architecture={architecture!r}, which "
    facts = {"depths": Declared(depths[architecture], f"{told}has depths")}
    lite = architecture.removeprefix("tf_")
    if lite in LITE_DEPTHS:  # two of them have the same depths
        facts["efficientnet_lite"] = Declared(lite, f"{told}is")
    return facts


def _only(settings: Mapping[str, Any], rules, where: str) -> None:
    for key, allowed in rules:
        value = settings.get(key, allowed[0])
        if not isinstance(value, str | bool | int) or value not in allowed:
            raise ValueError(f"{where} says {key}={said(value)}: that variant is not read")


def agreed_facts(
    seen: Mapping[str, Any],
    declared: Mapping[str, Declared],
    where: str,
    family: Family,
    dilation: bool | None,
    name: str,
) -> tuple[dict[str, Any], list[str]]:
    """All facts of a model.

    Args:
      seen: from its shapes.
      declared: from what the source says.
      where: what says it, for messages.
      family: what the source holds.
      dilation: the user's word, None = no word.
      name: the source, for messages.

    Returns:
      (facts, notes on those that nothing told).

    Raises:
      ValueError: two of the three contradict each other; the message names both.
    """
    for fact, (value, key) in declared.items():
        if fact in seen and seen[fact] != value:
            raise ValueError(
                f"{name}: its parameters have {fact}={seen[fact]!r}, but its {where} says "
                f"{key}={said(value)}: one of them is of another model"
            )
    facts = {**{fact: value for fact, (value, _) in declared.items()}, **seen}
    notes: list[str] = []
    if family == "backbone":
        return facts, notes
    if dilation is not None and facts.setdefault("dilation", dilation) != dilation:
        raise ValueError(
            f"{name}: --{'' if dilation else 'no-'}dilation was given, but its {where} says "
            f"dilation={facts['dilation']!r}"
        )
    if "dilation" not in facts and "dc5" in PurePath(name).name.lower():
        raise ValueError(
            f"{name}: is called DC5, but whether the backbone is dilated cannot be seen in "
            "parameters and is not declared: give --dilation (or --no-dilation)"
        )
    if "dilation" not in facts:
        facts["dilation"] = False
        notes.append(
            "whether the backbone is dilated (DC5) cannot be seen in parameters and is not "
            "declared: taken as not dilated; --dilation says otherwise"
        )
    if "num_queries" not in facts:
        facts["num_queries"] = OFFICIAL_PROPOSALS
        notes.append(f"the number of proposals is not declared: taken as {OFFICIAL_PROPOSALS}")
    if "heads" not in facts and not ("points" in facts and "samples" in facts):
        facts["heads"] = OFFICIAL_HEADS
        notes.append(
            "the number of attention heads cannot be seen in parameters and is not declared: "
            f"taken as {OFFICIAL_HEADS}, the official one"
        )
    if family == "deformable":
        samples = facts["samples"]
        facts.setdefault("points", max(samples // facts.get("heads", samples), 1))
        facts.setdefault("heads", max(samples // facts["points"], 1))
        if facts["heads"] * facts["points"] != samples:
            raise ValueError(
                f"{name}: its parameters have {samples} samples a level, which heads="
                f"{facts['heads']} (its {where or 'official number'}) x points={facts['points']} "
                "are not"
            )
    return facts, notes
