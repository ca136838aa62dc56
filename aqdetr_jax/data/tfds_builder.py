"""TensorFlow Datasets without TensorFlow: our own builder and its reader, on ArrayRecord files.

TFDS needs TensorFlow only to encode arrays, to decode in ``tf.data`` and in most of its stock
builders. This builder hands encoded image files through as bytes and is read back with
``as_data_source``, so TensorFlow is never imported.

A prepared folder holds, for each split, the records (encoded image, id, file name, objects) and,
as TFDS metadata, the COCO ground truth, so that annotations are known without reading images.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from aqdetr_jax.data.coco import CocoParser
from aqdetr_jax.data.dataset import (
    BoxCollector,
    DatasetError,
    DetectionDataset,
    ImageReadError,
    RecordDataset,
)
from aqdetr_jax.data.fetched import local_copy
from aqdetr_jax.data.images import MAX_PIXELS, read_header, read_image
from aqdetr_jax.io import whole_folder
from aqdetr_jax.paths import as_path, is_local, send_folder

_INFO, _FEATURES, _METADATA = "dataset_info.json", "features.json", "metadata.json"
_DESCRIBED = {"ground_truth", "drops", "drop_examples", "clipped"}
_AGAIN = "; copy the whole folder again, or remove it and prepare it again (aqdetr prepare-data)"
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_PASSED_THROUGH = ("JPEG", "PNG")


class AqdetrDetection(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of any :class:`DetectionDataset`; made by :func:`prepare`.

    Features: ``image`` (encoded), ``image_id`` (JSON text: a number or a string), ``file_name``,
    ``objects``: ``bbox`` float32 [4] xyxy pixels, ``label`` int64, ``is_crowd`` bool.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. Left alone, TFDS looks for a checksum file beside this module, with a
    # package (importlib_resources) that it does not declare for every platform.
    url_infos: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        *,
        sources: Mapping[str, DetectionDataset] | None = None,
        progress: Callable[[int, int], None] | None = None,
        **kwargs: Any,
    ) -> None:
        self._sources = dict(sources or {})
        self._progress, self._written = progress, 0
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        objects = {
            "bbox": tfds.features.Tensor(shape=(4,), dtype=np.float32),
            "label": tfds.features.Scalar(dtype=np.int64),
            "is_crowd": tfds.features.Scalar(dtype=np.bool_),
        }
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "image_id": tfds.features.Text(),
            "file_name": tfds.features.Text(),
            "objects": tfds.features.Sequence(objects),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Object detection: images with labelled boxes.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # Keeps the order of the source dataset.
            metadata=tfds.core.MetadataDict(
                {split: _describe(source) for split, source in self._sources.items()}
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
        del dl_manager  # Nothing is downloaded.
        return {split: self._generate_examples(src) for split, src in self._sources.items()}

    def _generate_examples(self, source: DetectionDataset) -> Iterator[tuple[int, Any]]:
        for index in range(len(source)):
            example = source[index]
            objects = [
                {"bbox": box, "label": int(label), "is_crowd": bool(crowd)}
                for box, label, crowd in zip(
                    example.boxes, example.labels, example.iscrowd, strict=True
                )
            ]
            yield (
                index,
                {
                    "image": io.BytesIO(_encoded(source, index, example.image)),
                    "image_id": json.dumps(example.image_id),
                    "file_name": example.file_name,
                    "objects": objects,
                },
            )
            self._written += 1
            if self._progress is not None:
                self._progress(self._written, sum(map(len, self._sources.values())))


def _describe(source: DetectionDataset) -> dict[str, Any]:
    return {
        "ground_truth": source.coco_ground_truth(),
        "drops": source.drops,
        "drop_examples": list(source.drop_examples),
        "clipped": source.clipped,
        "source": {"name": source.name, "fingerprint": source.fingerprint},
    }


def _encoded(source: DetectionDataset, index: int, image: np.ndarray) -> bytes:
    """The image file's own bytes where any TFDS reader decodes them to ``image``; else a PNG."""
    find_path = getattr(source, "image_path", None)
    if find_path is not None:
        path = find_path(index)
        header = read_header(path)
        plain = header.format in _PASSED_THROUGH and header.mode == "RGB"
        if plain and (header.height, header.width) == image.shape[:2]:
            return path.read_bytes()
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def prepare(
    datasets: DetectionDataset | Mapping[str, DetectionDataset],
    data_dir: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> pathlib.Path:
    """Writes datasets as a TFDS folder of ArrayRecord files.

    They are written beside it and renamed, so that a run that fails leaves nothing behind, and what
    a killed one leaves is removed by the next.

    Args:
      datasets: split name to dataset; all splits at once. A single dataset becomes the split
        named by the part of its name after the last slash.
      data_dir: TFDS data folder; the result is ``data_dir/aqdetr_detection/1.0.0``.
      progress: called with (images written, images) after each one.

    Returns:
      The path of the prepared folder.

    Raises:
      DatasetError: the folder holds a prepared dataset already, a dataset is empty, or the splits
        disagree on the classes.
    """
    if isinstance(datasets, DetectionDataset):
        datasets = {datasets.name.rsplit("/", 1)[-1]: datasets}
    if not datasets:
        raise DatasetError("no dataset to prepare")
    for split, dataset in datasets.items():
        if not len(dataset):
            raise DatasetError(f"split {split!r} ({dataset.name}) has no images")
    if len({(d.class_names, d.category_ids) for d in datasets.values()}) > 1:
        raise DatasetError(f"the splits {', '.join(datasets)} disagree on classes or category ids")
    target = _folder(data_dir)
    if (target / _INFO).is_file():
        raise DatasetError(f"{target} is prepared already; remove it to prepare it anew")
    tfds.disable_progress_bar()
    # TFDS insists on a download folder, also when nothing is downloaded; its writer of records
    # writes to disks only, and what a killed run leaves there has a new name every time.
    with (
        tempfile.TemporaryDirectory(prefix="aqdetr_tfds_") as temporary,
        whole_folder(target, _INFO) as partial,
    ):
        local = is_local(target)
        builder = AqdetrDetection(
            sources=datasets,
            progress=progress,
            data_dir=os.fspath(partial) if local else temporary,
        )
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # it speaks of downloads, and of ``partial``
            builder.download_and_prepare(download_dir=os.path.join(temporary, "downloads"))
        made = pathlib.Path(os.fspath(builder.data_path))
        if local:
            for file in made.iterdir():
                file.rename(partial / file.name)
            shutil.rmtree(partial / builder.name)
        else:
            send_folder(made, partial)
    return target


def prepared_splits(data_dir: str | os.PathLike[str]) -> list[str]:
    """Names of the splits that :func:`prepare` wrote to a folder.

    Raises:
      FileNotFoundError: nothing is prepared there.
      DatasetError: a file is missing or damaged; the message names it.
    """
    return list(_open(data_dir).info.splits)


class TfdsDataset(RecordDataset):
    """Reads a split of a folder written by :func:`prepare`.

    Args:
      data_dir: the ``data_dir`` given to :func:`prepare`.
      split: name of the split.
      max_pixels: refuse larger images.

    Raises:
      FileNotFoundError: nothing is prepared there.
      DatasetError: unknown split, or a file is missing or damaged, as after a copy that broke off;
        the message names it.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        split: str = "train",
        *,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.max_pixels = max_pixels
        builder = _open(data_dir)
        where = os.fspath(builder.data_path)
        described = (builder.info.metadata or {}).get(split)
        if split not in builder.info.splits or not isinstance(described, Mapping):
            known = ", ".join(sorted(builder.info.splits)) or "none"
            raise DatasetError(
                f"{where}: unknown split {split!r} (there are: {known}; config.data.train_split "
                "and eval_split name them)"
            )
        if missing := sorted(_DESCRIBED - set(described)):
            raise DatasetError(f"{where}/{_METADATA}: {split!r} has no {missing[0]!r}{_AGAIN}")
        parsed = CocoParser(described["ground_truth"], f"{where}/{_METADATA}")
        collector = BoxCollector()
        collector.drops.update(described["drops"])
        collector.examples.extend(described["drop_examples"])
        collector.clipped = int(described["clipped"])
        super().__init__(
            name=f"tfds/{split}",
            class_names=parsed.class_names,
            category_ids=parsed.category_ids,
            records=parsed.records(),
            collector=collector,
        )
        # Images stay encoded here: Pillow decodes them under our own pixel budget.
        self._source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        if len(self._source) != len(self.records):
            raise DatasetError(
                f"{where}: {len(self._source)} records but {len(self.records)} annotated images"
                f"{_AGAIN}"
            )
        shards = builder.info.splits[split]
        self._files = [os.fspath(path) for path in shards.filepaths]
        self._ends = np.cumsum(shards.shard_lengths)
        # A file that was cut off cannot be opened: its index is at its end.
        for end, length in zip(self._ends.tolist(), shards.shard_lengths, strict=True):
            if length:
                try:
                    self._stored(end - length)
                except ImageReadError as error:
                    raise DatasetError(str(error)) from error

    def _stored(self, index: int) -> Mapping[str, Any]:
        """Record ``index`` as stored; the image encoded."""
        try:
            return self._source[index]
        except Exception as error:  # Whatever TFDS and its readers make of a damaged file.
            file = self._files[int(np.searchsorted(self._ends, index, side="right"))]
            reason = str(error).partition("\n")[0]
            raise ImageReadError(
                f"{file}: missing or damaged, record {index} cannot be read ({reason}){_AGAIN}"
            ) from error

    def _load_image(self, index: int) -> np.ndarray:
        stored, record = self._stored(index), self.records[index]
        image_id = json.loads(_text(stored["image_id"]))
        if image_id != record.image_id:
            raise ImageReadError(
                f"{self.name}: record {index} is image {image_id!r}, expected {record.image_id!r}"
                f"{_AGAIN}"
            )
        return read_image(
            bytes(stored["image"]),
            expected_size=(record.height, record.width),
            max_pixels=self.max_pixels,
            name=record.file_name,
        )


def _open(data_dir: str | os.PathLike[str]) -> AqdetrDetection:
    """The builder of a prepared folder, what it is made from checked."""
    given = _folder(data_dir)
    if not given.is_dir():
        others = given.parent.iterdir() if given.parent.is_dir() else ()
        found = sorted(path.name for path in others if _VERSION.fullmatch(path.name))
        if found:
            raise DatasetError(
                f"{given.parent} was prepared as version {', '.join(found)} and this program reads "
                f"{given.name}: prepare it again (aqdetr prepare-data --out=DIR)"
            )
        raise FileNotFoundError(
            f"no prepared dataset in {given}: write one with aqdetr prepare-data --out={data_dir}"
        )
    if not (given / _INFO).is_file():
        raise DatasetError(f"{given / _INFO}: missing or cut off{_AGAIN}")
    # TFDS takes the folders of name and version from the path.
    folder = local_copy(given, levels=2)
    data_dir = folder.parent.parent
    # Before TFDS, which knows no file's name in its errors, or makes up what is missing.
    for name in (_INFO, _FEATURES, _METADATA):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DatasetError(f"{folder / name}: missing or cut off ({error}){_AGAIN}") from error
        if not isinstance(content, dict):
            raise DatasetError(f"{folder / name}: is no JSON object{_AGAIN}")
    try:
        return AqdetrDetection(data_dir=os.fspath(data_dir))
    except Exception as error:  # Protocol buffers have errors of their own.
        reason = str(error).partition("\n")[0]
        raise DatasetError(f"{folder / _INFO}: damaged ({reason}){_AGAIN}") from error


def _folder(data_dir: str | os.PathLike[str]) -> pathlib.Path:
    """Where a prepared set lies."""
    return as_path(data_dir) / AqdetrDetection.name / str(AqdetrDetection.VERSION)


def _text(value: str | bytes) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
