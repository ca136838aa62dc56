"""What a YOLO folder says of itself: its class names, its splits, and the images of each."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from aqdetr_jax.data.dataset import DatasetError, label_name
from aqdetr_jax.data.files import IMAGE_SUFFIXES
from aqdetr_jax.data.remedies import both_splits
from aqdetr_jax.paths import exists, printable

YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
CLASS_FILES = ("classes.txt", "labels/classes.txt", "obj.names")
_SPLIT_KEYS = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
"""Keys of the YAML file, and the split that each names."""
_MAX_TEXT = 8_000_000
_SHOWN = 200  # characters of a name or path in a message


def settings_file(root: pathlib.Path) -> pathlib.Path | None:
    """The YAML file of a folder, or None.

    Raises:
      DatasetError: there are several.
    """
    found = [root / name for name in YAML_NAMES if (root / name).is_file()]
    if not found:  # under another name, such as coco128.yaml
        files = (path for path in sorted(root.glob("*.y*ml")) if not path.name.startswith("."))
        found = [path for path in files if _names_a_split(path)]
    if len(found) > 1:
        raise DatasetError(
            f"{root}: {found[0].name} and {found[1].name} both describe a YOLO set; keep one"
        )
    return found[0] if found else None


def _names_a_split(path: pathlib.Path) -> bool:
    try:
        content = _load_yaml(path)
    except DatasetError:
        return False
    return isinstance(content, dict) and "names" in content and "train" in content


def read_settings(root: pathlib.Path) -> Mapping[str, Any]:
    """The content of a folder's YAML file; empty without one.

    Raises:
      DatasetError: it cannot be read.
    """
    path = settings_file(root)
    if path is None:
        return {}
    content = _load_yaml(path)
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: must hold keys such as names and train")
    return content


class _Loader(yaml.SafeLoader):
    """Without merge keys: nested in each other they multiply the content of a small file."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "merge keys (<<) are not read", key.start_mark
                )
        super().flatten_mapping(node)


def _load_yaml(path: pathlib.Path) -> Any:
    text = read_text(path)
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # The text of a YAML error quotes the file.
        problem = getattr(error, "problem", None) or type(error).__name__
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        raise DatasetError(
            f"{path}: not valid YAML ({line}{printable(problem, _SHOWN)})"
        ) from error


def read_text(path: pathlib.Path) -> str:
    """A UTF-8 text file, with or without a byte-order mark.

    Raises:
      FileNotFoundError: no such file.
      DatasetError: too large, or not UTF-8.
    """
    try:
        if path.stat().st_size > _MAX_TEXT:
            raise DatasetError(f"{path}: larger than {_MAX_TEXT} bytes")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


# --- class names ---------------------------------------------------------------------------------


def class_list(root: pathlib.Path, settings: Mapping[str, Any]) -> list[str]:
    """The class names, by class number.

    Args:
      root: the YOLO folder.
      settings: content of its YAML file.

    Raises:
      FileNotFoundError: nothing names the classes.
      DatasetError: names are no text, or not all different; the message gives their positions.
    """
    where, names = _named_classes(root, settings)
    number_of: dict[str, int] = {}
    for number, given in enumerate(names):
        name = label_name(given, f"{where}: name {number}")
        first = number_of.setdefault(name, number)
        if first != number:
            raise DatasetError(
                f"{where}: classes {first} and {number} are both named {printable(name, _SHOWN)!r}"
            )
    return list(number_of)


def _named_classes(root: pathlib.Path, settings: Mapping[str, Any]) -> tuple[str, list[str]]:
    if "names" in settings:
        where, names = str(settings_file(root)), settings["names"]
        if isinstance(names, dict):
            if any(type(key) is not int for key in names) or set(names) != set(range(len(names))):
                raise DatasetError(f"{where}: the keys of names must be 0 to {len(names) - 1}")
            names = [names[number] for number in range(len(names))]
        if not isinstance(names, list) or not names:
            raise DatasetError(f"{where}: names must be a list of class names")
        count = settings.get("nc", len(names))
        if type(count) is not int or count != len(names):
            shown = count if _is_short(count) else type(count).__name__
            raise DatasetError(f"{where}: nc is {shown}, but there are {len(names)} names")
        return where, [_text_of(name, f"{where}: name {n}") for n, name in enumerate(names)]
    for name in CLASS_FILES:
        if (root / name).is_file():
            lines = read_text(root / name).splitlines()
            while lines and not lines[-1].strip():
                lines.pop()
            if not lines:
                raise DatasetError(f"{root / name}: has no class names")
            return str(root / name), lines
    raise FileNotFoundError(
        f"{root}: nothing names the classes: a YOLO folder has data.yaml with names, or classes.txt"
    )


