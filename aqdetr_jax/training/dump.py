"""A step that cannot be taken, as a folder that takes it again: on another machine, at leisure.

``dumps/step_00000123/`` in the work directory: ``state/`` (the training state before the step),
``teacher/`` (where there is one), ``batch.npz`` (the whole batch) and ``dump.json`` (configuration,
metrics of the step, its images, versions).
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from aqdetr_jax.checkpoint.model_folder import ModelBundle, load_model, save_model
from aqdetr_jax.checkpoint.steps import Checkpoints
from aqdetr_jax.config_types import from_dataclass, to_dataclass
from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.io import read_json, write_bytes_atomic, write_json_atomic
from aqdetr_jax.models.detector import Detector, example_input
from aqdetr_jax.parallel.hosts import is_main
from aqdetr_jax.parallel.mesh import make_mesh, put_batch, replicated
from aqdetr_jax.paths import as_path
from aqdetr_jax.provenance import git_commit, package_versions
from aqdetr_jax.training import setup, sizing
from aqdetr_jax.training.assemble import TRAINED_KEYS, assemble, loss_function, restore
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.faults import bad_parameters, culprits, in_words
from aqdetr_jax.training.metrics import is_loss
from aqdetr_jax.training.phases import phase_of, run_phases
from aqdetr_jax.training.state import TrainState
from aqdetr_jax.trees import flatten, path_name

DUMPS = "dumps"
"""Folder of a work directory with the steps that ended the run."""


def write_dump(
    folder: Path,
    config: ExperimentConfig,
    state: TrainState,
    batch: Mapping[str, np.ndarray],
    metrics: Mapping[str, jax.Array],
    teacher: ModelBundle | None,
    dataset: DetectionDataset,
    reason: str,
) -> Path:
    """Writes a step that was skipped; called by all processes.

    Args:
      folder: work directory.
      config: of the run.
      state: after the step, which differs from that before it by its counts alone.
      batch: this process's part of the step's batch.
      metrics: of the step.
      teacher: of the run.
      dataset: the training set.
      reason: why the run ends.

    Returns:
      The dump's folder.
    """
    done = int(state.step)
    target = folder / DUMPS / f"step_{done:08d}"
    before = dataclasses.replace(
        state, step=state.step - 1, skipped=state.skipped - 1, bad_in_a_row=state.bad_in_a_row - 1
    )
    with Checkpoints(target / "state", keep=1) as checkpoints:
        checkpoints.save(done - 1, before, wait=True)
    if teacher is not None:
        save_model(target / "teacher", teacher)
    whole = {key: np.asarray(batch[key]) for key in (*TRAINED_KEYS, "image_index")}
    if jax.process_count() > 1:
        whole = {
            key: np.asarray(multihost_utils.process_allgather(value, tiled=True))
            for key, value in whole.items()
        }
    found = jax.device_get(dict(metrics))
    if is_main():
        content = io.BytesIO()
        np.savez(content, **whole)  # type: ignore[arg-type]
        write_bytes_atomic(target / "batch.npz", content.getvalue())
        write_json_atomic(
            target / "dump.json",
            {
                "reason": reason,
                "step": done,
                "metrics": {k: _plain(v) for k, v in found.items() if np.ndim(v) == 0},
                "images": [_image(dataset, int(i)) for i in whole["image_index"]],
                "config": from_dataclass(config),
                "commit": git_commit(),
                "versions": package_versions(),
                "device": jax.devices()[0].device_kind,
                "devices": jax.device_count(),
            },
        )
    return target


def _image(dataset: DetectionDataset, index: int) -> dict[str, Any] | None:
    if index < 0:
        return None
    return {"id": dataset.image_id(index), "file": dataset.file_name(index)}


def _plain(value: Any) -> float | str:
    """A number, or the name of what JSON has no number for."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def replay(folder: str | Path) -> dict[str, Any]:
    """Takes the step of a dump again, and looks where its values stop being numbers.

    Args:
      folder: of :func:`write_dump`.

    Returns:
      "step", "reproduced" (whether the step is skipped here too), "metrics" and "dumped" (the same
      of the run), "equal" (whether they are, to the last bit), "culprits", "parameters" and
      "gradients" (paths of those that are not finite) and "images" (of those that give a non-finite
      loss by themselves).

    Raises:
      FileNotFoundError: it is no dump.
      CheckpointError: a file of it is damaged.
    """
    folder = as_path(folder)
    if not (folder / "dump.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no dump: a run that stops for steps that are not finite writes one to "
            f"WORKDIR/{DUMPS}/step_N"
        )
    known = read_json(folder / "dump.json")
    config = to_dataclass(ExperimentConfig, known["config"], f"{folder}: config")
    with (folder / "batch.npz").open("rb") as stream, np.load(stream) as file:
        batch = {key: file[key] for key in file.files}
    images = config.train.batch_size // config.train.accumulate
    mesh = make_mesh(sizing.devices_along_data(config, images), config.mesh.model)
    module = setup.build_module(config)
    teacher = load_model(folder / "teacher") if (folder / "teacher").is_dir() else None
    first = jax.eval_shape(module.init, jax.random.key(0), *example_input(config.data.buckets[0]))
    with jax.set_mesh(mesh):
        assembly = assemble(config, first, mesh)
        with Checkpoints(folder / "state", keep=1) as checkpoints:
            restored = restore(checkpoints, assembly, first)
        if restored is None:
            raise FileNotFoundError(f"{folder / 'state'} holds no state: the dump is not whole")
        state = restored[0]
        teacher_module = teacher.module() if teacher else None
        variables = jax.device_put(teacher.variables if teacher else {}, replicated(mesh))
        broken = bad_parameters(state.params)
        phase = phase_of(run_phases(config), known["step"] - 1)
        loss_fn = loss_function(config, phase.module(module), teacher_module)
        gradients = _bad_gradients(loss_fn, state, variables, _placed(batch, mesh))
        # Last of all, because the step takes the state's memory.
        params, stats, step = jax.device_get((state.params, state.batch_stats, state.step))
        step_fn = assembly.step(module, teacher_module, phase)
        _, metrics = step_fn(state, variables, _placed(batch, mesh))
        found = jax.device_get(dict(metrics))
    alone = _bad_images(loss_fn, module, params, stats, teacher, batch, step)
    values = {key: _plain(value) for key, value in found.items() if np.ndim(value) == 0}
    return {
        "step": known["step"],
        "reproduced": int(found["bad_in_a_row"]) > 0,
        "culprits": culprits(found, assembly.optimizer.packing.names),
        "metrics": values,
        "dumped": known["metrics"],
        "equal": values == known["metrics"],
        "parameters": broken,
        "gradients": gradients,
        "images": [known["images"][i] for i in alone],
        "known": {key: known[key] for key in ("reason", "commit", "versions", "device", "devices")},
        "name": config.name,
    }


