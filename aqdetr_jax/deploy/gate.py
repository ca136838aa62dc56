"""The gate at the end of every export: is what was written the network that was trained?

On real images of a stated set: class scores and boxes, the codes at every quantizer, and AP by the
same COCO code. What does not pass is not exported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from aqdetr_jax.checkpoint.model_folder import ModelBundle
from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.eval_batches import EvalBatches
from aqdetr_jax.data.first import FirstImages
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.data.pipeline import PipelineConfig
from aqdetr_jax.deploy.compare import Comparison, NetworkComparer, model_codes
from aqdetr_jax.deploy.detector import DeployedBundle
from aqdetr_jax.evaluation.coco import evaluate_detections, postprocess, to_coco_results
from aqdetr_jax.evaluation.models import bundle_evaluator
from aqdetr_jax.provenance import git_commit

IMAGES = 200
"""That an export is judged on, unless another number is given."""

MOST_DIFFERENT = 1e-4
"""Share of codes that may lie on the other side of a border, see ``deploy.compare``."""

LARGEST_DIFFERENCE = 1
"""Of such a code."""

FLOAT_LIMITS = {"logits": 1e-2, "boxes": 1e-3}
"""The largest difference of a float network's outputs, which the order of its sums makes."""

FLOATS = "float32"
"""Carries what stays float once deployed, whatever carried activations in training."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done and steps."""


class ExportRefusedError(ValueError):
    """What was written is not what was trained; says in what."""


