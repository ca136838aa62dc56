"""What a student gains on this machine, where ONNX Runtime is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from aqdetr_jax.checkpoint.model_folder import ModelBundle
from aqdetr_jax.deploy.benchmark import benchmark
from aqdetr_jax.deploy.export import deployed_bundle

SECONDS = 2.0
"""How long each model is timed."""


def speed_of(
    student: ModelBundle, teacher: ModelBundle, folder: Path
) -> dict[str, dict[str, Any]] | None:
    """Times a low-bit model and its float teacher in ONNX Runtime, side by side.

    Args:
      student: the low-bit model.
      teacher: the float one.
      folder: where both are written, ``student.onnx`` and ``teacher.onnx``.

    Returns:
      Rows of ``benchmark`` by "student" and "teacher"; None where the extra ``onnx`` is missing.
    """
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        return None
    from aqdetr_jax.deploy.onnx.model import onnx_model, save_onnx

    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, bundle in (("student", student), ("teacher", teacher)):
        files[name] = folder / f"{name}.onnx"
        size = student.input.buckets[0]
        save_onnx(files[name], onnx_model(deployed_bundle(bundle), size=size))
    rows = benchmark([str(file) for file in files.values()], seconds=SECONDS)["rows"]
    return dict(zip(files, rows, strict=True))


def in_words(speed: dict[str, dict[str, Any]]) -> str:
    """One sentence for a report."""
    mine, theirs = speed["student"], speed["teacher"]
    threads = f"{mine['threads']} thread{'s' if mine['threads'] != 1 else ''}"
    ratio = theirs["median_ms"] / mine["median_ms"]
    return (
        f"In ONNX Runtime on {threads} of this machine the student's integers take "
        f"{mine['median_ms']:.1f} ms an image and the teacher's floats {theirs['median_ms']:.1f} "
        f"({ratio:.2f} times as fast), in files of {mine['file_bytes'] / 1024:.0f} and "
        f"{theirs['file_bytes'] / 1024:.0f} KiB."
    )