def _placed(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    return put_batch({key: batch[key] for key in TRAINED_KEYS}, mesh)


def _bad_gradients(loss_fn: Any, state: TrainState, teacher: Any, batch: Any) -> list[str]:
    """Paths of the parameters whose gradient is not finite."""

    @jax.jit
    def finite(params, stats, teacher, batch, step):
        gradients, _ = jax.grad(loss_fn, has_aux=True)(params, stats, teacher, batch, step)
        return jax.tree.map(lambda x: jax.numpy.all(jax.numpy.isfinite(x)), gradients)

    good = jax.device_get(finite(state.params, state.batch_stats, teacher, batch, state.step))
    return [path_name(path) for path, value in flatten(good) if not value]


def _bad_images(
    loss_fn: Any,
    module: Any,
    params: Any,
    stats: Any,
    teacher: ModelBundle | None,
    batch: Mapping[str, np.ndarray],
    step: np.ndarray,
) -> list[int]:
    """The rows of a batch that give a loss that is not finite by themselves, on one device."""
    if not isinstance(module, Detector):  # whose norms need the whole batch
        return []

    @jax.jit
    def loss(params, stats, teacher, image, step):
        total, (terms, _) = loss_fn(params, stats, teacher, image, step)
        return total, {name: value for name, value in terms.items() if is_loss(name)}

    variables = teacher.variables if teacher else {}
    found = []
    for row in range(len(batch["images"])):
        image = {key: batch[key][row : row + 1] for key in TRAINED_KEYS}
        values = jax.device_get(loss(params, stats, variables, image, step))
        if not all(np.isfinite(value) for value in jax.tree.leaves(values)):
            found.append(row)
    return found


def format_replay(made: Mapping[str, Any]) -> str:
    """What a replay found, for people."""
    known = made["known"]
    lines = [
        f"step {made['step']} of {made['name']}: {known['reason']}",
        f"dumped by commit {known['commit']}, {known['devices']} x {known['device']}",
    ]
    names = [n for n, v in made["metrics"].items() if is_loss(n) or n == "gradient_norm"]
    lines += [f"  {n}: {made['metrics'][n]} (dumped: {made['dumped'].get(n)})" for n in names]
    for key, text in (
        ("culprits", "not finite"),
        ("parameters", "parameters that are no numbers"),
        ("gradients", "gradients that are not finite"),
    ):
        if made[key]:
            lines.append(f"{text}: {in_words(made[key])}")
    if made["images"]:
        shown = [f"{image['id']} ({image['file']})" for image in made["images"] if image]
        lines.append(f"images that do it by themselves: {in_words(shown)}")
    elif made["reproduced"] and not made["parameters"]:
        lines.append("no image does it by itself")
    same = "to the last bit" if made["equal"] else "with other numbers"
    lines.append(
        f"reproduced, {same}" if made["reproduced"] else "not reproduced: the step is finite here"
    )
    return "\n".join(lines)