class Runtime(Protocol):
    """An exported model that another program computes.

    Attributes:
      name: of the program.
      batch: images at once.
      raw: whether ``detect`` returns (logits [B, N, C], boxes [B, N, 4] as cxcywh in [0, 1]), else
        (scores [B, K], labels [B, K], boxes [B, K, 4] as xyxy in pixels of the real image).
    """

    name: str
    batch: int
    raw: bool

    def detect(self, images: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of images uint8 [B, H, W, 3] and the (height, width) of the real ones, int32 [B, 2]."""
        ...

    @property
    def codes(self) -> Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]] | None:
        """The codes of every quantizer by site, of the same; None if they cannot be had."""
        ...


@dataclasses.dataclass(frozen=True)
class GateData:
    """The set that an export is judged on.

    Attributes:
      data: whose evaluation set.
      images: its first ones, on which all is judged.
      batch_size: images a batch.
      name: of the configuration, for the report.
    """

    data: DataConfig
    images: int = IMAGES
    batch_size: int = 8
    name: str = ""


def judge(
    model: ModelBundle,
    deployed: DeployedBundle,
    given: GateData,
    runtime: Runtime | None = None,
    *,
    most_lost: float,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compares a trained model with what was made of it.

    Args:
      model: as it was trained (fake-quantized). One that was trained with bfloat16 activations is
        compared as it is in float32, which is what is deployed; its AP in bfloat16 is reported too.
      deployed: its deployed network, as read back from what was written.
      given: the set.
      runtime: another program that computes the exported file; None = our integers are the export.
      most_lost: AP (0 to 1) that may be lost.
      progress: shows how far it is.

    Returns:
      The report: plain JSON values. ``report["failures"]`` says what did not pass.
    """
    show = progress or (lambda *_: None)
    dataset = FirstImages(open_dataset(given.data, train=False), given.images)
    exact = dataclasses.replace(model, config=dataclasses.replace(model.config, dtype=FLOATS))
    bundles = {"trained": exact, "deployed": deployed}
    if model.config.dtype != FLOATS:
        bundles = {f"trained, in {model.config.dtype}": model, **bundles}
    # Before anything is computed: a set of other classes is found here.
    evaluators = {
        name: bundle_evaluator(bundle, dataset, given.data, batch_size=given.batch_size)
        for name, bundle in bundles.items()
    }
    failures: list[str] = []
    report: dict[str, Any] = {
        "set": {"name": dataset.name, "images": len(dataset), "config": given.name},
        "commit": git_commit(),
        "most_lost_ap": most_lost,
        "codes": {},
        "ap": {},
    }

    comparison = _compare_model(exact, deployed, dataset, given, show)
    report["codes"]["trained, deployed"] = comparison.to_dict()
    failures += _failures(comparison, "the trained and the deployed network")
    if runtime is not None and runtime.codes is not None:
        comparison = _compare_runtime(runtime, deployed, dataset, given, show)
        report["codes"][f"deployed, {runtime.name}"] = comparison.to_dict()
        failures += _failures(comparison, f"the deployed network and {runtime.name}")

    for name, evaluator in evaluators.items():
        variables = bundles[name].variables
        metrics, _ = evaluator.evaluate(variables, _shown(show, f"{name}: evaluated"))
        report["ap"][name] = _numbers(metrics)
    judged = ["deployed"]
    if runtime is not None:
        judged.append(runtime.name)
        found_by = _runtime_metrics(runtime, deployed, dataset, given, show)
        report["ap"][runtime.name] = _numbers(found_by)
    reference = report["ap"]["trained"]["AP"]
    for name in judged:
        found = report["ap"][name]["AP"]
        if not reference - found <= most_lost:
            failures.append(
                f"{name} has AP {found:.4f} on {len(dataset)} images, the trained model "
                f"{reference:.4f}"
            )
    report["failures"] = failures
    return report


def _failures(comparison: Comparison, pair: str) -> list[str]:
    failures = []
    codes, different = comparison.codes, comparison.different
    if different > MOST_DIFFERENT * codes:
        worst = max(comparison.sites, key=lambda name: comparison.sites[name].different)
        failures.append(
            f"{pair} differ in {different} of {codes} codes, most of all at {worst} "
            f"({comparison.sites[worst].different})"
        )
    far = [n for n, s in comparison.sites.items() if s.largest > LARGEST_DIFFERENCE]
    if far:
        failures.append(
            f"{pair} differ at {far[0]} by up to {comparison.sites[far[0]].largest} codes"
        )
    for name, limit in FLOAT_LIMITS.items():
        found = getattr(comparison, name)
        if not found <= limit:
            failures.append(f"{pair} differ in {name} by {found:.3g} from the same codes")
    return failures


def _pipeline(bundle: ModelBundle, given: GateData, batch_size: int) -> PipelineConfig:
    config = PipelineConfig.from_data(given.data, train=False, batch_size=batch_size)
    return dataclasses.replace(config, **bundle.input.pipeline())


def _compare_model(model, deployed, dataset, given, show) -> Comparison:
    run, comparer, comparison = (
        model_codes(model),
        NetworkComparer(deployed.network),
        Comparison(),
    )
    batches = EvalBatches(dataset, _pipeline(model, given, given.batch_size))
    variables = jax.device_put(model.variables)
    for number, batch in enumerate(batches, 1):
        logits, boxes, codes = run(variables, batch["images"], batch["mask"])
        real = batch["image_index"] >= 0
        comparer.add(comparison, batch["images"], batch["mask"], codes, (logits, boxes), real)
        show("codes compared", number, len(batches))
    return comparison


def _compare_runtime(runtime: Runtime, deployed, dataset, given, show) -> Comparison:
    codes_of = runtime.codes
    assert codes_of is not None
    comparer, comparison = NetworkComparer(deployed.network), Comparison()
    batches = EvalBatches(dataset, _pipeline(deployed, given, runtime.batch))
    for number, batch in enumerate(batches, 1):
        images, mask, real = batch["images"], batch["mask"], batch["image_index"] >= 0
        codes = codes_of(images, _sizes(mask))
        outputs = runtime.detect(images, _sizes(mask)) if runtime.raw else ()
        comparer.add(comparison, images, mask, codes, outputs, real)
        show(f"{runtime.name}: codes compared", number, len(batches))
    return comparison


def _shown(show: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: show(what, done, total)


def _runtime_metrics(runtime: Runtime, bundle, dataset, given, show) -> Mapping[str, Any]:
    """COCO numbers of what another program detects."""
    known = dict(zip(dataset.class_names, dataset.category_ids, strict=True))
    ids = [known.get(name) for name in bundle.class_names]
    read = jax.jit(
        lambda logits, boxes, size: postprocess(
            logits, boxes, size, kind=bundle.config.class_loss, num_classes=len(ids)
        )
    )
    results: list[dict[str, Any]] = []
    batches = EvalBatches(dataset, _pipeline(bundle, given, runtime.batch))
    for number, batch in enumerate(batches, 1):
        sizes, original = _sizes(batch["mask"]), batch["original_size"]
        found = runtime.detect(batch["images"], sizes)
        if runtime.raw:
            scores, labels, boxes = jax.device_get(read(*found, original))
        else:
            scores, labels, boxes = found
            scale = (original / sizes)[:, None, ::-1]
            boxes = boxes * np.concatenate([scale, scale], -1)
        images = [dataset.image_id(int(i)) if i >= 0 else None for i in batch["image_index"]]
        results += to_coco_results(images, scores, labels, boxes, ids)
        show(f"{runtime.name}: evaluated", number, len(batches))
    return evaluate_detections(
        dataset.coco_ground_truth(),
        results,
        category_ids=dataset.category_ids,
        class_names=dataset.class_names,
    )


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items() if isinstance(v, float | int)}


def _sizes(mask: np.ndarray) -> np.ndarray:
    """(height, width) of the real images, int32 [B, 2]."""
    return np.stack([mask[:, :, 0].sum(1), mask[:, 0, :].sum(1)], -1).astype(np.int32)


def format_report(report: Mapping[str, Any]) -> str:
    """The report as text."""
    images = report["set"]["images"]
    lines = [f"{'':24}{'AP':>8}{'AP50':>8}   ({images} images of {report['set']['name']})"]
    for name, metrics in report["ap"].items():
        lines.append(f"{name:24}{metrics['AP']:8.4f}{metrics['AP50']:8.4f}")
    for pair, found in report["codes"].items():
        lines.append(
            f"{pair}: {found['different']} of {found['codes']} codes differ "
            f"({len(found['sites'])} quantizers, {found['images']} images); from the same codes "
            f"logits by {found['largest_logit_difference']:.2g}, boxes by "
            f"{found['largest_box_difference']:.2g}"
        )
    return "\n".join(lines)
