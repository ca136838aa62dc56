"""How fast deployed models are here, by ``aqdetr benchmark``'s own code.

python experiments/deploy.py [MODEL ...] [--height=800 --width=1066] [--threads=1,2] [--openvino]

First DETR and Deformable DETR with a ResNet-50, float and at 4 bits, made here: random weights,
calibrated on a real image, say nothing of AP and everything of speed. Then each group of MODELs, as
``aqdetr export`` leaves them, AP in the report beside; "+" begins a new group, whose models are
timed side by side: ``detr/teacher detr/student + deformable/teacher deformable/student``. Every
group is a few minutes on two cores; --only-given leaves the large ones out.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from full_size_step import random_batch, strayed

from aqdetr_jax import host
from aqdetr_jax.checkpoint.model_folder import InputRule, ModelBundle, save_model
from aqdetr_jax.data.images import as_array
from aqdetr_jax.deploy.benchmark import benchmark, canvas, format_benchmark, parse_threads
from aqdetr_jax.deploy.export import deployed_bundle
from aqdetr_jax.deploy.onnx.model import onnx_model, save_onnx
from aqdetr_jax.deploy.packed import write_packed
from aqdetr_jax.io import write_json_atomic
from aqdetr_jax.models.detector import build_detector, example_input
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.training import initial, setup, sizing
from aqdetr_jax.training.experiment import load_experiment

LARGE = {"detr-r50": "coco:r50,w4a4", "deformable-r50": "coco_deformable:r50,w4a4"}
CLASSES = 91
"""Of COCO's official heads."""


def large_models(name: str, config_name: str, size: tuple[int, int], image: Path, to: Path) -> None:
    """Writes a float and a 4-bit model of full size: folder, packed and ONNX."""
    config = load_experiment(config_name, (f"model.num_classes={CLASSES}", "init_from=unused"))
    config = sizing.with_devices(config, jax.devices()[0])
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, buckets=(size,), eval_buckets=()),
        quant=dataclasses.replace(config.quant, calibration_batches=1),
        model=dataclasses.replace(config.model, num_auxiliary=0, auxiliary_groups=1),
    )
    module, example = build_detector(config.model), example_input(size)
    variables = jax.jit(lambda: strayed(module.init(jax.random.key(1), *example)))()
    teacher = ModelBundle(
        config.model,
        QuantConfig(),
        InputRule((size,), config.data.eval_short_side, config.data.eval_max_size),
        tuple(f"class {i}" for i in range(CLASSES)),
        tuple(range(CLASSES)),
        jax.device_get(variables),
        {"name": f"{name}-float"},
    )
    picture, sides = canvas(as_array(image), *size)
    batch = random_batch(*size, 1, config.data.max_boxes, CLASSES)
    mask = np.zeros((1, *size), bool)
    mask[:, : sides[0], : sides[1]] = True
    batch |= {"images": picture[None], "mask": mask, "size": sides[None]}
    calibrated, _ = initial.initial_variables(
        config, setup.build_module(config), teacher, iter([batch])
    )
    student = dataclasses.replace(
        teacher,
        quant=config.quant,
        variables=jax.device_get(calibrated),
        info={"name": f"{name}-{config.quant.policy}"},
    )
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    save_model(to / "float", teacher)
    write_packed(to / "w4a4-packed", deployed_bundle(student))
    for kind, bundle in (("float", teacher), ("w4a4", student)):
        save_onnx(to / f"{kind}.onnx", onnx_model(deployed_bundle(bundle), size=size))


def main() -> None:
    """Makes, times and writes the JSON file after every group."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--only-given", action="store_true")
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1066)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--image", type=Path, default=Path("docs/quickstart.png"))
    parser.add_argument("--openvino", action="store_true")
    parser.add_argument("--to", type=Path, default=Path("runs/deploy"))
    parser.add_argument("--out", default="experiments/results/deploy.json")
    options = parser.parse_args()
    size = (options.height, options.width)
    groups: list[list[str]] = []
    if not options.only_given:
        for name, config in LARGE.items():
            large_models(name, config, size, options.image, options.to / name)
            names = ("float", "w4a4-packed", "float.onnx", "w4a4.onnx")
            groups.append([str(options.to / name / file) for file in names])
    jax.clear_caches()  # the memory is the other processes' now
    given = " ".join(options.models).split("+") if options.models else []
    groups += [group.split() for group in given]
    result: dict[str, Any] = {"commit": git_commit(), "rows": [], "groups": []}
    for group in groups:
        found = benchmark(
            group,
            threads=parse_threads(options.threads),
            seconds=options.seconds,
            image=str(options.image),
            openvino=options.openvino,
            progress=lambda text: print(text, flush=True),
        )
        print(format_benchmark(found), flush=True)
        result["rows"] += found.pop("rows")
        result["groups"].append(found)
        write_json_atomic(options.out, result)


if __name__ == "__main__":
    host.use_cpu()
    host.use_compilation_cache()
    main()
