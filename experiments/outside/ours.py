"""Our side of a case: python -m outside.ours CASE."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

from aqdetr_jax import host
from outside.cases import BOXES, CASES, CLASSES, TINY_CLASSES, Case
from outside.worker import serve

SCHEDULE = 1000
"""Steps of the learning rate's schedule; what is timed does not depend on it."""


def experiment(case: Case):
    """The configuration, float, at the case's sizes."""
    from aqdetr_jax.training.experiment import load_experiment

    small = case.config.startswith("shapes")
    given = ("init_from=unused", f"model.num_classes={TINY_CLASSES if small else CLASSES}")
    config = load_experiment(case.config, given)
    size = (case.height, case.width)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, dtype="float32", num_auxiliary=0, auxiliary_groups=1
        ),
        data=dataclasses.replace(config.data, buckets=(size,), eval_buckets=()),
        train=dataclasses.replace(config.train, batch_size=case.batch, epochs=0.0, steps=SCHEDULE),
    )


def random_batch(case: Case, config) -> dict:
    """Random pixels and boxes; the same number of boxes on every image."""
    import numpy as np

    rng = np.random.default_rng(0)
    rows, places = case.batch, config.data.max_boxes
    valid = np.broadcast_to(np.arange(places) < BOXES, (rows, places))
    centre = rng.uniform(0.2, 0.8, (rows, places, 2))
    extent = rng.uniform(0.05, 0.4, (rows, places, 2))
    boxes = np.concatenate([centre, extent], -1).astype(np.float32)
    labels = rng.integers(0, config.model.num_classes, (rows, places))
    return {
        "images": rng.integers(0, 256, (rows, case.height, case.width, 3), dtype=np.uint8),
        "mask": np.ones((rows, case.height, case.width), bool),
        "boxes": boxes * valid[..., None],
        "labels": (labels * valid).astype(np.int32),
        "valid": valid.copy(),
        "size": np.tile(np.int32([case.height, case.width]), (rows, 1)),
    }


def build_step(case: Case) -> Callable[[], object]:
    """The train step over one virtual device a core, as a training on this CPU runs it."""
    import jax
    from step_time import compiled_step

    from aqdetr_jax.parallel.mesh import make_mesh, put_batch
    from aqdetr_jax.training import initial, setup
    from aqdetr_jax.training.loop import TRAINED_KEYS

    config = experiment(case)
    raw = random_batch(case, config)
    free = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, frozen=()))
    module = setup.build_module(config)
    variables, _ = initial.initial_variables(free, module, None, iter([raw]))
    mesh = make_mesh(batch_size=case.batch)
    jax.set_mesh(mesh)
    batch = put_batch({name: raw[name] for name in TRAINED_KEYS}, mesh)
    step, state, *_ = compiled_step(config, variables, batch, {}, mesh)
    held = [state]

    def run() -> None:
        held[0], metrics = step(held[0], {}, batch)
        jax.block_until_ready((held[0], metrics))

    return run


def build_inference(case: Case) -> Callable[[], object]:
    """The forward pass alone."""
    import jax

    from aqdetr_jax.models.detector import build_detector, example_input

    config = experiment(case)
    raw = random_batch(case, config)
    module = build_detector(config.model)
    variables = jax.jit(module.init)(jax.random.key(0), *example_input((128, 128)))

    def forward(variables, images, mask):
        output = module.apply(variables, images, mask)
        return output.logits, output.boxes

    compiled = jax.jit(forward).lower(variables, raw["images"], raw["mask"]).compile()
    return lambda: jax.block_until_ready(compiled(variables, raw["images"], raw["mask"]))


def main() -> None:
    """Serves one case."""
    case = CASES[sys.argv[1]]
    from aqdetr_jax.provenance import package_versions

    build = build_step if sys.argv[1].endswith("_step") else build_inference
    serve(lambda: build(case), package_versions())


if __name__ == "__main__":
    host.prepare()
    main()
