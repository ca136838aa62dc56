"""Packed models: the same network after a round trip, and nothing but the network inside."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_network import bundle, tiny_models

from aqdetr_jax.deploy.archive import PackedModelError, read_archive
from aqdetr_jax.deploy.bits import Codes
from aqdetr_jax.deploy.detector import DeployedBundle
from aqdetr_jax.deploy.freeze import freeze
from aqdetr_jax.deploy.packed import read_packed, used, write_packed

CASES = {
    "detr": ("detr", "w4a4", {}),
    "plain": ("plain", "w3a3", {"grid": "zero_point"}),
    "two_stage": ("two_stage", "w2a2", {"grid": "centred"}),
    "qdetr": ("detr", "w4a4", {"grid": "offset", "align_queries": True}),
    "float": ("detr", "float", {}),
}


def deployed(case) -> DeployedBundle:
    name, policy, options = CASES[case]
    source = bundle(name, policy, **options)
    network = used(freeze(source), tiny_models.BUCKET)
    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
    return DeployedBundle(**{**fields, "variables": network, "info": {"seed": 3}})


@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_gives_the_same_network(case, tmp_path):
    before = deployed(case)
    write_packed(tmp_path / "model", before)
    after = read_packed(tmp_path / "model")
    leaves, shape = jax.tree.flatten(before.variables)
    found, found_shape = jax.tree.flatten(after.variables)
    assert found_shape == shape  # every grid, sign, window, name and size
    for mine, theirs in zip(found, leaves, strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    assert dataclasses.replace(after, variables={}) == dataclasses.replace(before, variables={})


def test_what_is_inside(tmp_path):
    """No training, and of a quantized weight its codes alone, at their bits."""
    source = bundle("two_stage", "w4a4")
    write_packed(tmp_path / "model", deployed("two_stage"))
    arrays, facts = read_archive(tmp_path / "model")
    assert not any("auxiliary" in name or "teacher" in name for name in arrays)
    assert facts["model"]["num_auxiliary"] == 0
    kernels = [name for name in arrays if name.endswith("/kernel")]
    coded = {name for name in kernels if isinstance(arrays[name], Codes)}
    floats = {name.split("/")[0] for name in set(kernels) - coded}
    assert all(name.startswith(("class_head", "box_head")) for name in floats), floats
    # Of the class heads only the last layer's and the proposals' are read at inference.
    last = source.config.decoder_layers - 1
    assert {n.split("/")[0] for n in kernels if n.startswith("class_head")} == {
        f"class_head_{last}",
        f"class_head_{last + 1}",
    }
    size = (tmp_path / "model/weights.safetensors").stat().st_size
    content = 0.0
    for array in arrays.values():
        content += (
            -(-array.values.size * array.bits // 8) if isinstance(array, Codes) else array.nbytes
        )
    assert size < content + 200 * len(arrays)  # names, shapes and offsets beside


def rewritten(folder, change):
    """Changes the manifest's facts and makes its checksum anew, as a forger would."""
    from aqdetr_jax.deploy import archive

    arrays, facts = read_archive(folder)
    change(arrays, facts)
    archive.write_archive(folder, arrays, facts)


def _unsigned(codes):
    return Codes(codes.values.view(np.uint8), codes.bits)


DAMAGE = {
    "no layer": (
        lambda a, f: [a.pop("input_proj/kernel"), f["parts"]["layers"].pop("input_proj")],
        "input_proj",
    ),
    "no array": (lambda a, f: a.pop("encoder/layer_0/norm1/scale"), "encoder/layer_0/norm1/scale"),
    "an array more": (lambda a, f: a.update(extra=np.zeros(3, np.float32)), "extra"),
    "codes of another grid": (
        lambda a, f: a.update({"input_proj/kernel": _unsigned(a["input_proj/kernel"])}),
        "input_proj/kernel should be signed codes",
    ),
    "float codes": (
        lambda a, f: a.update({"input_proj/bias": a["input_proj/bias"].astype(np.float32)}),
        "input_proj/bias should be int32",
    ),
    "a shape": (
        lambda a, f: a.update({"query_embed": np.zeros((4, 16), np.float32)}),
        "do not fit",
    ),
    "a scale": (
        lambda a, f: a.update({"input_proj/scale": np.ones(3, np.float32)}),
        r"input_proj/scale has the shape \[3\]",
    ),
    "a grid": (
        lambda a, f: f["parts"]["layers"]["input_proj"].update(lower=5),
        "input_proj/input has no bits and codes",
    ),
    "no sizes": (lambda a, f: f.pop("model"), "lacks 'model'"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_does_not_fit_is_said(case, tmp_path):
    change, message = DAMAGE[case]
    write_packed(tmp_path / "model", deployed("detr"))
    rewritten(tmp_path / "model", change)
    with pytest.raises(PackedModelError, match=message):
        read_packed(tmp_path / "model")


def test_the_manifest_is_plain_json(tmp_path):
    write_packed(tmp_path / "model", deployed("plain"))
    content = json.loads((tmp_path / "model/manifest.json").read_text())
    assert content["format"] == "aqdetr-packed"
