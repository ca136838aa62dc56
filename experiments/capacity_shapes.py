"""Query capacity of float, LSQ, Q-DETR, AQ-DETR and its parts: the paper's explanation, measured.

python experiments/capacity_shapes.py --work=DIR [--out=FILE] [--images=400] [--only=detr,w4]

DIR: the folder of ``experiments/main_shapes.py``'s runs, which are read; a run that is not there or
not finished is said and left out. What is measured (``aqdetr_jax.evaluation.capacity``), after each
decoder layer, of the object queries on the first validation images: differential entropy of the
features under a Gaussian, effective rank and mean cosine of an image's queries, distinct
predictions of an image; and, of the training, the positives of a step. Resumable: a row that was
measured of the same model on as many images is kept.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import main_shapes
import numpy as np
from results_files import RESULTS
from study import Row, rows_of

from aqdetr_jax import host
from aqdetr_jax.checkpoint.model_folder import ModelBundle, load_model, model_checksum
from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.eval_batches import EvalBatches
from aqdetr_jax.data.first import FirstImages
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.data.pipeline import PipelineConfig, make_train_pipeline
from aqdetr_jax.evaluation import capacity
from aqdetr_jax.io import write_json_atomic
from aqdetr_jax.losses.targets import Targets, positives
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.training.arguments import parse_arguments
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.experiment import load_experiment

STUDY = "main_shapes"
METHODS = ("float", "lsq", "qdetr", "auxiliary", "distill", "aqdetr")
BATCH, TRAINING_BATCHES = 40, 25


def rows() -> Iterator[Row]:
    """Of the main study, those that are measured."""
    for row in main_shapes.rows():
        if row.facts["method"] in METHODS and row.facts["bits"] in (32, 4, 2):
            yield row


def layers(bundle: ModelBundle, data: DataConfig, images: int) -> list[dict[str, float]]:
    """The measures after each decoder layer, from a model's outputs on an evaluation set.

    Args:
      bundle: the model.
      data: of the set.
      images: how many of it, the first ones.
    """
    module = bundle.module()
    # Of a softmax the last class is none, and says nothing for a box.
    softmax = module.config.class_loss == "softmax"

    @jax.jit
    def outputs(variables, images, mask):
        out = module.apply(variables, images, mask)
        scores = jax.nn.softmax(out.logits)[..., :-1] if softmax else jax.nn.sigmoid(out.logits)
        return out.decoder_features, out.boxes, jnp.max(scores, -1)

    dataset = FirstImages(open_dataset(data, train=False), images)
    pipeline = PipelineConfig.from_data(data, train=False, batch_size=min(BATCH, images))
    found = []
    for batch in EvalBatches(dataset, pipeline):
        real = batch["image_index"] >= 0
        made = outputs(bundle.variables, batch["images"], batch["mask"])
        found.append([np.asarray(x)[:, real] for x in made])
    features, boxes, scores = (np.concatenate(x, axis=1) for x in zip(*found, strict=True))
    return [
        {
            "entropy": capacity.gaussian_entropy(features[i]),
            "effective_rank": capacity.effective_rank(features[i]),
            "cosine": capacity.mean_cosine(features[i]),
            "distinct": float(capacity.distinct_predictions(boxes[i], scores[i]).mean()),
        }
        for i in range(len(features))
    ]


@functools.lru_cache(maxsize=1)
def training_boxes(data: DataConfig, batch_size: int, seed: int) -> list[np.ndarray]:
    """Which boxes are real in the first training batches, bool [B, T] each."""
    dataset = open_dataset(data, train=True)
    pipeline = PipelineConfig.from_data(data, train=True, batch_size=batch_size, seed=seed)
    batches = make_train_pipeline(dataset, pipeline)
    try:
        return [batch["valid"] for batch in itertools.islice(batches, TRAINING_BATCHES)]
    finally:
        batches.close()


def positives_a_step(config: ExperimentConfig) -> dict[str, float]:
    """Matched queries after each decoder layer in a training step, the mean of some steps."""
    model = config.model
    kinds = {"object": (1, model.num_queries, 1)}
    if model.num_auxiliary:
        groups = model.auxiliary_groups
        each = model.num_auxiliary // groups
        kinds["auxiliary"] = (config.auxiliary.repeats, each, groups)
    boxes = training_boxes(config.data, config.train.batch_size, config.seed)
    counts: dict[str, float] = {}
    for name, (repeats, queries, groups) in kinds.items():
        of_steps = [
            int(positives(Targets(boxes, boxes, valid), repeats, queries, groups))
            for valid in boxes
        ]
        counts[name] = float(np.mean(of_steps))
    return counts


def measured(row: Row, model: str, images: int, overrides: tuple[str, ...]) -> dict[str, Any]:
    """A row of the JSON file."""
    config = load_experiment(row.config, (*row.overrides, *overrides))
    bundle = load_model(model)
    found: dict[str, Any] = {
        "name": row.name,
        "facts": dict(row.facts),
        "model": model_checksum(model),
        "images": images,
        "layers": layers(bundle, config.data, images),
        "commit": git_commit(),
    }
    if row.kind == "train":
        found["positives"] = positives_a_step(config)
        found["manifest"] = f"experiments/manifests/{STUDY}/{row.name}.json"
    return found


def main() -> None:
    """Measures what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(overrides=True)
    parser.add_argument("--work", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "capacity_shapes.json")
    parser.add_argument("--images", type=int, default=400, help="validation images, the first ones")
    parser.add_argument("--only", default="", help="rows with all of these words in their name")
    options, overrides = parse_arguments(parser, sys.argv[1:])
    words = options.only.split(",")
    for row in rows():
        if not all(word in row.name for word in words):
            continue
        folder = options.work / row.name
        if row.kind == "train" and not (folder / "results.json").is_file():
            print(f"{row.name}: no finished run in {folder}: left out", flush=True)
            continue
        model = row.model or str(folder)
        known = {r["name"]: r for r in rows_of(options.out)}
        same = (model_checksum(model), options.images)
        if row.name in known and tuple(known[row.name][k] for k in ("model", "images")) == same:
            continue
        known[row.name] = made = measured(row, model, options.images, tuple(overrides))
        command = f"python experiments/capacity_shapes.py --work=DIR --images={options.images}"
        content = {"command": command, "rows": list(known.values())}
        write_json_atomic(options.out, content, indent=1)
        last = ", ".join(f"{key} {value:.3f}" for key, value in made["layers"][-1].items())
        print(f"{row.name}: {last}", flush=True)


if __name__ == "__main__":
    host.use_cpu()
    main()
