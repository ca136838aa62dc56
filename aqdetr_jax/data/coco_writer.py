"""Any data set written as a COCO folder."""

from __future__ import annotations

import collections
import io
import json
import os
import pathlib

from PIL import Image

from aqdetr_jax.data.dataset import DatasetError, DetectionDataset
from aqdetr_jax.io import whole_folder, write_text_atomic
from aqdetr_jax.paths import as_path


def write_coco_folder(dataset: DetectionDataset, out_dir: str | os.PathLike[str]) -> pathlib.Path:
    """Writes a dataset as a COCO folder: ``images/*.png`` and ``annotations/instances_*.json``.

    The split is the part of ``dataset.name`` after the last slash. Each split is written to a
    temporary folder first and moved into place, so an interrupted run leaves no half split.

    Args:
      dataset: any dataset; images are written as PNG under their file name's stem.
      out_dir: ``out_dir/{split}/`` receives the images, ``out_dir/annotations/`` the JSON file.

    Returns:
      The path of the annotation file.

    Raises:
      DatasetError: the split is already there, or two images share a stem.
    """
    out = as_path(out_dir)
    split = dataset.name.rsplit("/", 1)[-1]
    images_dir, annotation_file = out / split, out / "annotations" / f"instances_{split}.json"
    for existing in (images_dir, annotation_file):
        if existing.exists():
            raise DatasetError(f"{existing} exists already; remove it or choose another folder")
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
        truth["info"] = {"description": dataset.name, "fingerprint": dataset.fingerprint}
    return write_text_atomic(annotation_file, json.dumps(truth))
