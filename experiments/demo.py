"""Sample images and the documentation's picture of the page that detects in a browser.

python experiments/demo.py samples
python experiments/demo.py picture MODEL.onnx [--runtime=FOLDER]

The page is docs/demo; the first writes docs/demo/samples, the second docs/demo.png with a headless
Chromium, where the page runs the given file on the second sample. FOLDER holds onnxruntime-web, as
``make demo`` leaves it in docs/demo/ort.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from browser import Page, find_browser, serve
from PIL import Image

from aqdetr_jax.data.shapes.dataset import ShapesDataset
from aqdetr_jax.io import write_bytes_atomic

DOCS = Path(__file__).resolve().parents[1] / "docs"
CHOSEN = (4, 27)
"""Images of the validation split."""


def write_samples(folder: Path) -> None:
    """``1.png`` and so on, as the embedded set has them."""
    images = ShapesDataset("validation", size=128, num_images=max(CHOSEN) + 1)
    folder.mkdir(parents=True, exist_ok=True)
    for number, index in enumerate(CHOSEN, 1):
        Image.fromarray(images[index].image).save(folder / f"{number}.png", optimize=True)


def take_picture(model: Path, runtime: Path) -> bytes:
    """The page after it has looked at a sample, PNG."""
    browser = find_browser()
    if browser is None:
        raise SystemExit("there is no Chromium: install one, or name it in AQDETR_CHROMIUM")
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        shutil.copytree(DOCS / "demo", site, ignore=shutil.ignore_patterns("ort", "*.onnx"))
        shutil.copyfile(model, site / "model.onnx")
        shutil.copytree(runtime, site / "ort")
        with serve(site) as address, Page(browser, (960, 760)) as page:
            page.open(f"{address}index.html?runtime=ort/")
            page.wait("document.getElementById('status').textContent.startsWith('ready')")
            page.run("document.querySelectorAll('#samples button')[1].click()")
            page.wait("document.getElementById('status').className == 'done'")
            return page.picture()


def main() -> None:
    """Writes one or the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("samples", "picture"))
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--runtime", type=Path, default=DOCS / "demo/ort", metavar="FOLDER")
    options = parser.parse_args()
    if options.what == "samples":
        write_samples(DOCS / "demo/samples")
    elif options.model is None:
        parser.error("picture needs a MODEL.onnx")
    else:
        write_bytes_atomic(DOCS / "demo.png", take_picture(options.model, options.runtime))


if __name__ == "__main__":
    main()
