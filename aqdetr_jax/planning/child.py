"""Compiles one program for a slice that is not there; a process of its own.

``python -m aqdetr_jax.planning.child FOLDER`` reads ``FOLDER/case.json``, lets XLA dump into
``FOLDER/dump`` (the parent has set its flags, and libtpu's variables, which count at the start of a
process only) and writes ``FOLDER/done.json``. The parent may end it before, see ``ahead``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from aqdetr_jax.config_types import to_dataclass
from aqdetr_jax.evaluation.evaluator import make_predict_fn
from aqdetr_jax.io import read_json, write_json_atomic
from aqdetr_jax.models.dense import DensePretrainer
from aqdetr_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from aqdetr_jax.planning.chips import parse_slice
from aqdetr_jax.training import setup
from aqdetr_jax.training.assemble import assemble, batch_shapes, stand_in_teacher, variables_of
from aqdetr_jax.training.config import ExperimentConfig


def slice_mesh(name: str, data: int, model: int) -> Mesh:
    """The mesh that a run would make on a slice, without the slice.

    Args:
      name: of the slice.
      data: devices along the batch; -1 = all that ``model`` leaves.
      model: devices that share a replica's parameters.

    Raises:
      ValueError: JAX cannot lay such a mesh over the links of the slice.
    """
    from jax.experimental import topologies

    wanted = parse_slice(name)
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=wanted.name, **wanted.options
    )
    try:
        return make_mesh(None if data < 0 else data, model, devices=found.devices)
    except NotImplementedError as error:
        raise ValueError(
            f"config.mesh.model={model} cannot be laid over the links of {name}, on the slice "
            "itself neither: config.mesh.model=1 can"
        ) from error


def placed(tree: Any, sharding: Any) -> Any:
    """Shapes with a sharding."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def train_program(
    config: ExperimentConfig, bucket: tuple[int, int], mesh: Mesh
) -> tuple[Any, tuple[Any, ...]]:
    """The jitted training step of a configuration, and the shapes of its arguments.

    Args:
      config: with every size given; ``train.batch_size`` rows a step.
      bucket: height and width of the images.
      mesh: devices.
    """
    module, teacher = setup.build_module(config), stand_in_teacher(config)
    assembly = assemble(config, variables_of(module, bucket), mesh)
    theirs = {} if teacher is None else variables_of(teacher, bucket)
    batch = batch_shapes(config, bucket, config.train.batch_size)
    arguments = (
        assembly.state,
        placed(theirs, replicated(mesh)),
        placed(batch, batch_sharding(mesh)),
    )
    return assembly.step(module, teacher), arguments


def eval_program(
    config: ExperimentConfig, bucket: tuple[int, int], mesh: Mesh
) -> tuple[Any, tuple[Any, ...]]:
    """The jitted inference of an evaluation, ``train.eval_batch_size`` images, and its shapes."""
    module = setup.build_module(config)
    if isinstance(module, DensePretrainer):
        raise ValueError("a dense pretraining has no evaluation step")
    variables = variables_of(module, bucket)
    rows = config.train.eval_batch_size
    batch = (*images(bucket, rows), jax.ShapeDtypeStruct((rows, 2), jnp.int32))
    arguments = (placed(variables, replicated(mesh)), *placed(batch, batch_sharding(mesh)))
    return make_predict_fn(module, mesh, config.model.num_classes), arguments


def images(bucket: tuple[int, int], rows: int) -> tuple[Any, Any]:
    """Shapes of images and their mask."""
    pixels = jax.ShapeDtypeStruct((rows, *bucket, 3), jnp.uint8)
    return pixels, jax.ShapeDtypeStruct((rows, *bucket), jnp.bool_)


PROGRAMS = {"train": train_program, "eval": eval_program}


def main(folder: Path) -> None:
    """Compiles the case of a folder."""
    case = read_json(folder / "case.json")
    config = to_dataclass(ExperimentConfig, case["config"])
    try:
        mesh = slice_mesh(case["topology"], config.mesh.data, config.mesh.model)
        with jax.set_mesh(mesh):
            program, arguments = PROGRAMS[case["kind"]](config, tuple(case["bucket"]), mesh)
    except ValueError as error:  # of the placement: it says what to change
        write_json_atomic(folder / "done.json", {"refused": str(error)})
        return
    with jax.set_mesh(mesh):
        lowered = program.lower(*arguments)
        start = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            write_json_atomic(folder / "done.json", {"error": str(error)})
            return
    found = compiled.memory_analysis()
    write_json_atomic(
        folder / "done.json",
        {
            "compile_seconds": time.perf_counter() - start,
            "code_bytes": int(found.generated_code_size_in_bytes),
        },
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
