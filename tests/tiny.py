"""One tiny experiment that all integration tests share, so that they share its compilations."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax._src import compiler

from aqdetr_jax.checkpoint.model_folder import InputRule, ModelBundle, save_model
from aqdetr_jax.config_types import from_dataclass
from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.data.pipeline import make_train_pipeline
from aqdetr_jax.data.transforms import AugmentConfig
from aqdetr_jax.losses.distillation import DistillationWeights
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.detector import example_input
from aqdetr_jax.models.resnet import BackboneConfig
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.training import initial, setup, sizing
from aqdetr_jax.training.config import (
    AuxiliaryConfig,
    DistillConfig,
    ExperimentConfig,
    OptimizerConfig,
    TrainConfig,
)

BACKBONE = BackboneConfig(
    block="basic",
    depths=(1, 1),
    widths=(8, 16),
    strides=(1, 2),
    dilations=(1, 1),
    stem_width=8,
    stem_kernel=3,
    stem_stride=4,
    stem_pool=False,
    norm="frozen",
)
"""Output stride 8: 64 tokens of a 64-pixel image."""

MODEL = DetrConfig(
    backbone=BACKBONE,
    num_classes=0,
    num_queries=12,
    num_auxiliary=0,
    dim=32,
    heads=2,
    encoder_layers=1,
    decoder_layers=2,
    ffn=32,
    dropout=0.0,
    pre_norm=True,
)

FLOAT = ExperimentConfig(
    name="tiny",
    data=DataConfig(
        num_train=16,
        num_eval=6,
        image_size=64,
        buckets=((64, 64),),
        augment=AugmentConfig(
            scales=(48, 64), max_size=64, crop_probability=0.3, crop_size=(32, 64)
        ),
    ),
    model=MODEL,
    optimizer=OptimizerConfig(
        lr=1e-3, lr_backbone=1e-3, clip_norm=1.0, schedule="constant", ema=0.9
    ),
    train=TrainConfig(
        steps=6, batch_size=4, eval_batch_size=4, checkpoint_every=2, log_every=1, pictures=2
    ),
)
"""A float DETR from scratch."""


def random_variables(module: Any, *inputs: Any) -> Any:
    """Random values in every variable of a model, whatever its initialiser says."""
    return random_like(jax.eval_shape(module.init, jax.random.key(0), *inputs))


def random_like(shapes: Any) -> Any:
    """Random values for a tree of shapes of variables, a function of each path."""

    def one(path, leaf):
        name = path[-1].key
        rng = np.random.default_rng(zlib.crc32("/".join(p.key for p in path).encode()))
        if name.endswith("_step"):
            size = {"kernel_step": 0.1, "probs_step": 0.03}.get(name, 0.3)
            return rng.uniform(0.7 * size, size, leaf.shape).astype(np.float32)
        if name.endswith("_zero"):
            return rng.integers(0, 16, leaf.shape).astype(np.float32)
        if name.endswith("_offset"):
            return rng.uniform(-4, 4, leaf.shape).astype(np.float32)
        if name in ("var", "input_scale"):
            return rng.uniform(0.5, 2.0, leaf.shape).astype(np.float32)
        x = rng.normal(0, 0.3, leaf.shape).astype(np.float32)
        return 1 + x if name == "scale" else x

    return jax.tree_util.tree_map_with_path(one, shapes)


# What the newer code generator for CPUs emits takes LLVM twice as long to compile; code in several
# parts takes a tenth longer, and the cores have other tests to run.
QUICK_FLAGS = (
    ("xla_cpu_use_fusion_emitters", False),
    ("xla_cpu_parallel_codegen_split_count", 1),
)


@functools.cache
def _known_flags() -> list[tuple[str, bool | int]]:
    """Those that this XLA has; without one it compiles as it does."""
    compiled, known = jax.jit(lambda x: x).lower(0.0), []
    for flag in QUICK_FLAGS:
        try:
            compiled.compile(compiler_options=dict([flag]))
        except jax.errors.JaxRuntimeError as error:
            if flag[0] not in str(error):
                raise
        else:
            known.append(flag)
    return known


HUNG_SECONDS = 3600
"""When a child process is taken to hang. No test is a test of speed: machines can be busy."""


def more_flags(flag: str) -> str:
    """The value of ``XLA_FLAGS`` with one more flag, for a child process."""
    return f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Compiles in a third of the time to slower code, in child processes too; on CPUs only."""
    name = "jax_disable_most_optimizations"
    if jax.config.read(name) or jax.default_backend() != "cpu":
        yield
        return
    options, known = compiler.get_compile_options, _known_flags()

    def with_flag(*args: Any, **kwargs: Any) -> Any:
        result = options(*args, **kwargs)
        result.env_option_overrides = [*result.env_option_overrides, *known]
        return result

    # XLA reads its flags once: before they change for the children.
    jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        for flag, value in known:
            patch.setenv("XLA_FLAGS", more_flags(f"--{flag}={str(value).lower()}"))
        patch.setenv(name.upper(), "1")
        patch.setattr(compiler, "get_compile_options", with_flag)
        jax.config.update(name, True)
        try:
            yield
        finally:
            jax.config.update(name, False)


