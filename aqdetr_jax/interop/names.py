"""Which parameter of another library is which of ours: tables to be read, and their reader.

A row says: names of this form are that path. In a path, ``{1}`` stands for the pattern's first
group and ``{1+}`` for the number in it plus one. The layout says how the array lies:

* "conv": torch's [out, in, kh, kw] is our [kh, kw, in, out];
* "dense": torch's [out, in] is our [in, out];
* "same": as it is.

Paths that begin with "batch_stats/" are running statistics, all others parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

Layout = Literal["conv", "dense", "same"]

STATISTICS = "batch_stats/"


class Row(NamedTuple):
    """One line of a table.

    Attributes:
      pattern: regular expression of the whole foreign name.
      path: our path, see the module.
      layout: how the array lies.
    """

    pattern: str
    path: str
    layout: Layout = "same"


def translate(
    state: Mapping[str, np.ndarray], rows: Sequence[Row]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Foreign arrays under our paths.

    Args:
      state: foreign name -> array.
      rows: a table.

    Returns:
      (parameters, running statistics), flat: path -> array.

    Raises:
      ValueError: a name that no row explains; two names of one parameter whose values differ.
    """
    found: dict[str, np.ndarray] = {}
    source: dict[str, str] = {}
    for name, array in state.items():
        path, layout = find(name, rows)
        if path == "":
            continue
        value = to_ours(np.asarray(array), layout)
        if path not in found:
            found[path], source[path] = value, name
        elif not np.array_equal(value, found[path]):
            raise ValueError(f"{name} and {source[path]} are both {path}, with unlike values")
    stats = {k: v for k, v in found.items() if k.startswith(STATISTICS)}
    params = {k: v for k, v in found.items() if k not in stats}
    return params, {k.removeprefix(STATISTICS): v for k, v in stats.items()}


def find(name: str, rows: Sequence[Row]) -> tuple[str, Layout]:
    """Path ("" = to be dropped) and layout of a foreign name.

    Raises:
      ValueError: no row explains it.
    """
    for row in rows:
        match = re.fullmatch(row.pattern, name)
        if match:
            return _filled(row.path, match), row.layout
    raise ValueError(f"no parameter of ours is known for {name!r}")


def _filled(path: str, match: re.Match[str]) -> str:
    def one(mark: re.Match[str]) -> str:
        text = match[int(mark[1])] or ""
        return str(int(text) + 1) if mark[2] else text

    return re.sub(r"\{(\d)(\+?)\}", one, path)


def to_ours(array: np.ndarray, layout: Layout) -> np.ndarray:
    """A foreign array in our layout."""
    if layout == "conv":
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
    return np.ascontiguousarray(array.T) if layout == "dense" else array


def to_theirs(array: np.ndarray, layout: Layout) -> np.ndarray:
    """One of our arrays in the foreign layout."""
    if layout == "conv":
        return np.ascontiguousarray(array.transpose(3, 2, 0, 1))
    return np.ascontiguousarray(array.T) if layout == "dense" else array


def norm(pattern: str, path: str) -> tuple[Row, ...]:
    """Rows of a batch norm, and of its counter, which is dropped."""
    return (
        Row(pattern + r"\.weight", path + "/scale"),
        Row(pattern + r"\.bias", path + "/bias"),
        Row(pattern + r"\.running_mean", f"batch_stats/{path}/mean"),
        Row(pattern + r"\.running_var", f"batch_stats/{path}/var"),
        Row(pattern + r"\.num_batches_tracked", ""),
    )


def scaled(pattern: str, path: str) -> tuple[Row, ...]:
    """Rows of a layer norm or group norm."""
    return (Row(pattern + r"\.weight", path + "/scale"), Row(pattern + r"\.bias", path + "/bias"))


def layer(pattern: str, path: str, layout: Layout = "dense") -> tuple[Row, ...]:
    """Rows of a layer with a bias."""
    weight = Row(pattern + r"\.weight", path + "/kernel", layout)
    return weight, Row(pattern + r"\.bias", path + "/bias")


# --- Hugging Face transformers --------------------------------------------------------------------

