"""Hand-made ONNX files with the inputs and outputs of exported ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

from aqdetr_jax.deploy.onnx.facts import FACTS, FORMAT, VERSION

QUERIES, CLASSES, CHANNELS = 3, 4, 8


def write(path: Path, *, integer, size=(32, 48)) -> Path:
    """One convolution (of codes, if ``integer``) whose channel means give logits and boxes."""
    rng = np.random.default_rng(0)
    height, width = size
    constants = {
        "kernel": rng.integers(-8, 8, (CHANNELS, 3, 3, 3)).astype(np.int8 if integer else "f4"),
        "to_logits": rng.normal(0, 0.01, (CHANNELS, QUERIES * CLASSES)).astype("f4"),
        "to_boxes": rng.normal(0, 0.01, (CHANNELS, QUERIES * 4)).astype("f4"),
        "logits_shape": np.array([1, QUERIES, CLASSES]),
        "boxes_shape": np.array([1, QUERIES, 4]),
        "axes": np.array([2, 3]),
        "step": np.float32(0.5),
        "zero": np.uint8(0),
        "kernel_zero": np.int8(0),
    }
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [helper.make_node("Transpose", ["images"], ["pixels"], perm=[0, 3, 1, 2])]
    if integer:
        grid = ["step", "zero"]
        operands = ["pixels", *grid, "kernel", "step", "kernel_zero", *grid]
        nodes += [
            helper.make_node("QLinearConv", operands, ["codes"], "stem", **pads),
            helper.make_node("DequantizeLinear", ["codes", *grid], ["map"], "values"),
        ]
    else:
        nodes += [
            helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Conv", ["floats", "kernel"], ["sums"], "stem", **pads),
            helper.make_node("Relu", ["sums"], ["map"]),
        ]
    nodes += [helper.make_node("ReduceMean", ["map", "axes"], ["mean"], keepdims=0)]
    for name in ("logits", "boxes"):
        nodes += [
            helper.make_node("MatMul", ["mean", f"to_{name}"], [f"flat_{name}"], f"{name}_head"),
            helper.make_node("Reshape", [f"flat_{name}", f"{name}_shape"], [name]),
        ]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info("images", TensorProto.UINT8, [1, height, width, 3]),
            helper.make_tensor_value_info("sizes", TensorProto.INT32, [1, 2]),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, QUERIES, CLASSES]),
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, QUERIES, 4]),
        ],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if k in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "bits": 4 if integer else 32,
        "model": {"family": "detr"},
        "input": {"buckets": [list(size)], "short_side": None, "max_size": None},
        "class_names": [],
        "info": {"name": "tiny"},
    }
    helper.set_model_props(model, {FACTS: json.dumps(facts), "empty": "", "kéy": "välue"})
    save(model, path)
    return path
