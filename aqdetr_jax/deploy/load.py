"""Models by path, deployed ones included."""

from __future__ import annotations

from pathlib import Path

from aqdetr_jax.checkpoint.model_folder import ModelBundle, load_model
from aqdetr_jax.deploy.archive import is_archive
from aqdetr_jax.deploy.packed import read_packed
from aqdetr_jax.evaluation.predict import Detector


def open_model(path: str | Path) -> ModelBundle:
    """A model folder, a run's model, or a packed model (then a ``DeployedBundle``).

    Args:
      path: ``RUN/model``, ``RUN``, ``packaged:NAME`` or the folder of a packed model.

    Raises:
      FileNotFoundError: there is no model.
      ValueError: it cannot be used; the message names the file and the reason.
    """
    return read_packed(path) if is_archive(path) else load_model(path)


def load(path: str | Path) -> Detector:
    """Loads a model, ready to detect; see ``open_model``."""
    return Detector(open_model(path))
