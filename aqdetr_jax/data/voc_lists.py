"""Which files a list in ``ImageSets/Main`` names, told by the files that exist."""

from __future__ import annotations

import codecs
import dataclasses
import os
import pathlib
import re
import reprlib
from collections.abc import Callable

from aqdetr_jax.data.dataset import DatasetError
from aqdetr_jax.data.files import IMAGE_SUFFIXES, check_relative
from aqdetr_jax.paths import is_file

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # Before UTF-16, whose mark it begins with.
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclasses.dataclass(frozen=True, order=True)
class Entry:
    """One line of a list.

    Attributes:
      stem: path of the annotation file in ``Annotations``, without ``.xml``.
      image: path of the image in ``JPEGImages`` where the list itself names it; else "".
    """

    stem: str
    image: str = ""


class ImageFolder:
    """The image files of a folder by stem; each sub-folder is listed once.

    Args:
      path: the folder.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._listed: dict[str, dict[str, list[str]]] = {}

    def with_stem(self, stem: str) -> list[str]:
        """The images ``stem`` + suffix, sorted; case counts in the stem, not in the suffix."""
        if not _is_safe(stem):
            return []
        folder, _, name = stem.rpartition("/")
        if folder not in self._listed:
            self._listed[folder] = self._list(folder)
        prefix = f"{folder}/" if folder else ""
        return [prefix + found for found in self._listed[folder].get(name, [])]

    def _list(self, folder: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        try:
            names = sorted(path.name for path in (self.path / folder).iterdir())
        except (OSError, ValueError):  # No such folder; a name that no file can have.
            return found
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES and self.has(os.path.join(folder, name)):
                found.setdefault(stem, []).append(name)
        return found

    def has(self, name: str) -> bool:
        """Whether ``name`` is a file in it."""
        return _is_file(self.path, name)


def read_list(root: pathlib.Path, split: str, images: ImageFolder) -> list[Entry]:
    """Reads a split list.

    A line is a name, spaces included; or a name and a column ``1``, ``0`` or ``-1``, as in VOC's
    own lists of a class; or the path of an image, alone or with the path of its annotation file,
    as in lists for Caffe. Which of these a list holds is told by the files that exist: all of its
    lines must name files when read so.

    Args:
      root: the folder with ``Annotations`` and ``ImageSets/Main``.
      split: name of the list, without ``.txt``.
      images: ``JPEGImages`` of the same root.

    Returns:
      One entry a line, in the order of the list.

    Raises:
      FileNotFoundError: no such list, or a line names no file.
      DatasetError: the list is no text, can be read in two ways, names a file twice or one
        outside the folders.
    """
    lists = root / "ImageSets" / "Main"
    path = lists / f"{check_relative(split, 'split')}.txt"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in lists.glob("*.txt"))) or "none"
        raise FileNotFoundError(
            f"split list {path} does not exist (there are: {known}; config.data.train_split and "
            "eval_split name them)"
        ) from None
    except (OSError, ValueError) as error:
        raise DatasetError(f"split list {path}: cannot be read ({error})") from error
    text, encoding = _decode(data, path)
    # Not splitlines(): it splits at characters that names may hold.
    lines = [(n, t) for n, t in enumerate(re.split(r"\r\n|\n|\r", text), 1) if t.strip()]
    files = _Files(root, images)
    readings = {name: [read(files, t) for _, t in lines] for name, read in _READINGS.items()}
    complete = [entries for entries in readings.values() if all(entries)]
    if not complete:
        # The first line that does not fit, read as most lines can be.
        best = max(readings.values(), key=lambda found: sum(map(bool, found)))
        raise _no_file(files, path, *lines[[bool(f) for f in best].index(False)], encoding)
    entries = []
    for (number, line), *found in zip(lines, *complete, strict=True):
        both = sorted(set().union(*found))
        if len(both) > 1:
            raise DatasetError(
                f"{path}: line {number}, {reprlib.repr(line)}, names {_shown(both[0])} or "
                f"{_shown(both[1])}, and both exist: rename or remove one"
            )
        entries.append(both[0])
    first: dict[str, int] = {}
    for (number, _), entry in zip(lines, entries, strict=True):
        if entry.stem in first:
            raise DatasetError(
                f"{path}: {entry.stem!r} is listed twice, in lines {first[entry.stem]} and {number}"
            )
        first[entry.stem] = number
    return entries


def _decode(data: bytes, path: pathlib.Path) -> tuple[str, str]:
    """The text of a list and its encoding; the files that exist tell a wrong guess."""
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise DatasetError(
                f"{path}: begins as {encoding} text but is none; save it as UTF-8"
            ) from error
        text, encoding = data.decode("latin-1"), "latin-1"
    if "\0" in text:
        raise DatasetError(f"{path}: has NUL characters and is no text; save it as UTF-8")
    return text, encoding


@dataclasses.dataclass(frozen=True)
class _Files:
    root: pathlib.Path
    images: ImageFolder

    def named(self, stem: str) -> set[Entry]:
        """The entry of a name, where an annotation file or an image has it."""
        known = _is_file(self.root / "Annotations", f"{stem}.xml") or self.images.with_stem(stem)
        return {Entry(_plain(stem))} if known else set()

    def pictured(self, image: str) -> set[Entry]:
        """The entry of an image, alone or as ``.../JPEGImages/name``."""
        name = self._inside("JPEGImages", image)
        stem, suffix = os.path.splitext(name)
        fits = suffix.lower() in IMAGE_SUFFIXES and self.images.has(name)
        return {Entry(_plain(stem), _plain(name))} if fits else set()

    def paired(self, image: str, annotation: str) -> set[Entry]:
        """The entry of an image and the annotation file listed beside it."""
        name = self._inside("Annotations", annotation)
        stem, suffix = os.path.splitext(name)
        if suffix != ".xml" or not _is_file(self.root / "Annotations", name):
            return set()
        return {Entry(_plain(stem), entry.image) for entry in self.pictured(image)}

    def _inside(self, folder: str, path: str) -> str:
        """``path`` relative to a folder of the set, where it leads through it."""
        parts = pathlib.PurePosixPath(path).parts
        if folder in parts:
            at = parts.index(folder)
            roots = (self.root.absolute().parts, self.root.resolve().parts)
            if at == 0 or any(root[-at:] == parts[:at] for root in roots):
                return "/".join(parts[at + 1 :])
        return path


def _whole(files: _Files, line: str) -> set[Entry]:
    return set().union(*(files.named(text) for text in {line, line.strip()}))


def _column(files: _Files, line: str) -> set[Entry]:
    found = re.fullmatch(r"\s*(.*\S)\s+(?:-1|0|\+?1)\s*", line)
    return files.named(found[1]) if found else set()


def _image(files: _Files, line: str) -> set[Entry]:
    return files.pictured(line.strip())


def _pair(files: _Files, line: str) -> set[Entry]:
    text = line.strip()
    return set().union(
        *(files.paired(text[: m.start()], text[m.end() :]) for m in re.finditer(r"\s+", text))
    )


_READINGS: dict[str, Callable[[_Files, str], set[Entry]]] = {
    "name": _whole,
    "name and column": _column,
    "image": _image,
    "image and annotation": _pair,
}


def _no_file(
    files: _Files, path: pathlib.Path, number: int, line: str, encoding: str
) -> FileNotFoundError | DatasetError:
    text = line.strip()
    check_relative(text, f"{path}: line {number}")
    guess = ""
    if encoding == "latin-1":
        guess = "; the list is no UTF-8 text and was read as Latin-1: save it as UTF-8"
    return FileNotFoundError(
        f"{path}: line {number}, {reprlib.repr(text)}, names no file: there is neither an image of "
        f"that name in {files.images.path} nor an annotation file in {files.root / 'Annotations'}"
        f"{guess}"
    )


def _is_file(folder: pathlib.Path, name: str) -> bool:
    """Whether a relative path that stays in a folder is a file; False for what no file is named."""
    return _is_safe(name) and is_file(folder / name)


def _is_safe(name: str) -> bool:
    try:
        check_relative(name, "")
    except DatasetError:
        return False
    return True


def _plain(path: str) -> str:
    """One spelling of a path: without ``.`` and doubled slashes."""
    return str(pathlib.PurePosixPath(path))


def _shown(entry: Entry) -> str:
    return entry.image or f"{entry.stem}.xml"
