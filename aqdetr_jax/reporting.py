"""Pictures and the report of a run: curves, detections side by side, attention, bits.

The results of a run are on the disk before any of this begins, and none of it fails the run: what
cannot be drawn or written is one line on stderr (``spare``).
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from aqdetr_jax.checkpoint.model_folder import ModelBundle
from aqdetr_jax.data.dataset import DetectionDataset, Example, ImageReadError
from aqdetr_jax.data.eval_batches import EvalBatches
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.data.pipeline import PipelineConfig
from aqdetr_jax.deploy import ranking
from aqdetr_jax.deploy.sensitivity import POLICY
from aqdetr_jax.io import folder_bytes, read_json
from aqdetr_jax.ops.boxes import cxcywh_to_xyxy, pairwise_giou
from aqdetr_jax.paths import as_path, printable
from aqdetr_jax.training import setup
from aqdetr_jax.training.loop import RunResult
from aqdetr_jax.viz.attention import attention_grid, attention_rows, focused_cells, real_cells
from aqdetr_jax.viz.curves import save_figure, training_curves
from aqdetr_jax.viz.detections import Panel, detection_grid
from aqdetr_jax.viz.fonts import class_text, note_of_numbers
from aqdetr_jax.viz.png import save_png
from aqdetr_jax.viz.records import read_metrics
from aqdetr_jax.viz.report import write_report
from aqdetr_jax.viz.sampling import Samples, sampling_grid, splat
from aqdetr_jax.viz.sensitivity import sensitivity_figure

Results = Sequence[Mapping[str, Any]]


@contextlib.contextmanager
def spare(what: str, notes: list[str] | None = None) -> Iterator[None]:
    """Spares a finished run the failure of its report: the body's error becomes one line.

    Args:
      what: what is being made, for the line.
      notes: receives the line too.
    """
    try:
        yield
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {error}", most=500)
        line = f"{what} could not be made ({reason})"
        if notes is not None:
            notes.append(line)
        print(f"aqdetr: {line}; the results are not affected", file=sys.stderr, flush=True)


def detection_picture(
    dataset: DetectionDataset, detections: Mapping[str, Results], count: int
) -> Image.Image | None:
    """The first images with objects: ground truth, then each model's detections; None without any.

    Args:
      dataset: evaluation set.
      detections: model name -> COCO results of the whole set, in column order.
      count: images, one a row.
    """
    annotated = {a["image_id"] for a in dataset.coco_ground_truth()["annotations"]}
    with_objects = (i for i in range(len(dataset)) if dataset.image_id(i) in annotated)
    examples = dict(itertools.islice(_readable(dataset, with_objects), count))
    chosen = list(examples)
    by_image = {
        name: _group(results, {dataset.image_id(i) for i in chosen})
        for name, results in detections.items()
    }
    label_of = {category: label for label, category in enumerate(dataset.category_ids)}
    rows = []
    for index in chosen:
        example = examples[index]
        panels: list[Panel] = [("ground truth", example.boxes, example.labels, None)]
        for name in detections:
            found = by_image[name].get(dataset.image_id(index), [])
            box = np.array([d["bbox"] for d in found], np.float32).reshape(-1, 4)
            box[:, 2:] += box[:, :2]
            labels = np.array([label_of[d["category_id"]] for d in found], np.int32)
            panels.append((name, box, labels, np.array([d["score"] for d in found])))
        rows.append((example.image, panels))
    if not rows:
        return None
    return detection_grid(rows, dataset.class_names, min_score=0.4)


def _readable(dataset: DetectionDataset, indices: Iterable[int]) -> Iterator[tuple[int, Example]]:
    """The images that can be read; a report is no place to stop at one that cannot."""
    for index in indices:
        with contextlib.suppress(ImageReadError):
            yield index, dataset[index]


def _group(results: Results, wanted: set) -> dict[Any, list]:
    groups: dict[Any, list] = {}
    for row in results:
        if row["image_id"] in wanted:
            groups.setdefault(row["image_id"], []).append(row)
    return groups


def attention_pictures(
    dataset: DetectionDataset,
    teacher: ModelBundle,
    student: ModelBundle,
    count: int,
    names: tuple[str, str] = ("teacher", "student"),
) -> list[dict[str, Any]]:
    """Where two models look on the first images with objects.

    The last encoder layer's self-attention; of deformable models the dense map of positions of the
    finest level, and the sampling points of the best detections in the last decoder layer.

    Args:
      dataset: evaluation set.
      teacher: left model.
      student: right model, with an encoder of the same shape.
      count: images.
      names: column titles.
    """
    config = PipelineConfig(
        batch_size=1, on_error="skip", num_threads=0, prefetch=0, **student.input.pipeline()
    )
    pictures: list[dict[str, Any]] = []

    def run(bundle):
        module = bundle.module()

        def last_maps(variables, images, mask):
            output = module.apply(variables, images, mask)
            return output._replace(
                encoder_attention=output.encoder_attention[-1:],
                decoder_cross_attention=output.decoder_cross_attention[-1:],
                decoder_self_attention=(),
            )

        return jax.jit(last_maps)

    functions = run(teacher), run(student)
    deformable = student.config.family == "deformable"
    for batch in EvalBatches(dataset, config):
        if not batch["valid"][0].any():
            continue
        outputs = [
            jax.device_get(f(b.variables, batch["images"], batch["mask"]))
            for f, b in zip(functions, (teacher, student), strict=True)
        ]
        height, width = (int(x) for x in batch["size"][0])
        bucket = batch["mask"].shape[1:]
        image = batch["images"][0, :height, :width]
        real = (height / bucket[0], width / bucket[1])
        name = dataset.file_name(int(batch["image_index"][0]))
        if deformable:
            picture = _deformable_picture(image, outputs, real, names)
        else:
            maps = [output.encoder_attention[0].probabilities[0] for output in outputs]
            grid = _grid(bucket, student.config.backbone.output_stride, maps[0].shape[-1])
            picture = attention_grid(image, *maps, grid_size=grid, real=real, titles=names)
        pictures.append({"image": picture, "title": f"encoder self-attention, {name}"})
        if deformable:
            picture = _sampling_picture(image, outputs, real, student.class_names, names)
            pictures.append({"image": picture, "title": f"decoder sampling points, {name}"})
        if len(pictures) >= count:
            break
    return pictures


def _deformable_picture(
    image: np.ndarray, outputs: Sequence[Any], real: tuple[float, float], names: tuple[str, str]
) -> Image.Image:
    """Where focused positions of the finest level look, on that level's grid."""
    teacher, student = (output.encoder_attention[0] for output in outputs)
    columns, rows = (int(x) for x in teacher.sizes[0])
    weights = teacher.probabilities[0, :, : rows * columns]
    chosen = focused_cells(weights, (rows, columns), real_cells((rows, columns), real))
    index = [row * columns + column for row, column in chosen]
    first, second = (
        splat(m.locations[0, index], m.probabilities[0][:, index], (rows, columns))
        for m in (teacher, student)
    )
    return attention_rows(
        image, first, second, chosen, grid_size=(rows, columns), real=real, titles=names
    )


