"""What a run must have in common with the run that its work directory holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aqdetr_jax.checkpoint.model_folder import MODEL_FOLDER
from aqdetr_jax.config_types import from_dataclass
from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.provenance import git_commit, package_versions
from aqdetr_jax.training import setup
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.config_tools import flatten_config
from aqdetr_jax.training.workdir import DATA_PATHS, check_workdir

CHANGEABLE = (
    "model.remat",
    "mesh.data",
    "mesh.model",
    "train.accumulate",
    "train.eval_every",
    "train.eval_batch_size",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.on_save_error",
    "train.log_every",
    "train.quantizers_every",
    "train.abort_after",
    "train.watchdog",
    "train.pictures",
    "train.profile",
    "data.workers",
    "data.num_threads",
    "data.prefetch",
    "data.cache_dir",
    "data.follow_links",
    "data.max_pixels",
    "data.on_error",
)
"""Keys that may differ when a run is resumed: none of them changes what was trained so far, nor
(but for rounding) what will be. (Paths may, too, if they lead to the same data and models: see
``workdir``.)"""


def check_resumable(
    config: ExperimentConfig, workdir: Path, train_set: DetectionDataset, eval_set: DetectionDataset
) -> None:
    """Whether ``train`` would refuse a work directory for what it holds; nothing is changed.

    Args:
      config: the experiment, with what depends on the data filled in.
      workdir: folder of the run.
      train_set: its training set.
      eval_set: its evaluation set.

    Raises:
      WorkdirError: it holds another run.
    """
    check_workdir(workdir, from_dataclass(config), **facts(config, workdir, train_set, eval_set))


def facts(
    config: ExperimentConfig, workdir: Path, train_set: DetectionDataset, eval_set: DetectionDataset
) -> dict[str, Any]:
    """What a work directory must agree with, as arguments of ``prepare_workdir``."""
    return {
        "dataset": {"train": train_set.fingerprint, "eval": eval_set.fingerprint},
        "models": setup.model_checksums(config),
        "teacher": setup.teacher_key(config),
        "changeable": CHANGEABLE if _has_state(workdir) else ("*",),
    }


MAY_DIFFER = (
    *DATA_PATHS,
    *("init_from", "distill.teacher"),
    *("data.cache_dir", "data.num_threads", "data.prefetch", "data.follow_links"),
)
"""Keys that may differ from host to host (paths, if they lead to the same)."""


def shared_facts(config: ExperimentConfig, known: Mapping[str, Any]) -> dict[str, Any]:
    """What all hosts of a run must have in common, by name.

    Args:
      config: the experiment, with what depends on the data filled in.
      known: from :func:`facts`.
    """
    flat = flatten_config(config)
    return {
        **{f"config.{key}": value for key, value in flat.items() if key not in MAY_DIFFER},
        **{f"the data of config.data ({k})": v for k, v in known["dataset"].items()},
        **{f"the model of config.{key}": value for key, value in known["models"].items()},
        **{f"the version of {name}": v for name, v in package_versions().items()},
        "the commit": git_commit(),
    }


def _has_state(path: Path) -> bool:
    """Whether a work directory holds anything trained; until then its configuration may change."""
    return (path / MODEL_FOLDER / "manifest.json").is_file() or any(
        path.glob("checkpoints/step_*.manifest.json")
    )
