"""The page that detects in a browser: its steps are those of ``predict``."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from aqdetr_jax.data.resampling import resize_exact
from aqdetr_jax.data.transforms import fitted_size, resized_size

pytestmark = pytest.mark.usefixtures("quick_compile")

DEMO = Path(__file__).parents[2] / "docs/demo"


@pytest.fixture(scope="module")
def run_node(tmp_path_factory):
    """Runs a script with the page's own functions in Node: ``input`` in, its value out."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no Node on this machine")
    folder = tmp_path_factory.mktemp("node")
    shutil.copyfile(DEMO / "detector.js", folder / "detector.mjs")

    def run(body: str, given):
        (folder / "input.json").write_text(json.dumps(given))
        (folder / "run.mjs").write_text(
            "import * as page from './detector.mjs'; import { readFileSync } from 'node:fs';"
            "const bytes = text => new Uint8Array(Buffer.from(text, 'base64'));"
            "const text = bytes => Buffer.from(bytes).toString('base64');"
            "const input = JSON.parse(readFileSync('input.json'));"
            f"const value = await (async () => {{ {body} }})();"
            "console.log(JSON.stringify(value));"
        )
        done = subprocess.run(
            [node, "run.mjs"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=tiny.HUNG_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_pixels_are_pillows(run_node):
    rng = np.random.default_rng(0)
    cases = [(7, 5, 7, 5), (1, 1, 9, 9), (64, 48, 3, 2), (40, 60, 41, 61), (2, 90, 1, 45)]
    for height, width, short in rng.integers(5, 90, (60, 3)).tolist():
        height = min(height, 2 * width)  # newer versions of Pillow resize tall ones columns first
        cases.append((height, width, *resized_size(height, width, short, 100)))
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w, _, _ in cases]
    given = [
        [base64.b64encode(image.tobytes()).decode(), *case]
        for image, case in zip(images, cases, strict=True)
    ]
    found = run_node(
        "return input.map(([rgb, ...sizes]) => text(page.resize(bytes(rgb), ...sizes)));", given
    )
    for image, (*_, height, width), theirs in zip(images, cases, found, strict=True):
        pixels = np.frombuffer(base64.b64decode(theirs), np.uint8).reshape(height, width, 3)
        np.testing.assert_array_equal(pixels, resize_exact(image, (height, width)))


def test_sizes_are_the_evaluations(run_node):
    rng = np.random.default_rng(1)
    cases, wanted = [], []
    for _ in range(3000):
        height, width, short, limit, *canvas = (int(n) for n in rng.integers(1, 400, 6))
        short_side, max_size = (None if n % 3 == 0 else n for n in (short, limit))
        size = (height, width)
        if short_side is not None:
            size = resized_size(*size, short_side, max_size)
        wanted.append(list(fitted_size(*size, tuple(canvas))))
        cases.append([height, width, {"shortSide": short_side, "maxSize": max_size}, canvas])
    found = run_node(
        "return input.map(([h, w, rule, canvas]) => page.targetSize(h, w, {...rule, canvas}));",
        cases,
    )
    assert found == wanted


def test_detections_are_sorted_clipped_and_named(run_node):
    found = run_node(
        "const around = {size: [50, 100], original: [100, 300], names: ['ring', 'star']};"
        "const found = page.readOut([0.2, 0.6, 0.9], [0n, 1n, 0n], input, around, 0.5);"
        "return [found, page.drawing(found)];",
        [*(0, 0, 1, 1), *(10, 10, 20, 20), *(-5, 20, 120, 40)],
    )
    detections, drawn = found
    assert detections == [
        {"name": "ring", "label": 0, "score": 0.9, "box": [0, 40, 300, 80]},
        {"name": "star", "label": 1, "score": 0.6, "box": [30, 20, 60, 40]},
    ]
    assert [one["text"] for one in drawn] == ["star 0.60", "ring 0.90"]  # the best on top
    assert drawn[0]["rectangle"] == [30, 20, 30, 20]


def test_the_files_own_facts(run_node, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    import tiny_onnx

    file = tiny_onnx.write(tmp_path / "a.onnx", integer=True)
    content = base64.b64encode(file.read_bytes()).decode()
    wanted = {prop.key: prop.value for prop in onnx.load(file).metadata_props}
    assert run_node("return page.readMetadata(bytes(input));", content) == wanted
    cut = base64.b64encode(file.read_bytes()[:-3]).decode()
    script = "try { page.readFacts(bytes(input)) } catch (error) { return error.message }"
    assert run_node(script, cut) == "this is no ONNX file, or not all of one"
    model = onnx.load(file)
    del model.metadata_props[:]
    other = base64.b64encode(model.SerializeToString()).decode()
    assert run_node(script, other).startswith("this ONNX file was not written by aqdetr export")


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(the page's folder with its runtime and without a model, path of a browser)."""
    from browser import find_browser

    browser = find_browser()
    if browser is None:
        pytest.skip("there is no Chromium: install one, or name it in AQDETR_CHROMIUM")
    runtime = Path(os.environ.get("AQDETR_ORT_WEB", DEMO / "ort"))
    if not (runtime / "ort.wasm.bundle.min.mjs").is_file():
        pytest.skip("onnxruntime-web is not at hand: make demo (with npm and a network)")
    folder = tmp_path_factory.mktemp("demo") / "site"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("ort", "*.onnx"))
    (folder / "ort").symlink_to(runtime.resolve())
    return folder, browser


def status(page) -> str:
    return page.run("document.getElementById('status').textContent")


def test_a_missing_model_is_told(site):
    from browser import Page, serve

    folder, browser = site
    with serve(folder) as address, Page(browser) as page:
        page.open(f"{address}?runtime=ort/&model=none.onnx")
        page.wait("document.getElementById('status').className == 'error'")
        assert status(page) == "there is no none.onnx beside this page (404)"
        shown = page.run("document.getElementById('missing').innerText")
        assert "aqdetr export --format=onnx" in shown


def test_the_page_finds_what_predict_finds(site, tmp_path):
    """An exported 4-bit model, on a picture that is made smaller by the model's rule."""
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    from browser import Page, serve
    from test_network import bundle, tiny_models

    from aqdetr_jax.checkpoint.model_folder import InputRule
    from aqdetr_jax.deploy.export import deployed_bundle
    from aqdetr_jax.deploy.onnx.model import onnx_model, save_onnx
    from aqdetr_jax.evaluation.predict import Detector

    folder, browser = site
    rule = InputRule((tiny_models.BUCKET,), short_side=30, max_size=50)
    model = deployed_bundle(dataclasses.replace(bundle("detr", "w4a4"), input=rule))
    save_onnx(folder / "model.onnx", onnx_model(model, outputs="detections"))
    pixels = np.random.default_rng(2).integers(0, 256, (70, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    wanted = Detector(model).predict(tmp_path / "picture.png", threshold=0.05).to_dict()
    with serve(folder) as address, Page(browser) as page:
        page.open(f"{address}?runtime=ort/")
        page.wait("document.getElementById('status').textContent.startsWith('ready')")
        assert "4-bit" in page.run("document.getElementById('model').textContent")
        page.run("document.getElementById('threshold').value = 0.05")
        page.choose_files("#files", tmp_path / "picture.png")
        page.wait("document.getElementById('status').className == 'done'")
        found = page.run(
            "[...document.querySelectorAll('#detections li')].map(x => ({...x.dataset}))"
        )
        assert "ms" in page.run("document.getElementById('time').textContent")
    assert len(found) == len(wanted["detections"]) > 0
    for mine, theirs in zip(found, wanted["detections"], strict=True):
        assert mine["name"] == theirs["name"]
        assert float(mine["score"]) == pytest.approx(theirs["score"], abs=1e-4)
        box = [float(x) for x in mine["box"].split(",")]
        np.testing.assert_allclose(box, theirs["box"], atol=1e-2)
