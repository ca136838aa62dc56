"""``aqdetr export`` to what devices run: written, read back, judged, and only then there."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aqdetr_jax.checkpoint.model_folder import ModelBundle, load_model
from aqdetr_jax.deploy import archive, gate
from aqdetr_jax.deploy.detector import DeployedBundle
from aqdetr_jax.deploy.freeze import freeze
from aqdetr_jax.deploy.packed import read_packed, used, write_packed
from aqdetr_jax.deploy.programs import write_programs
from aqdetr_jax.io import check_folder, folder_bytes, read_json, whole_folder, write_json_atomic
from aqdetr_jax.provenance import git_commit

REPORT = "report.json"
"""What the gate saw, beside the exported files."""

MOST_LOST = {"packed": 0.0005, "onnx": 0.001, "stablehlo": 0.001}
"""AP that an export may lose: nothing to three decimals, and 0.1 point where another program
computes the floats."""


def deployed_bundle(model: ModelBundle, source: str = "") -> DeployedBundle:
    """A trained model as it is deployed.

    Args:
      model: of either family, low-bit or float.
      source: path of the model, for the facts that go along.
    """
    config = dataclasses.replace(
        model.config, num_auxiliary=0, auxiliary_groups=1, dtype=gate.FLOATS
    )
    model = dataclasses.replace(model, config=config)
    network = used(freeze(model), model.input.buckets[0])
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    info = {k: v for k, v in model.info.items() if k != "results"}
    info |= {"exported_by": git_commit(), "source": source}
    return DeployedBundle(**{**fields, "variables": network, "info": info})


def export_model(
    model: str | Path,
    to: str | Path,
    kind: str,
    given: gate.GateData,
    *,
    force: bool = False,
    progress: gate.Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Writes a trained model for devices, judged by the gate.

    Args:
      model: path of a trained model.
      to: the folder to write; an earlier export of that kind there is replaced, nothing else is.
      kind: one of ``KINDS``.
      given: what it is judged on.
      force: write it even if it does not pass.
      progress: see ``gate``.
      **options: of the kind: for "onnx" those of ``onnx.folder.OnnxOptions``, for "stablehlo"
        ``chip``, see ``programs.write_programs``.

    Returns:
      The gate's report.

    Raises:
      ExportRefusedError: it did not pass; nothing was written.
      FileExistsError: something else is at ``to``.
    """
    mark, write = KINDS[kind]
    _check_target(to, kind)
    bundle = load_model(model)
    with whole_folder(to, mark) as stage:
        deployed, runtime = write(stage, deployed_bundle(bundle, str(model)), **options)
        report = gate.judge(
            bundle, deployed, given, runtime, most_lost=MOST_LOST[kind], progress=progress
        )
        report["format"] = kind
        _finish(stage, report, force)
    return report


def _check_target(to: str | Path, kind: str) -> None:
    """Reports of all kinds have one name, and so have other programs' files."""
    report = check_folder(to, KINDS[kind][0]) / REPORT
    if KINDS[kind][0] != REPORT or not report.is_file():
        return
    content: Any = None
    with contextlib.suppress(ValueError):  # no JSON: not ours
        content = read_json(report)
    if not isinstance(content, dict) or content.get("format") != kind:
        raise FileExistsError(
            f"{report.parent} exists and is no export of --format={kind}, so that it is not "
            "replaced; choose another name"
        )


def _packed(stage: Path, bundle: DeployedBundle) -> tuple[DeployedBundle, None]:
    write_packed(stage, bundle)
    return read_packed(stage), None


def _onnx(stage: Path, bundle: DeployedBundle, **options: Any) -> tuple[DeployedBundle, Any]:
    try:
        from aqdetr_jax.deploy.onnx.folder import OnnxOptions, write_folder
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--format=onnx needs the package {error.name}: pip install 'aqdetr-jax[onnx]'"
        ) from None
    return bundle, write_folder(stage, bundle, OnnxOptions(**options))


def _programs(stage: Path, bundle: DeployedBundle, **options: Any) -> tuple[DeployedBundle, Any]:
    return bundle, write_programs(stage, bundle, **options)


KINDS: dict[str, tuple[str, Callable[..., tuple[DeployedBundle, Any]]]] = {
    "packed": (archive.WEIGHTS, _packed),
    "onnx": (REPORT, _onnx),
    "stablehlo": (REPORT, _programs),
}
"""By name: the file that every folder of the kind holds, and what writes one: it returns the
deployed network to compare with, and what runs the file (None: our integers do)."""


def _finish(stage: Path, report: dict[str, Any], force: bool) -> None:
    """Writes the report, or refuses.

    Raises:
      ExportRefusedError: the report has failures, and nobody insists.
    """
    report["bytes"] = folder_bytes(stage)
    if report["failures"] and not force:
        raise gate.ExportRefusedError(
            "not exported: " + "; ".join(report["failures"]) + " (--force exports it all the same)"
        )
    write_json_atomic(stage / REPORT, report)
