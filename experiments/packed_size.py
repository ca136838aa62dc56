"""Real sizes of packed models: full-size models of random weights, written and measured.

python experiments/packed_size.py [--config=coco:r50,w4a4] [--out=FILE]

A file's size does not depend on its numbers, so no training is needed. The float model is written
beside in the same format, float32 numbers as they are, and as a model folder, whose checkpoint is
compressed (by a tenth, of random weights). Minutes; 3 GB of memory.
"""

from __future__ import annotations

import argparse
import tempfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aqdetr_jax import host
from aqdetr_jax.checkpoint.model_folder import InputRule, ModelBundle, save_model
from aqdetr_jax.deploy.archive import WEIGHTS, read_archive
from aqdetr_jax.deploy.bits import Codes, packed_size
from aqdetr_jax.deploy.export import deployed_bundle
from aqdetr_jax.deploy.packed import write_packed
from aqdetr_jax.io import folder_bytes, write_json_atomic
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.detector import build_detector, example_input
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.training.experiment import load_experiment

CONFIGS = tuple(
    f"{family}:r50,{bits}"
    for family in ("coco", "coco_deformable")
    for bits in ("w8a8", "w4a4", "w3a3", "w2a2")
)
SMALL = (256, 256)
"""Image by which the operations are found; no size depends on it."""


def random_bundle(config: DetrConfig, quant: QuantConfig) -> ModelBundle:
    """A model with random weights and plausible steps."""
    module = build_detector(config, quant.build())
    shapes = jax.eval_shape(module.init, jax.random.key(0), *example_input(SMALL))

    def fill(path, leaf):
        name = path[-1].key
        rng = np.random.default_rng(zlib.crc32("/".join(p.key for p in path).encode()))
        x = rng.normal(0, 0.05, leaf.shape).astype(np.float32)
        if name in ("scale", "var") or name.endswith("_scale"):
            return 1 + x
        return np.full(leaf.shape, 0.02, np.float32) if name.endswith("_step") else x

    variables = jax.tree_util.tree_map_with_path(fill, shapes)
    names = tuple(f"class{i}" for i in range(config.num_classes))
    ids = tuple(range(config.num_classes))
    return ModelBundle(config, quant, InputRule((SMALL,)), names, ids, variables)


def measure(name: str) -> dict[str, Any]:
    """Sizes of one configuration's packed and float models."""
    config = load_experiment(f"configs/{name.replace(':', '.py:')}", ("model.dtype=float32",))
    sizes = dict(num_auxiliary=0, auxiliary_groups=1, num_classes=91)
    model = DetrConfig(**{**vars(config.model), **sizes})
    with tempfile.TemporaryDirectory() as folder:
        low, plain, saved = (Path(folder) / name for name in ("packed", "float", "folder"))
        write_packed(low, deployed_bundle(random_bundle(model, config.quant)))
        teacher = random_bundle(model, QuantConfig())
        write_packed(plain, deployed_bundle(teacher))
        save_model(saved, teacher)
        packed, floats, kept = (folder_bytes(path) for path in (low, plain, saved))
        arrays, _ = read_archive(low)
        return {
            "config": name,
            "packed_bytes": packed,
            "float_bytes": floats,
            "float_model_folder_bytes": kept,
            "ratio": round(floats / packed, 3),
            "weights_file_bytes": (low / WEIGHTS).stat().st_size,
            "parts": by_part(arrays),
            "commit": git_commit(),
        }


def by_part(arrays: dict[str, np.ndarray | Codes]) -> dict[str, dict[str, int]]:
    """Bytes of codes, of what belongs to them, and of floats, of every part of the network."""
    table: dict[str, dict[str, int]] = {}
    for name, array in arrays.items():
        row = table.setdefault(
            name.split("/")[0], {"codes": 0, "scales_and_biases": 0, "floats": 0}
        )
        if isinstance(array, Codes):
            row["codes"] += packed_size(array.values.size, array.bits)
        elif name.rpartition("/")[0] + "/kernel" in arrays and not name.endswith("/kernel"):
            row["scales_and_biases"] += array.nbytes
        else:
            row["floats"] += array.nbytes
    return table


def main() -> None:
    """Measures and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="append")
    parser.add_argument("--out", type=Path, default="experiments/results/packed_size.json")
    options = parser.parse_args()
    rows = []
    for name in options.config or CONFIGS:
        rows.append(measure(name))
        print({k: v for k, v in rows[-1].items() if k != "parts"}, flush=True)
    write_json_atomic(options.out, rows)


if __name__ == "__main__":
    host.use_cpu()
    main()
