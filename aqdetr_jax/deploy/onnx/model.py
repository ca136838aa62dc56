"""A deployed network as an ONNX file: the graph, and what a program must know to use it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, helper

from aqdetr_jax.config_types import from_dataclass
from aqdetr_jax.deploy.detector import DeployedBundle, detect, read_out
from aqdetr_jax.deploy.network import Network
from aqdetr_jax.deploy.onnx.facts import FACTS, FORMAT, VERSION, OnnxModelError, read_facts
from aqdetr_jax.deploy.onnx.graph import Graph, tensor_type
from aqdetr_jax.deploy.onnx.operations import OnnxOperations
from aqdetr_jax.deploy.onnx.tensors import Site
from aqdetr_jax.io import write_bytes_atomic
from aqdetr_jax.paths import as_path

OPSET = 21
"""Of the graph; what ONNX Runtime 1.20 and later read."""

IR_VERSION = 10
"""Of the file; what goes with the opset."""

CHECKSUM = "aqdetr.sha256"
"""Key of the SHA-256 of all bytes before this entry, which is the file's last."""

MOST_BYTES = 2**31 - 1
"""Of a protocol buffer."""


def onnx_model(
    bundle: DeployedBundle,
    *,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    activations: Literal["uint8", "int8"] = "uint8",
    outputs: Literal["raw", "detections"] = "raw",
) -> ModelProto:
    """Writes a deployed network down.

    The graph takes ``images`` uint8 [batch, height, width, 3], real images in the top left corner,
    and their ``sizes`` int32 [batch, 2], (height, width).

    Args:
      bundle: the network, low-bit or float, and what goes with it.
      size: (height, width) of the images; None = the first bucket's.
      batch: images at once.
      activations: bytes that carry the codes: uint8 for x86, int8 for ARM.
      outputs: "raw": ``logits`` [batch, N, C] and ``boxes`` [batch, N, 4] as cxcywh in [0, 1] of
        the real image; "detections": ``scores`` [batch, K], ``labels`` int64 [batch, K] and
        ``boxes`` [batch, K, 4] as x1, y1, x2, y2 in pixels of the real image.

    Raises:
      ValueError: the network cannot be a graph of this kind; the message says why.
    """
    height, width = size or bundle.input.buckets[0]
    graph, network = Graph(), cast(Network, bundle.variables)
    ops = OnnxOperations(graph, np.dtype(activations))
    images = graph.input("images", (batch, height, width, 3), np.uint8)
    sizes = graph.input("sizes", (batch, 2), np.int32)
    logits, boxes = detect(ops, network, images, sizes)
    found = {"logits": logits, "boxes": boxes}
    if outputs == "detections":
        read = read_out(ops, network, logits, boxes, sizes, len(bundle.class_names))
        found = dict(zip(("scores", "labels", "boxes"), read, strict=True))
    for name, value in found.items():
        graph.output(name, ops.value(value))
    model = helper.make_model(
        graph.finish("aqdetr"),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="aqdetr",
    )
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "outputs": outputs,
        "bits": network.weight_bits,
        "model": from_dataclass(bundle.config),
        "input": from_dataclass(bundle.input),
        "class_names": list(bundle.class_names),
        "category_ids": list(bundle.category_ids),
        "info": bundle.info,
        "sites": [_described(site) for site in ops.sites],
    }
    helper.set_model_props(model, {FACTS: json.dumps(facts)})
    return model


def _described(site: Site) -> dict[str, Any]:
    return {
        "site": site.grid.site,
        "bits": site.grid.bits,
        "step": np.asarray(site.grid.step, np.float64).tolist(),
        "lower": site.grid.lower,
        "zero": site.carrier.zero,
        "dtype": site.carrier.dtype.name,
        "tensors": list(site.tensors),
        "shape": list(site.shape),
        "layout": site.layout,
    }


def save_onnx(path: str | Path, model: ModelProto) -> None:
    """Writes a model; the file appears whole or not at all.

    Its last entry is a checksum of all bytes before.

    Raises:
      ValueError: it is larger than the format can hold.
    """
    size = model.ByteSize() + len(_seal(b""))
    if size > MOST_BYTES:
        raise ValueError(f"{path} would have {size} bytes, and a file of its kind holds 2 GiB")
    body = model.SerializeToString()
    write_bytes_atomic(path, body + _seal(body))


def _seal(body: bytes) -> bytes:
    """An entry of the metadata, of a constant length; a reader joins it to those of the body."""
    model = ModelProto()
    helper.set_model_props(model, {CHECKSUM: hashlib.sha256(body).hexdigest()})
    return model.SerializeToString()


def read_onnx(path: str | Path) -> tuple[ModelProto, dict[str, Any]]:
    """Reads what ``save_onnx`` wrote.

    Returns:
      (the model, its facts).

    Raises:
      FileNotFoundError: there is no file.
      OnnxModelError: it is truncated or was changed, or no file of ours; the message says which.
    """
    path = as_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = path.read_bytes()
    body = content[: -len(_seal(b""))]
    try:
        model = onnx.load_model_from_string(content)
        facts = facts_of(model, path)
    except DecodeError:
        raise OnnxModelError(f"{path} is no ONNX file, or not all of one") from None
    if not content.endswith(_seal(body)):
        raise OnnxModelError(
            f"{path} is not what was written, its checksum is of other bytes: export the model "
            "again, or copy it again"
        )
    return model, facts


def facts_of(model: ModelProto, path: str | Path = "") -> dict[str, Any]:
    """What a model says of itself.

    Raises:
      OnnxModelError: it is none of ours.
    """
    return read_facts({entry.key: entry.value for entry in model.metadata_props}, path)


def with_codes(model: ModelProto) -> ModelProto:
    """A copy of a model that gives out the codes of all quantizers, too."""
    copy = ModelProto()
    copy.CopyFrom(model)
    outputs = []
    for site in facts_of(model)["sites"]:
        kind = tensor_type(np.dtype(site["dtype"]))
        outputs += [helper.make_tensor_value_info(name, kind, None) for name in site["tensors"]]
    copy.graph.output.extend(outputs)
    return copy


def codes_of(facts: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The codes of every quantizer, int32 by site, as the deployed network in JAX has them.

    Args:
      facts: of the model.
      tensors: outputs of ``with_codes``'s graph by name.
    """
    return {
        site["site"]: _arranged(site, [tensors[name] for name in site["tensors"]])
        for site in facts["sites"]
    }


def _arranged(site: dict[str, Any], parts: Sequence[np.ndarray]) -> np.ndarray:
    shape = site["shape"]
    if site["layout"] == "map":
        whole = parts[0].transpose(0, 2, 3, 1)
    elif site["layout"] == "samples":
        batch, heads, queries, points, width = shape
        each = points // len(parts)
        levels = [p.reshape(batch, heads, width, each, queries) for p in parts]
        whole = np.concatenate(levels, 3).transpose(0, 1, 4, 3, 2)
    else:
        whole = parts[0].reshape(shape)
    return whole.astype(np.int32) - site["zero"]
