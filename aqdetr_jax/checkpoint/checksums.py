"""Folder manifests: the size and SHA-256 of every file, so that damage is found before use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aqdetr_jax.io import read_json, write_json_atomic


def write_manifest(manifest: Path, folder: Path, extra: Mapping[str, Any]) -> None:
    """Writes the size and SHA-256 of every file under ``folder``, and ``extra``, to ``manifest``.

    The manifest carries a checksum of itself, so that damage to ``extra`` is found too. It is
    written atomically, after ``folder`` is complete: its presence says that ``folder`` is whole.

    Args:
      manifest: JSON file to write; it may lie inside ``folder`` and then does not list itself.
      folder: folder to describe.
      extra: further keys, plain JSON values.
    """
    paths = (path for path in folder.rglob("*") if path.is_file() and path != manifest)
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    content = {**extra, "files": {name: _describe(folder / name) for name in names}}
    write_json_atomic(manifest, {**content, "checksum": _checksum(content)})


def read_manifest(manifest: Path) -> dict[str, Any]:
    """Reads a manifest written by :func:`write_manifest`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is truncated or altered.
    """
    content = read_json(manifest)
    stated = content.pop("checksum", None) if isinstance(content, dict) else None
    if stated is None or stated != _checksum(content):
        raise ValueError(f"{manifest} is damaged: its checksum does not match its content")
    return content


def find_damage(manifest: Path, folder: Path) -> str | None:
    """Compares a folder with its manifest, reading every file.

    Returns:
      None when every listed file is there with its size and SHA-256; else a sentence that names
      the first file that is not.
    """
    try:
        files = read_manifest(manifest)["files"]
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    if not isinstance(files, dict) or not all(isinstance(x, dict) for x in files.values()):
        return f"{manifest} lists no files"
    for name, stated in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        size = path.stat().st_size
        if size != stated.get("size"):
            return f"{path} has {size} bytes, expected {stated.get('size')}"
        if _describe(path) != stated:
            return f"{path} is damaged: its SHA-256 does not match the manifest"
    return None


def _describe(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
