"""A trained float model becomes the one that comes with the package.

python experiments/package_teacher.py --run=runs/shapes_deformable_teacher \
    --config=shapes_teacher:deformable --to=aqdetr_jax/assets/shapes_deformable_teacher

Parameters keep 16 significant bits of 24, which takes a fifth off the compressed size and is far
below what training leaves undetermined. What is written is evaluated anew, and its numbers, not the
run's, go into its metadata.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import numpy as np

from aqdetr_jax import host
from aqdetr_jax.checkpoint.model_folder import load_model, save_model
from aqdetr_jax.evaluation.models import evaluate_bundle
from aqdetr_jax.training.experiment import load_experiment

DROPPED = 8
"""Bits of float32's mantissa that are rounded away."""


def rounded(array: np.ndarray) -> np.ndarray:
    """Float32 numbers to the nearest with ``DROPPED`` bits fewer."""
    bits = np.asarray(array, np.float32).view(np.uint32)
    half = np.uint32(1 << (DROPPED - 1))
    return ((bits + half) & ~np.uint32((1 << DROPPED) - 1)).view(np.float32)


def main() -> None:
    """Rounds, evaluates, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="the float model's run")
    parser.add_argument("--config", required=True, help="what it is evaluated on")
    parser.add_argument("--to", required=True, help="the folder to write")
    options = parser.parse_args()
    bundle = load_model(options.run)
    if bundle.quant.quantized:
        raise ValueError(f"{options.run} is a low-bit model; a teacher is float")
    bundle = dataclasses.replace(bundle, variables=jax.tree.map(rounded, bundle.variables))
    config = load_experiment(options.config)
    block, _ = evaluate_bundle(
        bundle, config.data, bundle.info["name"], batch_size=config.train.eval_batch_size
    )
    results = {key: value for key, value in block.items() if key != "per_class"}
    info = {**bundle.info, "significant_bits": 24 - DROPPED, "results": results}
    save_model(options.to, dataclasses.replace(bundle, info=info))
    print(f"AP {block['AP']:.4f}  AP50 {block['AP50']:.4f}, written to {options.to}")


if __name__ == "__main__":
    host.prepare()
    main()