def _is_short(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _text_of(name: object, where: str) -> str:
    """A name of the YAML file, which reads a bare 3 as a number."""
    if isinstance(name, str):
        return name
    if _is_short(name):
        return str(name)
    raise DatasetError(
        f'{where} is read as {type(name).__name__}, not as text: quote it, as in "yes"'
    )


# --- splits --------------------------------------------------------------------------------------


def find_splits(root: pathlib.Path, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What each split is said to be, in the order train, val, test.

    Args:
      root: the YOLO folder.
      settings: content of its YAML file; read when None.

    Returns:
      Split -> value in the YAML file, or the folder of ``images/``; for :func:`split_images`.

    Raises:
      DatasetError: the YAML file names a split twice.
    """
    settings = read_settings(root) if settings is None else settings
    named: dict[str, str] = {}
    for key, split in _SPLIT_KEYS.items():
        if settings.get(key):
            if split in named:
                raise DatasetError(
                    f"{settings_file(root)}: {named[split]} and {key} name the same split; keep one"
                )
            named[split] = key
    if named:
        return {split: settings[key] for split, key in named.items()}
    images = root / "images"
    if not images.is_dir():
        return {}
    folders = [p for p in sorted(images.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    return {p.name: f"images/{p.name}" for p in folders} or {"all": "images"}


def split_images(root: pathlib.Path, split: str, settings: Mapping[str, Any]) -> list[str]:
    """The images of a split by their path in ``root``, place by place, sorted inside a folder.

    Hidden files and folders hold no images: macOS leaves "._a.jpg" beside "a.jpg".

    Args:
      root: the YOLO folder.
      split: one of :func:`find_splits`.
      settings: content of its YAML file.

    Raises:
      FileNotFoundError: no such split, or it has no images.
      DatasetError: it is said to be where nothing is, or has an image twice.
    """
    splits = find_splits(root, settings)
    if split not in splits:
        known = ", ".join(splits) or "none"
        raise FileNotFoundError(f"{root}: no split {split!r} (there are: {known})")
    places = _places(splits[split], root, settings, split)
    missing = [item for item, place in places.items() if place is None]
    if missing:
        raise DatasetError(
            f"{settings_file(root)}: {split}: {printable(missing[0], _SHOWN)!r} does not exist in "
            f"{root}{_others(root, settings, splits)}"
        )
    found: dict[str, None] = {}
    for place in filter(None, places.values()):
        for name in _listed(root, place) if place.is_file() else _inside(root, place):
            if name in found:
                raise DatasetError(f"{root}: {name!r} is in split {split!r} twice")
            found[name] = None
    if not found:
        shown = ", ".join(map(str, places.values()))
        raise FileNotFoundError(f"{root}: split {split!r} has no images in {shown}")
    return list(found)


def _places(
    value: object, root: pathlib.Path, settings: Mapping[str, Any], split: str
) -> dict[str, pathlib.Path | None]:
    """Path as written -> folder or list of images; None where nothing is."""
    bases = (_base(root, settings), root)
    found: dict[str, pathlib.Path | None] = {}
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, str) or not item:
            raise DatasetError(
                f"{settings_file(root)}: {split}: must be a path or a list of paths, not "
                f"{type(item).__name__}"
            )
        found[item] = _locate(item, bases)
    return found


def _others(root: pathlib.Path, settings: Mapping[str, Any], splits: Mapping[str, Any]) -> str:
    """What to do where a split is not there, for a message."""
    there = [
        split
        for split, value in splits.items()
        if None not in _places(value, root, settings, split).values()
    ]
    if len(there) == 1:
        return f": {there[0]!r} alone is there; {both_splits(there[0], there[0])}"
    names = ", ".join(map(repr, there))
    return f" (config.data.train_split and eval_split take what is there: {names})" if there else ""


def _base(root: pathlib.Path, settings: Mapping[str, Any]) -> pathlib.Path:
    """Where the file's paths start: its ``path``, if that is here, else its own folder."""
    named = settings.get("path")
    if isinstance(named, str) and named:
        path, home = (root / named).resolve(), root.resolve()
        # A path of the machine that wrote it, or of ultralytics' own datasets folder.
        if path.is_dir() and path.is_relative_to(home):
            return root / path.relative_to(home)
    return root


def _locate(text: str, bases: Sequence[pathlib.Path]) -> pathlib.Path | None:
    """A file or folder as YOLO's files name it, inside one of ``bases``; None if nothing is there.

    Roboflow writes ``../train/images`` and means ``train/images``; an absolute path was another
    machine's, but its end may be here. What is found lies in a base by the text of its path.
    """
    text = text.replace("\\", "/")
    parts = pathlib.PurePosixPath(text).parts
    elsewhere = text.startswith(("/", "..")) or bool(pathlib.PureWindowsPath(text).drive)
    inner = [part for part in parts if part not in ("..", ".", "/", "//")]
    for start in range(len(inner) if elsewhere else min(len(inner), 1)):
        for folder in bases:
            if exists(place := folder.joinpath(*inner[start:])):
                return place
    return bases[0] if not inner and not elsewhere else None


def _inside(root: pathlib.Path, folder: pathlib.Path) -> list[str]:
    found = []
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            found.append(path.relative_to(root).as_posix())
    return sorted(found)


def _listed(root: pathlib.Path, file: pathlib.Path) -> list[str]:
    """Images listed in a text file, one a line, by paths as :func:`_locate` takes them."""
    names = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        path = _locate(line.strip(), (file.parent, root))
        if path is None or not path.is_file():
            raise FileNotFoundError(
                f"{file}, line {number}: no image {printable(line.strip(), _SHOWN)!r} in "
                f"{file.parent} or {root}"
            )
        names.append(path.relative_to(root).as_posix())
    return names