_RESNET = r"model\.backbone\.model\."
_BLOCK = _RESNET + r"encoder\.stages\.(\d+)\.layers\.(\d+)\."
HUGGING_FACE_RESNET: tuple[Row, ...] = (
    Row(_RESNET + r"embedder\.embedder\.convolution\.weight", "backbone/stem/kernel", "conv"),
    *norm(_RESNET + r"embedder\.embedder\.normalization", "backbone/stem_norm"),
    Row(
        _BLOCK + r"shortcut\.convolution\.weight", "backbone/layer{1+}_{2}/shortcut/kernel", "conv"
    ),
    *norm(_BLOCK + r"shortcut\.normalization", "backbone/layer{1+}_{2}/shortcut_norm"),
    Row(
        _BLOCK + r"layer\.(\d+)\.convolution\.weight",
        "backbone/layer{1+}_{2}/conv{3+}/kernel",
        "conv",
    ),
    *norm(_BLOCK + r"layer\.(\d+)\.normalization", "backbone/layer{1+}_{2}/norm{3+}"),
)
"""transformers' own ResNet as the backbone of a detector."""

_ENCODER = r"model\.encoder\.layers\.(\d+)\."
_DECODER = r"model\.decoder\.layers\.(\d+)\."
HUGGING_FACE_DEFORMABLE: tuple[Row, ...] = (
    *HUGGING_FACE_RESNET,
    *layer(r"model\.input_proj\.(\d+)\.0", "input_proj_{1}", "conv"),
    *scaled(r"model\.input_proj\.(\d+)\.1", "input_norm_{1}"),
    Row(r"model\.level_embed", "level_embed"),
    Row(r"model\.query_position_embeddings\.weight", "query_embed"),
    *layer(r"model\.reference_points", "reference_points"),
    *layer(
        _ENCODER + r"self_attn\.(sampling_offsets|attention_weights|value_proj|output_proj)",
        "encoder/layer_{1}/self_attention/{2}",
    ),
    *scaled(_ENCODER + r"self_attn_layer_norm", "encoder/layer_{1}/norm1"),
    *layer(_ENCODER + r"(?:mlp\.)?fc(\d)", "encoder/layer_{1}/feed_forward/linear{2}"),
    *scaled(_ENCODER + r"final_layer_norm", "encoder/layer_{1}/norm2"),
    *layer(_DECODER + r"self_attn\.([qkv])_proj", "decoder/layer_{1}/self_attention/{2}_proj"),
    *layer(_DECODER + r"self_attn\.o(?:ut)?_proj", "decoder/layer_{1}/self_attention/out_proj"),
    *scaled(_DECODER + r"self_attn_layer_norm", "decoder/layer_{1}/norm1"),
    *layer(
        _DECODER + r"encoder_attn\.(sampling_offsets|attention_weights|value_proj|output_proj)",
        "decoder/layer_{1}/cross_attention/{2}",
    ),
    *scaled(_DECODER + r"encoder_attn_layer_norm", "decoder/layer_{1}/norm2"),
    *layer(_DECODER + r"(?:mlp\.)?fc(\d)", "decoder/layer_{1}/feed_forward/linear{2}"),
    *scaled(_DECODER + r"final_layer_norm", "decoder/layer_{1}/norm3"),
    *layer(r"model\.enc_output", "proposal_proj"),
    *scaled(r"model\.enc_output_norm", "proposal_norm"),
    *layer(r"model\.pos_trans", "query_proj"),
    *scaled(r"model\.pos_trans_norm", "query_norm"),
    # Heads are listed twice: as the detector's own and as the decoder's. One head for all layers
    # is listed once a layer.
    *layer(r"(?:model\.decoder\.)?class_embed\.(\d+)", "class_head_{1}"),
    *layer(r"(?:model\.decoder\.)?bbox_embed\.(\d+)\.layers\.(\d)", "box_head_{1}/layer_{2}"),
)
"""DeformableDetrForObjectDetection with box refinement (every layer has its own heads)."""

HUGGING_FACE_DEFORMABLE_SHARED: tuple[Row, ...] = (
    *layer(r"class_embed\.\d+", "class_head"),
    *layer(r"bbox_embed\.\d+\.layers\.(\d)", "box_head/layer_{1}"),
    *HUGGING_FACE_DEFORMABLE,
)
"""The same without refinement (one head for all layers)."""
