"""The benchmark: what it counts and compares, not how fast anything is."""

from __future__ import annotations

import json
import os
import re
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqdetr_jax.cli import main
from aqdetr_jax.deploy import operators
from aqdetr_jax.deploy.benchmark import benchmark, canvas, format_benchmark, parse_threads
from aqdetr_jax.deploy.contestant import BenchmarkError, Contestant, Entry
from aqdetr_jax.host import cores

ROW = {
    *("model", "runtime", "bits", "threads", "height", "width", "batch", "median_ms", "p95_ms"),
    *("images_per_second", "ratio_to_float", "file_bytes", "peak_bytes", "ap", "commit"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(float, integer) ONNX files in one folder."""
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    import tiny_onnx

    folder = tmp_path_factory.mktemp("onnx")
    return (
        tiny_onnx.write(folder / "float.onnx", integer=False),
        tiny_onnx.write(folder / "w4a4.onnx", integer=True),
    )


@pytest.fixture(scope="module")
def timed(files):
    """What the verb wrote and printed of both files."""
    out = files[0].parent / "new/result.json"
    argv = ["benchmark", *map(str, files), "--runs=3", "--threads=1", f"--json={out}"]
    assert main(argv) == 0
    return json.loads(out.read_text())


def test_rows_follow_from_the_raw_figures(timed, files):
    assert [row["model"] for row in timed["rows"]] == [str(file) for file in files]
    times = [raw["turns_ms"] for raw in timed["raw"]]
    assert [[len(turn) for turn in turns] for turns in times] == [[1, 1, 1], [1, 1, 1]]
    ratios = [a[0] / b[0] for a, b in zip(*times, strict=True)]
    for row, turns, file, bits, ratio in zip(
        timed["rows"], times, files, (32, 4), (1.0, statistics.median(ratios)), strict=True
    ):
        assert set(row) == ROW
        flat = sorted(x for (x,) in turns)
        assert row["median_ms"] == pytest.approx(flat[1], abs=1e-3)
        assert flat[1] <= row["p95_ms"] + 1e-3 <= flat[2] + 2e-3
        assert row["images_per_second"] == pytest.approx(1e3 / flat[1], rel=0.05)
        assert (row["bits"], row["threads"]) == (bits, 1)
        assert (row["height"], row["width"]) == (32, 48)
        assert row["file_bytes"] == file.stat().st_size
        assert row["ratio_to_float"] == pytest.approx(ratio, rel=0.05, abs=1e-3)
        # Python and ONNX Runtime alone are more than this; JAX, which is not there, would be more.
        assert 20 * 2**20 < row["peak_bytes"] < 300 * 2**20


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no such call on this system")
def test_one_thread_is_one_core(timed):
    for raw in timed["raw"]:
        assert len(raw["cores"]) == 1


def test_the_profile_knows_codes_from_floats(timed):
    floats, integer = timed["operators"]
    assert floats["products"] == integer["products"] == 3
    assert len(floats["float_products"]) == 3
    assert sorted(integer["float_products"]) == ["boxes_head", "logits_head"]
    found = {(row["operator"], row["numbers"], row["role"]) for row in integer["operators"]}
    assert {
        ("QLinearConv", "integer", "convolutions"),
        ("DequantizeLinear", "integer", "grids"),
        ("MatMul", "float", "products"),
    } <= found
    for one in (floats, integer):
        assert sum(row["share"] for row in one["operators"]) == pytest.approx(1, abs=0.01)
        assert sum(one["roles"].values()) == pytest.approx(one["milliseconds"], abs=0.01)


def test_the_text_has_a_line_a_model(timed):
    text = format_benchmark(timed)
    for row in timed["rows"]:
        assert re.search(rf"^{row['model']} +onnxruntime +{row['bits']} ", text, re.M)
    assert re.search(r"left in float: 2 of 3 convolutions and products \(\w+_head, \w+_h", text)


# --- our own models -------------------------------------------------------------------------------


def test_our_models_beside_each_other(tiny_teacher, tmp_path):
    """A trained one and what was made of it, each with what it is."""
    from aqdetr_jax.checkpoint.model_folder import load_model
    from aqdetr_jax.deploy.export import deployed_bundle
    from aqdetr_jax.deploy.packed import write_packed

    packed = tmp_path / "packed"
    write_packed(packed, deployed_bundle(load_model(tiny_teacher)))
    (packed / "report.json").write_text(json.dumps({"ap": {"deployed": {"AP": 0.25}}}))
    found = benchmark([str(tiny_teacher), str(packed)], runs=1, threads=(1,))
    trained, deployed = found["rows"]
    assert (trained["runtime"], trained["bits"], trained["height"]) == ("jax", 32, 64)
    assert trained["ratio_to_float"] == 1
    assert deployed["ratio_to_float"] > 0
    assert deployed["ap"] == 0.25
    weights = (packed / "weights.safetensors").stat().st_size
    assert weights < deployed["file_bytes"] < weights + 60_000
    assert not found["operators"]


# --- what cannot be timed -------------------------------------------------------------------------


def test_errors_name_the_model(files, tmp_path):
    import onnx

    model = onnx.load(files[0])
    del model.metadata_props[:]
    other, broken = tmp_path / "other.onnx", tmp_path / "broken.onnx"
    onnx.save(model, other)
    broken.write_bytes(files[0].read_bytes()[:200])
    for paths, options, words in (
        ([files[0]], {"size": (64, 64)}, "float.onnx in onnxruntime: it is for images of 32x48"),
        ([other], {}, "other.onnx in onnxruntime: it was not written by aqdetr export"),
        ([broken], {}, "broken.onnx in onnxruntime: "),
        ([tmp_path / "no"], {}, "no in jax: "),
    ):
        with pytest.raises(BenchmarkError, match=words):
            benchmark([str(path) for path in paths], runs=1, threads=(1,), **options)


def test_bad_requests(files):
    name = str(files[0])
    with pytest.raises(ValueError, match=r"float.onnx is given twice"):
        benchmark([str(files[0].parent), name])
    with pytest.raises(ValueError, match=rf"--threads={cores() + 1}: this process has {cores()}"):
        benchmark([name], threads=(cores() + 1,))
    with pytest.raises(ValueError, match="--threads=1;2 should be numbers"):
        parse_threads("1;2")
    with pytest.raises(ValueError, match="must be positive"):
        benchmark([name], runs=0)
    assert main(["benchmark", name, "--height=32"]) == 1


def test_a_process_that_dies_is_told(files):
    with Contestant(Entry(str(files[0]), "onnxruntime", 1), None) as one:
        one._process.kill()
        with pytest.raises(BenchmarkError, match="ended by signal 9"):
            one.ask("memory")
    assert one._process.returncode == -9


# --- operators ----------------------------------------------------------------------------------


def node(operator, ms, *types, name=""):
    return {"node": name, "operator": operator, "types": list(types), "milliseconds": ms}


def test_losses_are_named_with_their_operators():
    floats = operators.summary(
        [node("FusedConv", 10.0, "float"), node("MatMul", 4.0, "float"), node("Add", 1.0, "float")]
    )
    integer = operators.summary(
        [
            node("QLinearConv", 4.0, "uint8", "float"),
            node("MatMulInteger", 5.0, "uint8", "int8"),
            node("QuantizeLinear", 2.0, "float", "float", "uint8"),
            node("Min", 0.5, "uint8", "uint8"),
            node("Min", 0.5, "float", "float"),
            node("Add", 1.0, "float"),
        ]
    )
    assert integer["roles"] == {
        "products": 5.0,
        "convolutions": 4.0,
        "grids": 2.5,
        "sums": 1.0,
        "others": 0.5,
    }
    assert integer["milliseconds"] == 13.0
    assert operators.losses(integer, floats) == (
        "integers are slower than floats in grids 2.50 ms against 0.00 (QuantizeLinear 2.00, Min "
        "0.50); products 5.00 ms against 4.00 (MatMulInteger 5.00); others 0.50 ms against 0.00 "
        "(Min 0.50)"
    )
    assert operators.losses(floats, floats) == ""


def test_a_trace_becomes_medians_without_its_first_run():
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    from aqdetr_jax.deploy.onnx.running import operator_times

    def event(ts, index, dur):
        return {
            "cat": "Node",
            "name": f"n{index}_kernel_time",
            "ts": ts,
            "dur": dur,
            "args": {
                "op_name": "Conv",
                "node_index": str(index),
                "input_type_shape": [{"float": [1, 3]}, {"int8": [1]}],
            },
        }

    events = [{"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 5}]
    for run, durations in enumerate(((9000, 9000), (1000, 10), (3000, 20), (2000, 60))):
        start = 100 + 1000 * run
        events += [event(start + 10 * i, i, d) for i, d in enumerate(durations)]
        events.append({"cat": "Session", "name": "model_run", "ts": start - 1, "dur": 500})
    found = operator_times(events)
    assert [(n["node"], n["milliseconds"]) for n in found] == [("n0", 2.0), ("n1", 0.02)]
    assert found[0]["types"] == ["float", "int8"]


# --- input --------------------------------------------------------------------------------------


@given(
    picture=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    size=st.tuples(st.integers(1, 80), st.integers(1, 80)),
)
def test_a_picture_fills_the_canvas(picture, size):
    image, (h, w) = canvas(np.full((*picture, 3), 200, np.uint8), *size)
    assert image.shape == (*size, 3)
    assert h == size[0] or w == size[1]
    assert (image[:h, :w] == 200).all()
    assert not image[h:].any()
    assert not image[:, w:].any()