def _sampling_picture(
    image: np.ndarray,
    outputs: Sequence[Any],
    real: tuple[float, float],
    class_names: Sequence[str],
    names: Sequence[str],
    count: int = 3,
) -> Image.Image:
    """Sampling points of the student's best object queries, the other model's beside them."""
    scores = 1 / (1 + np.exp(-outputs[-1].logits[-1, 0]))
    best = np.argsort(-scores.max(-1), kind="stable")[:count]
    scale = np.array([1 / real[1], 1 / real[0]])  # units of the padded image -> of the real one
    rows = []
    for query in best:
        row = []
        for output in outputs:
            same = _same_query(query, output, outputs[-1])
            maps = output.decoder_cross_attention[0]
            heads, levels, points = maps.locations.shape[2:5]
            weights = maps.probabilities[0, :, same].reshape(heads, levels, points)
            box = output.boxes[-1, 0, same]
            row.append(Samples(maps.locations[0, same] * scale, weights, box))
        rows.append(row)
    labels = [
        f"{class_text(class_names, int(scores[q].argmax()))} {scores[q].max():.2f}" for q in best
    ]
    return sampling_grid(image, rows, titles=names, labels=labels)


def _same_query(query: int, output: Any, student: Any) -> int:
    """The query of another model that stands beside the student's ``query``.

    Learned queries have the same number in both. With two stages a query is a proposal of its own
    model: there it is the one whose box is nearest to the student's.
    """
    if output is student or output.proposal_boxes is None:
        return query
    own = cxcywh_to_xyxy(student.boxes[-1, 0, query][None])
    return int(np.argmax(pairwise_giou(own, cxcywh_to_xyxy(output.boxes[-1, 0]))))


