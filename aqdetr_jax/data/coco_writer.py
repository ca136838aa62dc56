"""Any data set written as a COCO folder."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import tempfile

from PIL import Image

from aqdetr_jax.data.dataset import DatasetError, DetectionDataset


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
    out = pathlib.Path(out_dir)
    split = dataset.name.rsplit("/", 1)[-1]
    images_dir, annotation_file = out / split, out / "annotations" / f"instances_{split}.json"
    for existing in (images_dir, annotation_file):
        if existing.exists():
            raise DatasetError(f"{existing} exists already; remove it or choose another folder")
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    truth = dataset.coco_ground_truth()
    temporary = pathlib.Path(tempfile.mkdtemp(dir=out, prefix=f".{split}-"))
    try:
        written: set[str] = set()
        for i, entry in enumerate(truth["images"]):
            name = pathlib.PurePosixPath(entry["file_name"]).stem + ".png"
            if name in written:
                raise DatasetError(f"{dataset.name}: two images would be written as {name}")
            written.add(name)
            entry["file_name"] = name
            Image.fromarray(dataset[i].image).save(temporary / name, compress_level=1)
        truth["info"] = {"description": dataset.name, "fingerprint": dataset.fingerprint}
        draft = temporary / "annotations.json"
        draft.write_text(json.dumps(truth))
        os.chmod(temporary, 0o755)  # mkdtemp makes it private.
        # The annotation file goes last: a split is there when its annotations are.
        staged = annotation_file.with_suffix(".partial")
        os.replace(draft, staged)
        os.replace(temporary, images_dir)
        os.replace(staged, annotation_file)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return annotation_file
