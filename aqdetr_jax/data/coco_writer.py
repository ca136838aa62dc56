"""Any data set written as a COCO folder."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable

from PIL import Image

from aqdetr_jax.data.dataset import DatasetError, DetectionDataset
from aqdetr_jax.io import no_new_folders, remove_folder, whole_folder, write_text_atomic
from aqdetr_jax.paths import as_path


def write_coco_folders(
    datasets: Iterable[DetectionDataset],
    out_dir: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[pathlib.Path]:
    """Writes several splits, or none: see :func:`write_coco_folder`.

    Args:
      datasets: any.
      out_dir: for all of them.
      progress: called with (images written, images) after each one.

    Returns:
      The paths of the annotation files.

    Raises:
      DatasetError: a split is already there, or cannot be written; then none is left.
    """
    datasets = list(datasets)
    places = [_places(dataset, out_dir) for dataset in datasets]  # before the work on the first
    total, count = sum(map(len, datasets)), 0

    def one_more() -> None:
        nonlocal count
        count += 1
        if progress is not None:
            progress(count, total)

    with contextlib.ExitStack() as undo:
        for dataset, (images_dir, annotation_file) in zip(datasets, places, strict=True):
            undo.enter_context(no_new_folders(annotation_file))
            write_coco_folder(dataset, out_dir, one_more)
            undo.callback(remove_folder, images_dir)
            undo.callback(annotation_file.unlink)
        undo.pop_all()
    return [annotation_file for _, annotation_file in places]


def _split(dataset: DetectionDataset) -> str:
    return dataset.name.rsplit("/", 1)[-1]


def _places(
    dataset: DetectionDataset, out_dir: str | os.PathLike[str]
) -> tuple[pathlib.Path, pathlib.Path]:
    """The image folder and the annotation file to be, neither of which is there."""
    out, split = as_path(out_dir), _split(dataset)
    places = out / split, out / "annotations" / f"instances_{split}.json"
    for existing in places:
        if existing.exists():
            raise DatasetError(f"{existing} exists already; remove it or choose another folder")
    return places


def write_coco_folder(
    dataset: DetectionDataset,
    out_dir: str | os.PathLike[str],
    written: Callable[[], None] = lambda: None,
) -> pathlib.Path:
    """Writes a dataset as a COCO folder: ``images/*.png`` and ``annotations/instances_*.json``.

    The split is the part of ``dataset.name`` after the last slash. Each split is written to a
    temporary folder first and moved into place, so an interrupted run leaves no half split.

    Args:
      dataset: any dataset; images are written as PNG under their file name's stem.
      out_dir: ``out_dir/{split}/`` receives the images, ``out_dir/annotations/`` the JSON file.
      written: called after each image.

    Returns:
      The path of the annotation file.

    Raises:
      DatasetError: the split is already there, or two images share a stem.
    """
    images_dir, annotation_file = _places(dataset, out_dir)
    truth = dataset.coco_ground_truth()
    names = [pathlib.PurePosixPath(entry["file_name"]).stem + ".png" for entry in truth["images"]]
    if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise DatasetError(f"{dataset.name}: two images would be written as {twice[0]}")
    # The annotation file goes last: a split is there when its annotations are.
    with whole_folder(images_dir, names[0] if names else "") as partial:
        for i, (name, entry) in enumerate(zip(names, truth["images"], strict=True)):
            entry["file_name"] = name
            stream = io.BytesIO()
            Image.fromarray(dataset[i].image).save(stream, "PNG", compress_level=1)
            (partial / name).write_bytes(stream.getvalue())
            written()
        truth["info"] = {"description": dataset.name, "fingerprint": dataset.fingerprint}
    return write_text_atomic(annotation_file, json.dumps(truth))