def _grid(bucket: tuple[int, int], stride: int, cells: int) -> tuple[int, int]:
    """(rows, columns) of the encoder's cells."""
    for rows in (-(-bucket[0] // stride), bucket[0] // stride):
        if rows and cells % rows == 0:
            return rows, cells // rows
    raise ValueError(f"{cells} encoder cells do not fit a {bucket} bucket with stride {stride}")


def write_run_report(
    workdir: str | Path,
    *,
    title: str,
    summary: Sequence[str],
    blocks: Mapping[str, Mapping[str, Any]],
    curves: Mapping[str, Path],
    detections: Mapping[str, Results],
    dataset: DetectionDataset,
    pictures: int,
    teacher: ModelBundle | None = None,
    student: ModelBundle | None = None,
    bits: Path | None = None,
    manifest: Path | None = None,
    packed: Path | None = None,
    notes: Sequence[str] = (),
) -> Path | None:
    """Writes ``report.html`` and its pictures (``pictures/*.png``) into a work directory.

    A part that cannot be made is left out, and said in the report and on stderr.

    Args:
      workdir: folder of the run.
      title: heading.
      summary: paragraphs.
      blocks: model name -> results block.
      curves: run name -> its ``metrics.jsonl``.
      detections: model name -> COCO results.
      dataset: evaluation set the detections belong to.
      pictures: images drawn; 0 = none.
      teacher: for the attention pictures.
      student: for the attention pictures.
      bits: ``bit_report.json`` of the student.
      manifest: ``manifest.json`` of the run.
      packed: the student as a packed model, whose size is shown.
      notes: remarks and limits.

    Returns:
      Path of the report; None if it could not be written.
    """
    workdir = as_path(workdir)
    folder = workdir / "pictures"
    remarks = list(notes)
    context: dict[str, Any] = {"title": title, "summary": list(summary), "results": dict(blocks)}
    with spare("the picture of the training curves", remarks):
        metrics = {name: read_metrics(path) for name, path in curves.items() if path.is_file()}
        figure = training_curves(metrics) if metrics else None
        if figure is not None:
            save_figure(figure, folder / "curves.png")
            context["metrics"] = metrics
    if pictures and detections:
        with spare("the picture of detections", remarks):
            picture = detection_picture(dataset, detections, pictures)
            if picture is not None:
                context["detections"] = [picture]
                save_png(picture, folder / "detections.png")
    if pictures and teacher is not None and student is not None:
        with spare("the pictures of attention", remarks):
            context["attention"] = attention_pictures(dataset, teacher, student, min(3, pictures))
            for number, item in enumerate(context["attention"]):
                save_png(item["image"], folder / f"attention_{number}.png")
    if bits is not None and bits.is_file():
        with spare("the table of bits", remarks):
            context["bit_report"] = read_json(bits)
            if packed is not None:
                context["bit_report"]["packed_bytes"] = folder_bytes(packed)
                context["bit_report"]["measured"] = True
    if manifest is not None and manifest.is_file():
        with spare("the list of what was run", remarks):
            context["run"] = _run_facts(read_json(manifest), blocks)
    if context.get("detections") or context.get("attention"):
        with spare("the note on names", remarks):
            remarks += filter(None, [note_of_numbers(dataset.class_names)])
    if remarks:
        context["notes"] = remarks
    with spare("the report"):
        return write_report(workdir, context)
    return None


def report_training(result: RunResult, workdir: str | Path) -> None:
    """The report of one training run, with its teacher's attention beside its own.

    Args:
      result: what ``loop.train`` returned.
      workdir: its work directory.
    """
    if result.block is None or result.detections is None:
        return
    workdir, config = as_path(workdir), result.config
    kind = "student" if config.quant.quantized else "teacher"
    with spare("the report"):
        teacher = setup.load_teacher(config)
        report = write_run_report(
            workdir,
            title=config.name,
            summary=[f"{config.train.steps} steps of {config.train.batch_size} images."],
            blocks={kind: result.block},
            curves={config.name: workdir / "metrics.jsonl"},
            detections={config.name: result.detections.results},
            dataset=open_dataset(config.data, train=False),
            pictures=config.train.pictures,
            teacher=teacher,
            student=result.bundle if teacher else None,
            bits=workdir / "bit_report.json",
            manifest=workdir / "manifest.json",
        )
        if report is not None:
            print(f"report: {report}")


def report_sensitivity(result: Mapping[str, Any], out: str | Path) -> None:
    """``sensitivity.png`` and ``report.html`` of a sensitivity study, and where all is.

    Args:
      result: content of ``sensitivity.json``.
      out: its folder.
    """
    out = as_path(out)
    with spare("the picture of the study"):
        save_figure(sensitivity_figure(result), out / "sensitivity.png")
    headings, cells = ranking.table(result)
    context = {
        "title": f"Sensitivity of {result['measured']['config']}",
        "summary": ranking.summary(result),
        "sensitivity": {"result": result, "headings": headings, "cells": cells},
        "run": {"commit": result["commit"], "images": result["measured"]["images"]},
    }
    with spare("the report"):
        print(f"report: {write_report(out, context)}")
    print(f"to train with the chosen bits: aqdetr train --config={out / POLICY} --workdir=DIR")


def _run_facts(manifest: Mapping[str, Any], blocks: Mapping[str, Any]) -> dict[str, Any]:
    start = manifest["starts"][-1]
    facts = {
        "command": " ".join(start["command"]),
        "commit": start["commit"],
        "seed": manifest["seed"],
        "device": f"{start['devices']} x {start['device']}",
        "started": start["time"],
        "starts": len(manifest["starts"]),
    }
    if blocks:
        facts["seconds"] = float(list(blocks.values())[-1]["seconds"])
    facts["versions"] = start["versions"]
    return facts
