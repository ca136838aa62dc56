"""COCO 2017 and Pascal VOC 2007 + 2012 as their authors publish them, archives or unpacked.

Nothing is downloaded: the archives have licences to read, and 20 GB. They, or the folders that
they unpack to, lie in one folder that the user names; what is missing there is said with where it
is to be had. Archives are unpacked beside themselves, file by file, each written whole and checked
(a zip's by its CRC-32): a killed run goes on where it was. Once an archive is unpacked, a mark says
so, and what its user corrects in the files stays. What is there counts only with the number of
images that its authors state.
"""

from __future__ import annotations

import dataclasses
import functools
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from aqdetr_jax.data.coco import CocoFolder
from aqdetr_jax.data.dataset import DatasetError, DetectionDataset
from aqdetr_jax.data.files import check_relative
from aqdetr_jax.data.joined import JoinedDataset
from aqdetr_jax.data.voc import VocFolder
from aqdetr_jax.io import write_bytes_atomic, write_text_atomic
from aqdetr_jax.parallel.hosts import say
from aqdetr_jax.paths import as_path, is_local, local_file

_MOST_BYTES = 2 * 1024**3  # of one file in an archive; COCO's largest has 0.5
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published file.

    Attributes:
      name: of the file.
      holds: what is there once it is unpacked, one path at least, relative to the folder.
    """

    name: str
    holds: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class OfficialSet:
    """A published data set.

    Attributes:
      title: in words.
      home: where its archives are to be had.
      archives: all of them.
      splits: split -> number of images, as published.
      open: folder -> the splits.
    """

    title: str
    home: str
    archives: tuple[Archive, ...]
    splits: dict[str, int]
    open: Callable[[Path], dict[str, DetectionDataset]]


def _coco(root: Path) -> dict[str, DetectionDataset]:
    return {split: CocoFolder(root=root, split=split) for split in ("train2017", "val2017")}


def _voc(root: Path) -> dict[str, DetectionDataset]:
    def part(year: str, split: str) -> VocFolder:
        return VocFolder(root / "VOCdevkit" / year, split, VOC_CLASSES)

    return {
        "trainval": JoinedDataset(
            "voc/trainval",
            {
                "VOC2007/JPEGImages": part("VOC2007", "trainval"),
                "VOC2012/JPEGImages": part("VOC2012", "trainval"),
            },
        ),
        "test": part("VOC2007", "test"),
    }


_LISTS = "VOCdevkit/{}/ImageSets/Main/{}.txt"
SETS = {
    "coco2017": OfficialSet(
        "COCO 2017",
        "https://cocodataset.org/#download",
        (
            Archive("train2017.zip", ("train2017",)),
            Archive("val2017.zip", ("val2017",)),
            Archive(
                "annotations_trainval2017.zip",
                (
                    "annotations/instances_train2017.json",
                    "annotations/instances_val2017.json",
                ),
            ),
        ),
        {"train2017": 118_287, "val2017": 5_000},
        _coco,
    ),
    "voc0712": OfficialSet(
        "Pascal VOC 2007 + 2012",
        "http://host.robots.ox.ac.uk/pascal/VOC/",
        (
            Archive("VOCtrainval_06-Nov-2007.tar", (_LISTS.format("VOC2007", "trainval"),)),
            Archive("VOCtest_06-Nov-2007.tar", (_LISTS.format("VOC2007", "test"),)),
            Archive("VOCtrainval_11-May-2012.tar", (_LISTS.format("VOC2012", "trainval"),)),
        ),
        {"trainval": 5_011 + 11_540, "test": 4_952},
        _voc,
    ),
}


def open_official(
    name: str, manual: str | Path | None, *, partial: bool = False
) -> dict[str, DetectionDataset]:
    """The splits of a published set, its archives unpacked where that is yet to be done.

    Args:
      name: one of SETS.
      manual: folder with the archives, or with what they unpack to.
      partial: accept other numbers of images than are published.

    Raises:
      FileNotFoundError: something is missing; the message says what goes where.
      DatasetError: an archive is damaged, or the numbers of images are not the published ones.
      ValueError: no folder is given.
    """
    if not manual:
        names = ", ".join(archive.name for archive in SETS[name].archives)
        raise ValueError(
            f"--set={name} needs --manual=DIR: the folder with {names} (from {SETS[name].home}) or "
            "with what they unpack to"
        )
    published, root = SETS[name], as_path(manual)
    missing = []
    for archive in published.archives:
        file = root / archive.name
        if file.is_file():
            unpack(file, root)
        elif not all((root / path).exists() for path in archive.holds):
            missing.append(archive)
    if missing:
        listed = "; ".join(f"{a.name} (or, unpacked, {', '.join(a.holds)})" for a in missing)
        raise FileNotFoundError(
            f"{published.title} is not whole in {root}: put there {listed}. From {published.home}"
        )
    splits = published.open(root)
    for split, expected in published.splits.items():
        if len(splits[split]) != expected and not partial:
            raise DatasetError(
                f"{published.title} in {root}: split {split!r} has {len(splits[split])} images, "
                f"published are {expected}: fetch its archives again, or accept it with --partial"
            )
    return splits


def unpack(archive: Path, root: Path) -> None:
    """Unpacks an archive into a folder.

    Files that are there with their size stay as they are. Others were being written when a run was
    killed, unless the whole archive was unpacked before: then someone has changed them since.

    Raises:
      DatasetError: it is cut off or damaged, or names a file outside the folder.
    """
    mark, size_now = root / f".{archive.name}.unpacked", str(archive.stat().st_size)
    was_whole = mark.is_file() and mark.read_text() == size_now
    done = total = 0
    changed = []
    try:
        with local_file(archive) as here, here.open("rb") as stream:
            members = _zip(stream) if archive.suffix == ".zip" else _tar(stream)
            for name, size, read in members:
                target = root / check_relative(name, str(archive))
                total += 1
                if target.is_file():
                    if target.stat().st_size == size:
                        continue
                    if was_whole:
                        changed.append(target)
                        continue
                if not done:
                    say(f"unpacking {archive}")
                if size > _MOST_BYTES:
                    raise DatasetError(f"{archive}: {name!r} has {size} bytes")
                write_bytes_atomic(target, read())
                done += 1
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DatasetError(
            f"{archive}: is cut off or damaged ({error}): fetch it again; what was unpacked so far "
            "is kept"
        ) from error
    if changed:
        say(
            f"{archive}: {len(changed)} files were changed since it was unpacked, and stay so "
            f"(first: {changed[0]}; remove one to have it unpacked again)"
        )
    if not was_whole:
        write_text_atomic(mark, size_now)
    if done:
        where = "" if is_local(root) else " (in the store)"
        say(f"{archive}: {done} of {total} files unpacked{where}")


_Member = tuple[str, int, Callable[[], bytes]]


def _zip(stream: IO[bytes]) -> Iterator[_Member]:
    with zipfile.ZipFile(stream) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                yield info.filename, info.file_size, functools.partial(archive.read, info)


def _tar(stream: IO[bytes]) -> Iterator[_Member]:
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        for info in archive:
            if info.isreg():

                def read(info: tarfile.TarInfo = info) -> bytes:
                    file = archive.extractfile(info)
                    assert file is not None  # of a regular file
                    data = file.read()
                    if len(data) != info.size:
                        raise EOFError(f"{info.name!r} ends early")
                    return data

                yield info.name, info.size, read
