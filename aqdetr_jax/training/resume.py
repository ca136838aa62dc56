"""What a run must have in common with the run that its work directory holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aqdetr_jax.checkpoint.model_folder import MODEL_FOLDER
from aqdetr_jax.config_types import from_dataclass
from aqdetr_jax.data.dataset import DetectionDataset
from aqdetr_jax.training import setup
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.workdir import check_workdir

CHANGEABLE = (
    "model.remat",
    "train.accumulate",
    "train.eval_every",
    "train.eval_batch_size",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.abort_after",
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


def _has_state(path: Path) -> bool:
    """Whether a work directory holds anything trained; until then its configuration may change."""
    return (path / MODEL_FOLDER / "manifest.json").is_file() or any(
        path.glob("checkpoints/step_*.manifest.json")
    )