def changed(config: ExperimentConfig, section: str, **fields: Any) -> ExperimentConfig:
    """The configuration with some fields of one section replaced."""
    part = dataclasses.replace(getattr(config, section), **fields)
    return dataclasses.replace(config, **{section: part})


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def student(teacher: str | Path) -> ExperimentConfig:
    """A 4-bit student with everything random in it: auxiliary queries, distillation, dropout."""
    return dataclasses.replace(
        FLOAT,
        name="tiny_student",
        init_from=str(teacher),
        model=dataclasses.replace(MODEL, num_auxiliary=24, auxiliary_groups=2, dropout=0.1),
        quant=QuantConfig("w4a4", calibration_batches=1),
        auxiliary=AuxiliaryConfig(repeats=2),
        distill=DistillConfig(
            weights=DistillationWeights(encoder=1.0, decoder_self=0.5, decoder_cross=0.5)
        ),
    )


def resolved(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration with its number of classes filled in."""
    return sizing.with_data(config, open_dataset(config.data, train=True))


def bundle(config: ExperimentConfig = FLOAT, seed: int = 0, *, drawn: bool = True) -> ModelBundle:
    """A random float model that fits the tiny experiment.

    Args:
      config: its sizes.
      seed: of the initialisers.
      drawn: by the initialisers; else ``random_variables``, which is faster.
    """
    config = dataclasses.replace(resolved(config), seed=seed)
    module = setup.build_module(config)
    if drawn:
        variables, _ = initial.initial_variables(config, module, None, ())
    else:
        variables = random_variables(module, *example_input(config.data.buckets[0]))
    dataset = open_dataset(config.data, train=True)
    return ModelBundle(
        config.model,
        config.quant,
        InputRule.from_data(config.data),
        dataset.class_names,
        dataset.category_ids,
        variables,
        {"name": "tiny"},
    )


def save_teacher(folder: str | Path) -> Path:
    """Saves a random float model and returns its folder."""
    save_model(folder, bundle())
    return Path(folder)


def batches(config: ExperimentConfig, count: int) -> list[dict[str, np.ndarray]]:
    """The first training batches."""
    dataset = open_dataset(config.data, train=True)
    stream = make_train_pipeline(dataset, setup.pipeline_config(config, train=True))
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


def write_config(config: ExperimentConfig, path: str | Path) -> Path:
    """Writes a configuration as JSON that ``load_config_file`` reads."""
    Path(path).write_text(json.dumps(from_dataclass(config)))
    return Path(path)


def flat(variables: Any) -> dict[str, np.ndarray]:
    """The parameters as one dict, path -> array."""
    return traverse_util.flatten_dict(variables["params"], sep="/")


def digest(tree: Any) -> str:
    """SHA-256 over the bytes of every leaf, its path, shape and dtype included."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree)):
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def primitives(jaxpr: Any) -> collections.Counter[str]:
    """How often each primitive occurs in a jaxpr and in all jaxprs inside it."""
    return collections.Counter(equation.primitive.name for equation in equations(jaxpr))


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr and of all jaxprs inside it, in order.

    Of what depends on the platform, the form of those that have none of their own.
    """
    for equation in jaxpr.eqns:
        yield equation
        for name, value in equation.params.items():
            parts = value if isinstance(value, tuple) else (value,)
            if name == "branches" and equation.params.get("branches_platforms"):
                parts = parts[-1:]
            for part in parts:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)
