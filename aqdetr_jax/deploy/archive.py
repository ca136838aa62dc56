"""The file format of a packed model: arrays in one safetensors file, everything else in a manifest.

A folder of two files. ``weights.safetensors`` holds the arrays: codes as packed bytes (``bits``),
the rest as they are. ``manifest.json`` says what each array of codes is (bits, sign, shape), holds
the facts of the model, and the size and SHA-256 of the weights file; it has a checksum of itself.

A packed model travels: what is read is believed only as far as the manifest, and every array is
checked before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from aqdetr_jax.checkpoint.checksums import find_damage, read_manifest, write_manifest
from aqdetr_jax.deploy.bits import Codes, pack, unpack
from aqdetr_jax.io import whole_folder
from aqdetr_jax.paths import as_path
from aqdetr_jax.quant.spec import SUPPORTED_BITS, packed_size

FORMAT = "aqdetr-packed"
VERSION = 1
"""Raised when a file of this version could be misread by what reads that one."""

MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"

PLAIN_TYPES = ("float32", "int32", "int8", "uint8")
"""Types of arrays that are no codes."""

Arrays = dict[str, np.ndarray | Codes]


class PackedModelError(ValueError):
    """A packed model that cannot be used; the message names the file and the reason."""


def write_archive(
    folder: str | Path, arrays: Mapping[str, np.ndarray | Codes], facts: Mapping[str, Any]
) -> None:
    """Writes a packed model; the folder appears whole or not at all.

    Args:
      folder: an earlier packed model of that name is replaced, nothing else is.
      arrays: by name; codes are packed. Steps (names ending in ``_step``) must be positive.
      facts: what the manifest says beside, plain JSON values.

    Raises:
      FileExistsError: something of another kind is there.
      ValueError: an array cannot be written; the message names it.
    """
    stored, described = {}, {}
    for name, array in sorted(arrays.items()):
        if isinstance(array, Codes):
            try:
                stored[name] = pack(array)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            described[name] = {
                "bits": array.bits,
                "signed": array.signed,
                "shape": list(array.values.shape),
            }
            continue
        stored[name] = np.asarray(array, order="C")  # (keeps scalars scalars)
        reason = _unusable(name, stored[name])
        if reason:
            raise ValueError(f"{name} {reason}: it would be no model")
    with whole_folder(folder, WEIGHTS) as partial:  # other folders have a manifest too
        (partial / WEIGHTS).write_bytes(save(stored, metadata={"format": FORMAT}))
        extra = {"format": FORMAT, "version": VERSION, "codes": described, "facts": dict(facts)}
        write_manifest(partial / MANIFEST, partial, extra)


def is_archive(folder: str | Path) -> bool:
    """Whether a folder says that it is a packed model."""
    try:
        return read_manifest(as_path(folder) / MANIFEST).get("format") == FORMAT
    except (OSError, ValueError):
        return (as_path(folder) / WEIGHTS).is_file()


def read_archive(folder: str | Path) -> tuple[Arrays, dict[str, Any]]:
    """Reads what ``write_archive`` wrote; all of it is checked first.

    Returns:
      (arrays by name, the facts).

    Raises:
      FileNotFoundError: no such folder, or no packed model in it.
      PackedModelError: it is damaged, of another version, or not what its manifest says.
    """
    folder = as_path(folder)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}, so it is no packed model")
    try:
        content = read_manifest(manifest)
    except ValueError as error:
        raise PackedModelError(str(error)) from None
    if content.get("format") != FORMAT:
        raise PackedModelError(f"{manifest} is of something else than a packed model")
    if content.get("version") != VERSION:
        raise PackedModelError(
            f"{manifest} is of version {content.get('version')!r} of the format, and this program "
            f"reads version {VERSION}: export the model again"
        )
    files = content.get("files")
    if not isinstance(files, dict) or set(files) != {WEIGHTS}:  # a path elsewhere among them
        raise PackedModelError(f"{manifest} must list {WEIGHTS} and nothing else")
    damage = find_damage(manifest, folder)
    if damage is not None:
        raise PackedModelError(f"{damage}: export the model again, or copy it again")
    weights = folder / WEIGHTS
    try:
        stored = load(weights.read_bytes())
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise PackedModelError(f"{weights} is no safetensors file ({error})") from None
    return _checked(stored, content.get("codes"), weights), content.get("facts", {})


def _checked(stored: Mapping[str, np.ndarray], described: Any, weights: Path) -> Arrays:
    """The arrays, codes unpacked."""
    if not isinstance(described, dict):
        raise PackedModelError(f"{weights}: its manifest does not describe the codes")
    absent = sorted(described.keys() - stored.keys())
    if absent:
        raise PackedModelError(f"{weights} lacks {absent[0]}, which its manifest describes")
    arrays: Arrays = {}
    for name, array in stored.items():
        if name not in described:
            reason = _unusable(name, array)
            if reason:
                raise PackedModelError(f"{weights}: {name} {reason}")
            arrays[name] = array
            continue
        shape, bits, signed = _description(described[name], name, weights)
        size = packed_size(math.prod(shape), bits)
        if array.dtype != np.uint8 or array.shape != (size,):
            raise PackedModelError(
                f"{weights}: {name} has {array.nbytes} bytes of {array.dtype}, and {bits}-bit "
                f"codes of shape {list(shape)} have {size} of uint8"
            )
        try:
            arrays[name] = unpack(array, shape, bits, signed=signed)
        except ValueError as error:
            raise PackedModelError(f"{weights}: {name}: {error}") from None
    return arrays


def _description(value: Any, name: str, weights: Path) -> tuple[tuple[int, ...], int, bool]:
    """Shape, bits and sign of an array of codes."""
    shape = value.get("shape") if isinstance(value, dict) else None
    if (
        not isinstance(shape, list)
        or not all(type(n) is int and n >= 0 for n in shape)
        or value.get("bits") not in SUPPORTED_BITS
        or not isinstance(value.get("signed"), bool)
    ):
        raise PackedModelError(
            f"{weights}: its manifest describes {name} by no shape, bits (2 to 8) and sign"
        )
    return tuple(shape), value["bits"], value["signed"]


def _unusable(name: str, array: np.ndarray) -> str:
    """Why a plain array is none of a model's; "" if it is one."""
    if str(array.dtype) not in PLAIN_TYPES:
        return f"is of type {array.dtype}"
    if array.dtype == np.float32 and not np.isfinite(array).all():
        return "holds NaN or infinity"
    if name.endswith("_step") and not (array > 0).all():
        return "has a step size that is not positive"
    return ""
