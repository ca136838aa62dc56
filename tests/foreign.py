"""Foreign checkpoints for tests: the tiny models that transformers once ran, written to files."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch_bytes as tb
from safetensors.numpy import save_file

from experiments.parity import cases as parity_cases
from experiments.parity import store as parity_store

VARIANTS = tuple(parity_cases.TINY)
"""The models that are recorded."""

DEFORMABLE = tuple(name for name, c in parity_cases.TINY.items() if c.family == "deformable")

LABELS = ("red cell", "white cell", "platelet", "debris", "bubble")
"""Names of the recorded models' five classes."""


@functools.cache
def fixture(name: str) -> dict[str, dict[str, np.ndarray]]:
    """What ``experiments/record/parity.py`` recorded: the groups state, output and input."""
    groups = parity_store.load(parity_cases.FIXTURES / f"{name}.npz")
    with np.load(parity_cases.FIXTURES / parity_store.BATCH) as stored:
        return {**groups, "input": dict(stored)}


def config_json(name: str, **changes: Any) -> dict[str, Any]:
    """What transformers writes beside a recorded model's weights (the keys that are read)."""
    config = parity_cases.TINY[name]
    options, backbone = config.deformable, config.backbone
    deformable = {
        "encoder_n_points": options.points,
        "decoder_n_points": options.points,
        "num_feature_levels": options.levels,
        "with_box_refine": options.box_refine,
        "two_stage": options.two_stage,
        "two_stage_num_proposals": config.num_queries if options.two_stage else 300,
    }
    return {
        "model_type": {"detr": "detr", "deformable": "deformable_detr"}[config.family],
        "d_model": config.dim,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.ffn,
        "decoder_ffn_dim": config.ffn,
        "num_queries": config.num_queries,
        "dilation": backbone.output_stride == 16,
        "position_embedding_type": "sine",
        "activation_function": "relu",
        "id2label": {str(i): label for i, label in enumerate(LABELS)},
        "backbone_config": {
            "model_type": "resnet",
            "depths": list(backbone.depths),
            "hidden_act": "relu",
        },
        **(deformable if config.family == "deformable" else {}),
        **changes,
    }


def write_folder(
    folder: Path, name: str, *, state: Mapping[str, np.ndarray] | None = None, **changes: Any
) -> Path:
    """A model folder of transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(name, **changes)))
    given = fixture(name)["state"] if state is None else state
    save_file(dict(given), folder / "model.safetensors")
    return folder


def write_shards(folder: Path, name: str) -> Path:
    """The same with the weights in two files."""
    write_folder(folder, name)
    state = fixture(name)["state"]
    (folder / "model.safetensors").unlink()
    names, weight_map = list(state), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: state[key] for key in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def torch_file(
    state: Mapping[str, np.ndarray], args: Mapping[str, Any] | None = None, *, stream: bool = False
) -> bytes:
    """A training checkpoint: {"model": state, "epoch": 49, "args": Namespace(...)}."""
    content = {"model": state, "epoch": 49}
    if args is not None:
        attributes = tb.table(**{key: _value(value) for key, value in args.items()})
        content["args"] = tb.call("argparse.Namespace") + attributes + b"b"
    return torch_tree(content, stream=stream)


def torch_tree(content: Mapping[str, Any], *, stream: bool = False) -> bytes:
    """A file of nested dicts of arrays, numbers, texts, and opcodes as they are."""
    kinds = {"f": "torch.FloatStorage", "i": "torch.LongStorage"}
    storages = {}

    def opcodes(value: Any) -> bytes:
        if isinstance(value, Mapping):
            rows = [tb.text(name) + opcodes(item) for name, item in value.items()]
            return tb.call("collections.OrderedDict") + b"(" + b"".join(rows) + b"u"
        if not isinstance(value, np.ndarray):
            return value if isinstance(value, bytes) else _value(value)
        data = np.array(value, np.float32 if value.dtype.kind == "f" else np.int64, order="C")
        key = str(len(storages))
        storages[key] = (data.size, data.tobytes())
        memory = tb.storage(data.size, key=key, kind=kinds[data.dtype.kind], stream=stream)
        strides = [step // data.itemsize for step in data.strides]
        return tb.tensor(memory, 0, data.shape, strides)

    body = tb.table(**{key: opcodes(value) for key, value in content.items()})
    if stream:
        return tb.stream_file(body, storages)
    return tb.zip_file(body, {key: data for key, (_, data) in storages.items()})


def _value(value: Any) -> bytes:
    """A plain value as opcodes."""
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    return tb.number(value) if isinstance(value, int) else tb.text(value)


ARGS = {
    "hidden_dim": 32,
    "nheads": 4,
    "dim_feedforward": 12,
    "enc_layers": 2,
    "dec_layers": 2,
    "num_queries": 7,
    "num_feature_levels": 4,
    "enc_n_points": 2,
    "dec_n_points": 2,
    "with_box_refine": False,
    "two_stage": False,
    "dilation": False,
    "position_embedding": "sine",
    "masks": False,
    "backbone": "resnet-tiny",
}
"""Run arguments of a checkpoint with the parameters of ``deformable_plain``."""
