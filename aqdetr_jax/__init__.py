"""Low-bit detection transformers in JAX: the AQ-DETR method.

``load(path).predict(image)`` detects; the command ``aqdetr`` trains, evaluates and predicts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from aqdetr_jax.evaluation.predict import Detector


def load(path: str) -> Detector:
    """Loads a model folder, the model of a run's work directory or a packed model, ready to detect.

    Args:
      path: ``RUN``, ``RUN/model`` or the folder of a packed model.

    Returns:
      A detector: ``load(path).predict(image)`` with a path, PIL image or array.
    """
    # Imported on demand: configuration tools must not pay for JAX and Flax.
    from aqdetr_jax.deploy.load import load as load_detector

    return load_detector(path)
